"""Bootstrap intervals of means over samples or pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import xarray as xr

AT_ONCE = 250  # resamples per block: bounds the memory to AT_ONCE × rows


def mean_interval(
    values: np.ndarray,
    units: np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the means (…) over the rows of `values` (row, …) and their percentile intervals (…, 2).

    units: (row,) labels of what is drawn anew, e.g. the prompt of each row: rows of one unit are drawn
    together, since they are not independent. NaN entries are left out; with fewer than two units having a
    value, the interval is NaN. `statistic` makes something of means (draw, …) of the same shape, such as their
    ratio to the last: that and its interval are returned. Deterministic for a given `seed`. Source: Efron and
    Tibshirani 1993, chapter 13 (percentile interval).

    >>> mean, interval = mean_interval(np.array([[1.0], [2.0], [3.0]]), np.arange(3))
    >>> mean.tolist(), bool(interval[0, 0] < 2 < interval[0, 1])
    ([2.0], True)
    """
    _, unit = np.unique(units, return_inverse=True)
    flat = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    there = np.isfinite(flat)
    number = int(unit.max()) + 1 if len(unit) else 0
    sums, counts = np.zeros((number, flat.shape[1])), np.zeros((number, flat.shape[1]))
    np.add.at(sums, unit, np.where(there, flat, 0))
    np.add.at(counts, unit, there)
    random = np.random.default_rng(seed)
    drawn = []
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / counts.sum(0)
        for start in range(0, resamples if number else 0, AT_ONCE):
            size = min(AT_ONCE, resamples - start)
            times = random.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64)
            means = ((times @ sums) / (times @ counts)).reshape(size, *values.shape[1:])
            drawn.append(statistic(means).reshape(size, -1))
    interval = np.full((flat.shape[1], 2), np.nan)
    enough = (counts > 0).sum(0) >= 2
    if drawn and enough.any():
        tail = (1 - level) / 2
        known = np.concatenate(drawn)[:, enough]
        known[:, ~np.isfinite(known).any(0)] = np.nan
        with warnings.catch_warnings():  # a statistic that is never defined has no interval
            warnings.simplefilter("ignore", RuntimeWarning)
            interval[enough] = np.nanquantile(known, [tail, 1 - tail], axis=0).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return statistic(mean.reshape(1, *values.shape[1:]))[0], interval.reshape(*values.shape[1:], 2)


def units_of(ds: xr.Dataset, dim: str = "sample") -> np.ndarray:
    """Return what a bootstrap over `dim` draws anew: the prompts, or the samples themselves if they share one prompt.

    >>> from interp.stores import synthetic_run
    >>> units_of(synthetic_run(samples=3).probe("frequency_energy")).tolist()
    [0, 1, 2]
    """
    prompts = ds["prompt_id"].values if "prompt_id" in ds.coords and ds["prompt_id"].dims == (dim,) else None
    return prompts if prompts is not None and len(np.unique(prompts)) > 1 else np.arange(ds.sizes[dim])
