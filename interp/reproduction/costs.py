"""What a condition cost in seconds, and how far its pictures as a whole are from the baseline's: beside the scores of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from interp.reproduction.measures import Estimate, estimate
from interp.reproduction.runs import SECONDS, frechet
from interp.reproduction.settings import Settings
from interp.stores import Run

FEATURES = {"clip_fid": "FID to a = 0, CLIP", "fid": "FID to a = 0, Inception"}
NEEDS = {
    "clip_fid": "No FID in CLIP's features: it needs interp-diffusion[metrics].",
    "fid": "No FID by Inception-v3: torch-fidelity or its weights are not here.",
}


@dataclass(frozen=True)
class Cost:
    """Read from the attributes of `/scores`, where `runs.make` and `interp score` put them."""

    run: Run
    settings: Settings

    @cached_property
    def timings(self) -> dict[str, np.ndarray]:
        """Seconds a sample of each condition's batches (batch,), NaN where none was measured."""
        known = self.run.tree["scores"].attrs.get(SECONDS, {})
        batches = self.run.samples.groupby("condition")["batch"].unique()
        most = max(len(b) for b in batches)
        padded = {c: [known.get(str(k), np.nan) for k in b] + [np.nan] * (most - len(b)) for c, b in batches.items()}
        return {str(c): np.array(values, dtype=float) for c, values in padded.items()}

    def seconds(self, condition: str) -> Estimate:
        """Return seconds a sample; the interval draws batches."""
        values = self.timings[condition]
        return estimate(values, np.arange(len(values)), resamples=self.settings.resamples)

    def saved(self, condition: str) -> Estimate:
        """Return the share of the baseline's seconds that it saves; batches of the same prompts are drawn together."""
        both = np.stack([self.timings["baseline"], self.timings[condition]], 1)
        return estimate(
            both, np.arange(len(both)), resamples=self.settings.resamples, statistic=lambda m: 1 - m[:, 1] / m[:, 0]
        )

    def distances(self) -> dict[str, dict[str, float]]:
        """Return, by the name of the features, condition → Fréchet distance to the baseline."""
        known = self.run.tree["scores"].attrs.get("by_condition", {})
        found = {name: known.get(f"{metric}:baseline", {}) for metric, name in FEATURES.items()}
        return {name: {c: float(v["value"]) for c, v in values.items()} for name, values in found.items() if values}

    def measured(self) -> str:
        """Return on what the seconds were measured."""
        attrs = self.run.attrs
        return f"Seconds on {attrs['device']}, {attrs['dtype']}; batches a condition: {self.timings['baseline'].size}."

    def missing(self) -> str:
        """Return what FID there is not, and why."""
        return " ".join(NEEDS[metric] for metric in frechet(self.settings) if FEATURES[metric] not in self.distances())
