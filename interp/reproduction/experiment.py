"""What an experiment is, and how the experiments read scores and distances of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from interp.reproduction.measures import Answer, Estimate, estimate
from interp.reproduction.runs import Conditions
from interp.reproduction.settings import Settings
from interp.stores import Run

Runs = Mapping[str, Run]
TEXTS = ("source", "target")


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    place: where the paper has it. claim: what the paper says, in our words. definition: exactly what is computed here.
    choices: what the paper leaves open, and what was chosen. needs: settings → run → conditions. answer: None for an
    experiment that is out of reach, of which `claim` and `choices` say why.
    """

    key: str
    title: str
    place: str
    claim: str
    definition: str
    choices: tuple[str, ...]
    needs: Callable[[Settings], dict[str, Conditions]] = lambda settings: {}
    answer: Callable[[Runs, Settings], Answer] | None = None


def judges(run: Run) -> list[str]:
    """Return the metrics of alignment that the run has, the one that decides first."""
    there = {str(m).partition(":")[0] for m in run.scores["metric"].values}
    return [m for m in NAMES if m in there]


NAMES = {"judge": "attribute judge", "blip_vqa": "BLIP-VQA", "clip": "CLIP"}


def pair_units(run: Run, ds: xr.Dataset) -> np.ndarray:
    """Return which pair of S-PromptSet each entry of a probe's `pair` (or `sample`) belongs to: what is drawn anew."""
    table = run.samples.drop_duplicates("prompt_id").set_index("prompt_id")["pair"]
    return np.asarray(table.loc[ds["prompt_id"].values].to_numpy())


@dataclass(frozen=True)
class Compared:
    """Scores and distances of conditions, (condition, row), with the units of the bootstrap (row,)."""

    run: Run
    ds: xr.Dataset
    settings: Settings

    @property
    def units(self) -> np.ndarray:
        """What is drawn anew, (row,)."""
        return pair_units(self.run, self.ds)

    def values(self, condition: str, what: str) -> np.ndarray:
        """Return `L1`, or a metric of `/scores` of that condition, (row,)."""
        one = self.ds.sel(condition=condition)
        return np.asarray(one["image_distance"].values if what == "L1" else one["score"].sel(metric=what).values)

    def mean(self, condition: str, what: str) -> Estimate:
        """Return its mean with the interval."""
        return estimate(self.values(condition, what), self.units, resamples=self.settings.resamples)

    def difference(self, one: str, other: str, what: str) -> Estimate:
        """Return the mean of one condition minus that of another."""
        gap = self.values(one, what) - self.values(other, what)
        return estimate(gap, self.units, resamples=self.settings.resamples)

    def ratio(self, above: str, below: str, what: str, *, minus: str | None = None, lost: bool = False) -> Estimate:
        """Return a ratio of means: above/below; of (mean − that of `minus`); or, if `lost`, of (1 − mean)."""
        columns = [self.values(c, what) for c in (above, below, minus) if c is not None]

        def of(means: np.ndarray) -> np.ndarray:
            base = 1.0 if lost else means[:, 2] if minus is not None else 0.0
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray((means[:, 0] - base) / (means[:, 1] - base))

        return estimate(np.stack(columns, 1), self.units, resamples=self.settings.resamples, statistic=of)


def alignment(run: Run, swap: str, settings: Settings) -> tuple[xr.Dataset, np.ndarray]:
    """Return what `eos_replacement` says of one swap (pair, metric, image, text), and the units of the bootstrap."""
    scored = Run(run.tree.drop_nodes("images", errors="ignore"))  # spares reading every picture for distances
    ds = scored.probe("eos_replacement", swap=swap, resamples=1)
    return ds, pair_units(run, ds)


def picture_rows(
    run: Run, conditions: Sequence[str], prompts: Sequence[int]
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Return rows of inline pictures, one a condition, and the heads: the prompts with these ids."""
    from interp.reproduction.drawing import inline

    table = run.samples
    rows, heads = [], []
    for condition in conditions:
        cells = []
        for p in prompts:
            at = int(np.flatnonzero(((table["condition"] == condition) & (table["prompt_id"] == p)).to_numpy())[0])
            cells.append(inline(run.images.isel(sample=at).values, f"{condition}: {table['prompt'].iloc[at]}"))
        rows.append((condition, cells))
    for p in prompts:
        heads.append(str(table["prompt"][(table["prompt_id"] == p).to_numpy()].iloc[0]))
    return rows, heads


def metric_name(metric: str) -> str:
    """Return a metric's name for readers: "judge:prompt" → "attribute judge"."""
    return NAMES.get(metric.partition(":")[0], metric)
