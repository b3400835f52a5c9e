"""Bootstrap intervals of means over pairs."""

from __future__ import annotations

import numpy as np

AT_ONCE = 250  # resamples per block: bounds the memory to AT_ONCE × rows


def mean_interval(
    values: np.ndarray, units: np.ndarray, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the means (…) over the rows of `values` (row, …) and their percentile intervals (…, 2).

    units: (row,) labels of what is drawn anew, e.g. the prompt of each row: rows of one unit are drawn
    together, since they are not independent. NaN entries are left out; with fewer than two units having a
    value, the interval is NaN. Deterministic for a given `seed`. Source: Efron and Tibshirani 1993, chapter
    13 (percentile interval).

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
            drawn.append((times @ sums) / (times @ counts))
    interval = np.full((flat.shape[1], 2), np.nan)
    enough = (counts > 0).sum(0) >= 2
    if drawn and enough.any():
        tail = (1 - level) / 2
        interval[enough] = np.nanquantile(np.concatenate(drawn)[:, enough], [tail, 1 - tail], axis=0).T
    return mean.reshape(values.shape[1:]), interval.reshape(*values.shape[1:], 2)
