"""Which prompt wins when words come from one and end-of-sequence tokens from another (arXiv:2405.15330)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import mean_interval
from interp.probes.comparing import distances, pictures, pixel_distance
from interp.probes.conditions import Pairs
from interp.probes.eos_plot import draw
from interp.probes.eos_sweep import swept
from interp.probes.labels import check_option, plain_text
from interp.probes.needs import held
from interp.probes.progress import counted
from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp.stores import Run

SIDES = ("source", "target")
IMAGES = ("swap", "source", "target")


@dataclass(frozen=True)
class Pairing:
    """Positions in the run: the swap sample of each pair, its baseline A, its baseline B (−1 for none)."""

    swap: np.ndarray
    source: np.ndarray
    target: np.ndarray


@probe("eos_replacement", needs={"scores": True, "samples": ["condition"]}, plot=draw)
def eos_replacement(
    run: Run,
    *,
    baseline: str = "baseline",
    swap: str | Sequence[str] = "eos",
    target: str = "target",
    target_condition: str | None = None,
    metrics: Sequence[str] | str | None = None,
    unit: str = "prompt",
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Alignment of EOS-swapped images with both prompts (the metric's own unit), distances to both (1).

    A pair is a finished sample of condition `swap` (words of its prompt A, end-of-sequence tokens of prompt
    B) with baseline A, the sample of condition `baseline` of the same prompt and seed, and baseline B: the
    `baseline` sample whose prompt is B, of the same seed, or, with `target_condition`, that condition's
    sample of the same prompt_id and seed. A is called source, B target. A pair without baseline A or B has
    NaN there.

    Trace `conditions={"baseline": [], "eos": [interp.ReplaceEOS("{target}")]}`. For the question when EOS is used (section
    5.2), one condition for each window, `ReplaceEOS("{target}", stop=0.2)` and so on; for the number of EOS (appendix C),
    `ReplaceTokens(roles=("eos", "pad"), value="repeat", count=n)` and `ReplaceEOS("{target}", skip=n)`: give `swap` all names.

    Parameters: `baseline`, `swap`, `target_condition` name conditions, and `swap` one or several; `target` names the
    column of the prompt table that holds B; `metrics` (None: all) are those of `/scores` with both "<metric>:prompt" and
    "<metric>:<target>"; `unit` ("prompt" or "pair") is what the bootstrap draws anew, seeds of one prompt not
    being independent; `resamples` and `seed` belong to it.

    Returns a Dataset, float64: `alignment` (pair, metric, image, text) for the images swap, source, target
    and the texts source, target; `advantage` (pair, metric) = the swap image's alignment with the target
    minus that with the source; `latent_distance` (pair, step, reference) = ‖x_swap − x_ref‖/‖x_ref‖, if latents
    were captured; `image_distance` (pair, reference) = mean |difference| of the pixels, as a share of 255, if images
    were captured. Their means over the pairs are in `alignment_mean`, `advantage_mean`, `latent_distance_mean`,
    `image_distance_mean`, with bootstrap 95 % intervals in `…_interval` (…, bound); `target_wins` (metric) is
    the share of pairs with positive advantage (a tie counts half), with `target_wins_interval`. Coordinates
    (pair): prompt, target_prompt, prompt_id, seed, and the samples `sample_swap sample_source sample_target`
    (−1 for none).

    Of several swaps only what has no pairs is returned, over `swap`, with `alignment_relative` (swap, metric, text) =
    (mean − worst)/(best − worst) of the swapped images, and of each swap `changes` (in words), `first_step` and
    `steps_exchanged` (its window) and `tokens_repeated` (−1 for none).

    Raises InterpError when a condition, the column or the scores are missing, and when no pair has a baseline
    A. Source: Yi et al., arXiv:2405.15330, section 5.1, Table 1.

    >>> from interp.probes.testing import swap_run
    >>> ds = eos_replacement(swap_run(samples=4, steps=6, seed=0))
    >>> ds["alignment"].dims, ds["latent_distance"].dims
    (('pair', 'metric', 'image', 'text'), ('pair', 'step', 'reference'))
    """
    check_option("eos_replacement", "unit", unit, ("prompt", "pair"))
    more: dict[str, Any] = {"metrics": metrics, "unit": unit, "resamples": resamples, "seed": seed}
    places: dict[str, Any] = {"baseline": baseline, "target": target, "target_condition": target_condition}
    if isinstance(swap, str):
        return _one_swap(run, swap, **places, **more)
    return swept(run, {name: _one_swap(run, name, **places, **more) for name in swap})


