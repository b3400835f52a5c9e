"""What the pictures of a run are measured against: texts of its table, pictures of another condition, or nothing."""

from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError, nearest, sentence_list
from interp.scoring.metric import Metric
from interp.stores import Run

BASELINE = "baseline"
Pairs = tuple[np.ndarray, list[Any] | None]
"""Positions of samples, and what each is compared with: its text, or the position of its reference."""


def againsts(samples: pd.DataFrame, metric: Metric, wanted: str) -> list[str]:
    """Return the columns or the condition that a metric is to be measured against; `wanted` is "" for the default.

    `samples` is a run's table, or that of a plan.

    Raises InterpError for a column or a condition that is not there.
    """
    if not metric.wants:
        if wanted:
            raise InterpError(f"metric {metric.name!r} looks at pictures alone: ask for it without {':' + wanted!r}")
        return [""]
    if metric.wants == "references":
        condition, conditions = wanted or BASELINE, [str(c) for c in dict.fromkeys(samples["condition"])]
        if condition not in conditions:
            raise InterpError(
                f"metric {metric.name!r} compares with the pictures of the condition {condition!r}, where this run has "
                f"{sentence_list(conditions)}: write {metric.name}:CONDITION{nearest(condition, conditions)}"
            )
        return [condition]
    columns = [c for c in samples.columns if samples[c].map(lambda v: isinstance(v, str)).all()]
    if wanted and wanted not in columns:
        raise InterpError(
            f"'{metric.name}:{wanted}' scores against the column {wanted!r}, which the prompt table lacks"
            f"{nearest(wanted, columns)}; its texts are in {sentence_list(columns)}"
        )
    return [wanted] if wanted else [c for c in ("prompt", "target") if c in columns]


def paired(run: Run, metric: Metric, against: str, rows: np.ndarray) -> Pairs:
    """Return the samples among `rows` that have something to be compared with, and that.

    References are of the same prompt and seed. Raises InterpError if no sample has one.
    """
    if not metric.wants:
        return rows, None
    samples = run.samples
    if metric.wants == "texts":
        texts = samples[against].to_numpy()
        return rows, [str(texts[r]) for r in rows]
    keys = list(zip(samples["prompt_id"], samples["prompt"], samples["seed"], strict=True))
    usable = (samples["condition"] == against).to_numpy() & (samples["status"] == 1).to_numpy()
    partner = {keys[r]: int(r) for r in np.flatnonzero(usable)[::-1]}
    kept = np.array([r for r in rows if keys[r] in partner], dtype=int)
    if len(rows) and not len(kept):
        raise InterpError(
            f"metric {metric.name!r}: no sample has a finished sample of the condition {against!r} with its prompt and seed"
        )
    return kept, [partner[keys[r]] for r in kept]


def pictures(run: Run, rows: Any) -> np.ndarray:
    """Return the pictures at these positions, uint8 (sample, height, width, rgb), reading only them."""
    at = np.asarray(rows)
    order = np.unique(at)
    some: Any = slice(int(order[0]), int(order[-1]) + 1) if order[-1] - order[0] + 1 == len(order) else order
    read = np.asarray(run.images.isel(sample=some).values)
    return read[np.searchsorted(order, at)]
