"""What each point of a grid of conditions did: the answer of `interp.sweep`, read back from its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import mean_interval
from interp.probes.comparing import DISTANCES, EXPLAINED, compare, resampled
from interp.probes.conditions import check_condition
from interp.probes.sweep_plot import draw
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interp.stores import Run

BETWEEN, IS = " | ", "="


def point_name(labels: dict[str, str]) -> str:
    """Return the name of a grid point's condition.

    >>> point_name({"site": "unet.mid_block:out", "window": "0–0.5"})
    'site=unet.mid_block:out | window=0–0.5'
    """
    return BETWEEN.join(f"{name}{IS}{label}" for name, label in labels.items())


def read_point(condition: str) -> dict[str, str] | None:
    """Return the labels of a grid point by dimension, None for another condition."""
    parts = [part.partition(IS) for part in condition.split(BETWEEN)]
    return {name: label for name, _, label in parts} if all(name and equals for name, equals, _ in parts) else None


@probe("sweep", needs={"samples": ["condition"]}, plot=draw)
def sweep(
    run: Run,
    *,
    clean: str = "baseline",
    corrupted: str = "corrupted",
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Effect of each point of a grid: sites, windows, strengths, … (the metric's own unit).

    Trace the run with `interp.sweep`, which names its conditions after the grid: `site=unet.mid_block:out | window=0–0.5`.

    Parameters: `clean` names the unchanged condition; `corrupted` one that was damaged before each point tried to restore
    something, if there is such a condition; `metrics` None (`image_distance`, `latent_distance` and all of `/scores`) or
    some; `resamples` and `seed` belong to the bootstrap over prompts.

    Returns a Dataset over the grid's own dimensions, `metric` and `pair` (a prompt and seed): `value` (…, metric, pair);
    `clean_value` (metric, pair); `effect` (…, metric, pair): the value minus the clean one, or minus the corrupted one if
    there is one (`attrs["reference"]` says which); its mean over pairs in `effect_mean` and the bootstrap 95 % interval in
    `effect_interval` (…, metric, bound). With a corrupted condition also `corrupted_value`, and `recovered` (…, metric): the
    mean effect divided by that of the clean picture (0 as corrupted, 1 as clean), with `recovered_interval`.

    Raises InterpError when no condition is a point of a grid, or points have different dimensions. Source: Basu et al.,
    arXiv:2310.13730 (causal tracing); Basu et al., arXiv:2405.01008 (layers of cross-attention).

    >>> from interp.probes.testing import changed_run
    >>> run = changed_run({"start=0.2": [{"name": "remove_text", "start": 0.2}], "start=0.6": []}, samples=3)
    >>> ds = sweep(run, metrics="latent_distance")
    >>> ds["effect"].dims, ds["start"].values.tolist(), ds.attrs["reference"]
    (('start', 'metric', 'pair'), [0.2, 0.6], 'baseline')
    """
    check_condition(run, clean)
    points = {name: labels for name in run.conditions if name != clean and (labels := read_point(name)) is not None}
    if not points:
        raise InterpError(
            "sweep needs conditions that are points of a grid, 'site=… | window=…', where this run has "
            f"{', '.join(run.conditions)}: trace it with interp.sweep(pipe, prompts, over={{'site': […]}}, intervention=…)"
        )
    dims = list(next(iter(points.values())))
    odd = next((name for name, labels in points.items() if list(labels) != dims), None)
    if odd is not None:
        raise InterpError(
            f"sweep: the condition {odd!r} has other dimensions than the first, {dims}; one run holds one grid"
        )
    damaged = [corrupted] if corrupted in run.conditions else []
    known = [metrics] if isinstance(metrics, str) else metrics
    scores = None if known is None else [m for m in known if m not in DISTANCES]
    ds = compare(run, clean, [*damaged, *points], metrics=scores, resamples=0, asker="sweep")
    values, names = _measures(ds, known)
    units = resampled(ds["prompt_id"].values)
    axes = {d: list(dict.fromkeys(labels[d] for labels in points.values())) for d in dims}
    cells = [tuple(axes[d].index(labels[d]) for d in dims) for labels in points.values()]
    shape = tuple(len(a) for a in axes.values())

    def laid_out(array: np.ndarray) -> np.ndarray:
        """Conditions (point, …) at their places in the grid, NaN where there is none."""
        grid = np.full((*shape, *array.shape[1:]), np.nan)
        for cell, one in zip(cells, array, strict=True):
            grid[cell] = one
        return grid

    reference = values[len(damaged)]  # the corrupted condition follows the clean one
    first = 1 + len(damaged)
    effect = values[first:] - reference
    mean, interval = mean_interval(np.moveaxis(effect, 2, 0), units, resamples=resamples, seed=seed)
    found: dict[str, Any] = {
        "value": ((*dims, "metric", "pair"), laid_out(values[first:]), _said("value")),
        "clean_value": (("metric", "pair"), values[0], _said("value of the unchanged condition")),
        "effect": ((*dims, "metric", "pair"), laid_out(effect), _said("effect")),
        "effect_mean": ((*dims, "metric"), laid_out(mean), _said("mean effect over pairs")),
        "effect_interval": ((*dims, "metric", "bound"), laid_out(interval), _said("95 % interval of the mean effect")),
    }
    if damaged:
        both = np.concatenate([(values[0] - reference)[None], effect])
        both[:, ~np.isfinite(both).all(0)] = np.nan  # ratios of means over the same pairs
        ratio, between = mean_interval(
            np.moveaxis(both, 2, 0), units, resamples=resamples, seed=seed, statistic=lambda m: m / m[:, :1]
        )
        said = {"units": "1", "long_name": "recovered: mean effect / mean effect of the clean picture"}
        found |= {
            "corrupted_value": (("metric", "pair"), reference, _said("value of the corrupted condition")),
            "recovered": ((*dims, "metric"), laid_out(ratio[1:]), said),
            "recovered_interval": (
                (*dims, "metric", "bound"),
                laid_out(between[1:]),
                {**said, "long_name": "95 % interval"},
            ),
        }
    coords = {
        **{d: _numbers(labels) for d, labels in axes.items()},
        "metric": names,
        "bound": ["low", "high"],
        **{c: ("pair", ds[c].values) for c in ("prompt", "prompt_id", "seed")},
    }
    reference_name = corrupted if damaged else clean
    return xr.Dataset(
        found, coords, {"reference": reference_name, "clean": clean, "pairs": ds.attrs["pairs"], "over": dims}
    )


def _measures(ds: xr.Dataset, wanted: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Every measure of a comparison (condition, metric, pair), and their names."""
    parts = {name: ds[name].values for name in DISTANCES if name in ds and (wanted is None or name in wanted)}
    if "score" in ds:
        parts |= {str(m): ds["score"].sel(metric=m).values for m in ds["metric"].values}
    missing = [m for m in wanted or () if m not in parts]
    if missing:
        raise InterpError(f"sweep: this run holds no {missing[0]!r} ({EXPLAINED['image_distance'][1]} needs pictures)")
    return np.stack(list(parts.values()), axis=1), list(parts)


def _numbers(labels: list[str]) -> list[Any]:
    try:
        return [float(label) for label in labels]
    except ValueError:
        return list(labels)


def _said(text: str) -> dict[str, str]:
    return {"units": "the metric's own", "long_name": text}