def _one_swap(
    run: Run,
    swap: str,
    *,
    baseline: str,
    target: str,
    target_condition: str | None,
    metrics: Sequence[str] | str | None,
    unit: str,
    resamples: int,
    seed: int,
) -> xr.Dataset:
    """The answer for one condition."""
    samples = _samples(run, target)
    names = _metrics(run, target, metrics)
    pairing = pair(samples, baseline=baseline, swap=swap, target=target, target_condition=target_condition)
    chosen = samples.iloc[pairing.swap]
    alignment = _alignment(run, pairing, samples, names, target)
    variables: dict[str, Any] = {
        "alignment": (("pair", "metric", "image", "text"), alignment, "the metric's own", "alignment"),
        "advantage": (
            ("pair", "metric"),
            alignment[:, :, 0, 1] - alignment[:, :, 0, 0],
            "the metric's own",
            "alignment of the swap image with the target minus that with the source",
        ),
    }
    if "latents" in held(run, "trajectory"):
        variables["latent_distance"] = (
            ("pair", "step", "reference"),
            _latent_distance(run, pairing),
            "1",
            "relative L2 distance of the latents",
        )
    if "image" in held(run, "images"):
        l1 = _image_distance(run, pairing)
        variables["image_distance"] = (
            ("pair", "reference"),
            l1,
            "1 (of the full pixel range)",
            "L1 distance",
        )
    units = chosen["prompt_id"].to_numpy() if unit == "prompt" else np.arange(len(chosen))
    data: dict[str, Any] = {}
    for name, (dims, values, units_text, text) in variables.items():
        attrs = {"units": units_text, "long_name": text}
        data[name] = (dims, values, attrs)
        _summarise(data, f"{name}_mean", name, dims, values, units, attrs, resamples, seed)
    advantage = variables["advantage"][1]
    wins = np.where(np.isnan(advantage), np.nan, (np.sign(advantage) + 1) / 2)
    attrs = {"units": "1 (share of pairs)", "long_name": "pairs in which the target wins"}
    _summarise(data, "target_wins", "target_wins", ("pair", "metric"), wins, units, attrs, resamples, seed)
    steps = run.tree["trajectory"].dataset
    coords = {
        "step": steps["step"].values,
        **{c: ("step", steps[c].values) for c in ("timestep", "sigma", "alpha_bar") if c in steps.coords},
        "metric": names,
        "image": list(IMAGES),
        "text": list(SIDES),
        "reference": list(SIDES),
        "bound": ["low", "high"],
        "prompt": ("pair", plain_text(chosen["prompt"])),
        "target_prompt": ("pair", plain_text(chosen[target])),
        "prompt_id": ("pair", chosen["prompt_id"].to_numpy()),
        "seed": ("pair", chosen["seed"].to_numpy()),
        **{f"sample_{k}": ("pair", _labels(samples, getattr(pairing, k))) for k in IMAGES},
    }
    return xr.Dataset(data, coords, {"level": 0.95, "resampled": unit, "pairs": len(chosen)})


def pair(samples: pd.DataFrame, *, baseline: str, swap: str, target: str, target_condition: str | None) -> Pairing:
    """Pair the finished rows of a run's table of samples, by position: see `eos_replacement`.

    A swap row's baseline A is the baseline row of the same prompt_id and seed, or failing that of the same
    prompt and seed. Raises InterpError for a condition without samples, and when no pair has a baseline A.
    """
    conditions = [baseline, swap] + ([target_condition] if target_condition else [])
    rows = {name: _rows(samples, name) for name in conditions}
    by_id = _index(samples, rows[baseline], "prompt_id")
    by_prompt = _index(samples, rows[baseline], "prompt")
    by_target = by_prompt if target_condition is None else _index(samples, rows[target_condition], "prompt_id")
    source, other = [], []
    for i in rows[swap]:
        row = samples.iloc[i]
        same_id = by_id.get((row["prompt_id"], row["seed"]), -1)
        if same_id >= 0 and samples["prompt"].iloc[same_id] != row["prompt"]:
            same_id = -1
        source.append(same_id if same_id >= 0 else by_prompt.get((row["prompt"], row["seed"]), -1))
        other.append(by_target.get((row[target] if target_condition is None else row["prompt_id"], row["seed"]), -1))
    if max(source, default=-1) < 0:
        raise InterpError(
            f"no sample of condition {swap!r} has a finished {baseline!r} sample of its prompt and seed: "
            f"trace both conditions with the same prompts and seeds"
        )
    return Pairing(np.array(rows[swap]), np.array(source), np.array(other))


