"""Means of scores for each condition, with bootstrap intervals."""

import numpy as np
import pandas as pd
import xarray as xr

from interp.probes.bootstrap import mean_interval
from interp.stores import Run


def mean_scores(run: Run, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> xr.Dataset:
    """Return the mean of each metric over the samples of each condition, with its bootstrap interval.

    Prompts are drawn anew, all seeds of one together; of a single prompt, samples are. Returns `mean` (condition, metric),
    `interval` (condition, metric, bound) and `count` (condition, metric), the samples that have a value.

    Raises InterpError if the run has no scores.

    >>> from interp.stores import synthetic_run
    >>> ds = mean_scores(synthetic_run(samples=3, conditions=("baseline", "late")))
    >>> ds["mean"].dims, ds["condition"].values.tolist()
    (('condition', 'metric'), ['baseline', 'late'])
    """
    scores, samples = run.scores, run.samples
    values = np.asarray(scores.values, dtype=np.float64)
    means, intervals, counts = [], [], []
    for condition in run.conditions:
        chosen = (samples["condition"] == condition).to_numpy()
        prompts = samples["prompt_id"].to_numpy()[chosen]
        units = prompts if len(np.unique(prompts)) > 1 else np.arange(len(prompts))
        mean, interval = mean_interval(values[chosen], units, resamples=resamples, level=level, seed=seed)
        means.append(mean)
        intervals.append(interval)
        counts.append(np.isfinite(values[chosen]).sum(0))
    dims = ("condition", "metric")
    units_text = {"units": "the metric's own"}
    return xr.Dataset(
        {
            "mean": (dims, np.array(means), units_text),
            "interval": ((*dims, "bound"), np.array(intervals), units_text),
            "count": (dims, np.array(counts), {"units": "samples"}),
        },
        {"condition": run.conditions, "metric": [str(m) for m in scores["metric"].values], "bound": ["low", "high"]},
        {"level": level, "resamples": resamples, "seed": seed},
    )


def table(ds: xr.Dataset, by_condition: dict[str, dict[str, dict[str, float]]] | None = None) -> str:
    """Return means as text: a line a metric and condition, `mean [low, high]` and the number of samples.

    by_condition: as in the attributes of `/scores`, metrics of a condition as a whole; they have no interval.
    """
    rows = []
    for metric in ds["metric"].values:
        for condition in ds["condition"].values:
            one = ds.sel(metric=metric, condition=condition)
            low, high = one["interval"].values
            interval = f"[{low:.3f}, {high:.3f}]" if np.isfinite(low) else "–"
            rows.append((metric, condition, f"{float(one['mean']):.3f}", interval, int(one["count"])))
    for metric, found in (by_condition or {}).items():
        rows += [(metric, c, f"{v['value']:.3f}", "–", int(v["samples"])) for c, v in found.items()]
    percent = f"{100 * ds.attrs['level']:g} % interval"
    return pd.DataFrame(rows, columns=["metric", "condition", "mean", percent, "samples"]).to_string(index=False)