def _rows(samples: pd.DataFrame, condition: str) -> list[int]:
    known = list(dict.fromkeys(samples["condition"].astype(str)))
    if condition not in known:
        listed = ", ".join(known)
        raise InterpError(f"this run has no condition {condition!r}; it has {listed}{nearest(condition, known)}")
    done = samples["status"].to_numpy() == 1 if "status" in samples else np.ones(len(samples), dtype=bool)
    rows: list[int] = np.flatnonzero((samples["condition"] == condition).to_numpy() & done).tolist()
    if not rows:
        raise InterpError(f"no sample of condition {condition!r} is finished yet: run the same command again")
    return rows


def _index(samples: pd.DataFrame, rows: list[int], key: str) -> dict[tuple[Any, Any], int]:
    """(key, seed) → position; the first of several."""
    table = samples.iloc[rows[::-1]]
    return dict(zip(zip(table[key], table["seed"], strict=True), rows[::-1], strict=True))


def _samples(run: Run, target: str) -> pd.DataFrame:
    samples = run.samples
    if target not in samples.columns:
        known = [str(c) for c in samples.columns]
        raise InterpError(
            f"this run's table of prompts has no column {target!r}; name the one that holds the "
            f"prompt of the EOS tokens by target=…; it has {', '.join(known)}{nearest(target, known)}"
        )
    return samples


def _labels(samples: pd.DataFrame, positions: np.ndarray) -> np.ndarray:
    return np.where(positions >= 0, samples.index.to_numpy()[positions], -1)


def _metrics(run: Run, target: str, metrics: Sequence[str] | str | None) -> list[str]:
    """The metrics scored against both texts, or those asked for."""
    columns = held(run, "scores")
    both = sorted(c.removesuffix(":prompt") for c in columns if c.endswith(":prompt"))
    both = [m for m in both if f"{m}:{target}" in columns]
    wanted = both if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted or ["clip"]:
        if name not in both:
            raise InterpError(
                f"eos_replacement needs the scores '{name}:prompt' and '{name}:{target}', where this run has "
                f"{', '.join(sorted(columns)) or 'none'}: run `interp score RUN` with that metric"
            )
    return wanted


def _alignment(run: Run, pairing: Pairing, samples: pd.DataFrame, names: list[str], target: str) -> np.ndarray:
    """(pair, metric, image, text): an image's score against A or B, where one of its columns is that text."""
    score = run.tree["scores"].to_dataset()["score"]
    columns = {column: samples[column].to_numpy() for column in (target, "prompt")}
    texts = columns["prompt"][pairing.swap], columns[target][pairing.swap]
    result = np.full((len(pairing.swap), len(names), len(IMAGES), len(SIDES)), np.nan)
    for m, name in enumerate(names):
        for column, own in columns.items():
            values = score.sel(metric=f"{name}:{column}").values
            for k, positions in enumerate((pairing.swap, pairing.source, pairing.target)):
                for t, text in enumerate(texts):
                    known = (positions >= 0) & (own[positions] == text)
                    result[known, m, k, t] = values[positions[known]]
    return result


def _latent_distance(run: Run, pairing: Pairing) -> np.ndarray:
    """(pair, step, reference), reading one pair of trajectories at a time."""
    latents = run.tree["trajectory"].to_dataset()["latents"]
    result = np.full((len(pairing.swap), latents.sizes["step"], 2), np.nan)
    for p, i in enumerate(counted(pairing.swap)):
        mine = latents.isel(sample=int(i)).values.astype(np.float64)
        for r, j in enumerate((pairing.source[p], pairing.target[p])):
            if j >= 0:
                other = latents.isel(sample=int(j)).values.astype(np.float64)
                gap, size = (np.sqrt((field**2).sum((1, 2, 3))) for field in (mine - other, other))
                result[p, :, r] = gap / np.where(size > 0, size, np.nan)
    return result


def _image_distance(run: Run, pairing: Pairing) -> np.ndarray:
    """(pair, reference): mean absolute difference of the pixels, 0 to 1."""
    both = [np.stack([pairing.swap, other]) for other in (pairing.source, pairing.target)]
    found = [distances(Pairs(["swap", "reference"], two), 1, pictures(run), pixel_distance)[0] for two in both]
    return np.stack(found, axis=1)


def _summarise(
    data: dict[str, Any],
    mean_name: str,
    name: str,
    dims: tuple[str, ...],
    values: np.ndarray,
    units: np.ndarray,
    attrs: dict[str, str],
    resamples: int,
    seed: int,
) -> None:
    """Add the mean over the pairs and its bootstrap interval to `data`."""
    mean, interval = mean_interval(values, units, resamples=resamples, seed=seed)
    data[mean_name] = (dims[1:], mean, {**attrs, "long_name": f"{attrs['long_name']}, mean"})
    data[f"{name}_interval"] = (
        (*dims[1:], "bound"),
        interval,
        {**attrs, "long_name": "95 % interval of the mean"},
    )
