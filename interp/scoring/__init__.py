"""Scores: what needs a model to be computed is written into the run as data, so that probes only read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from interp.errors import InterpError
from interp.scoring.against import againsts, paired, pictures
from interp.scoring.means import mean_scores
from interp.scoring.metric import Metric, check_options, find_metric, list_metrics, values_of
from interp.stores import Run, open_run

__all__ = ["check_metrics", "find_metric", "list_metrics", "mean_scores", "score"]

X0 = "x0"
BATCH = 32
"""Pictures that are read and scored together."""


def score(
    run: Run | str | PathLike[str],
    metrics: Sequence[str | Callable[..., Any]] | str | Callable[..., Any] | None = None,
    *,
    pipe: Any = None,
    steps: Any = None,
    batch_size: int = BATCH,
    again: bool = False,
    progress: bool = False,
    **options: Any,
) -> Run:
    """Score the pictures of a run and write `/scores (sample, metric)`; or decode x̂0.

    Args:
        run: A run or its path.
        metrics: Names, alone or with what is measured against: `clip:target` against the texts of a column of the
            prompt table, `l1:baseline` against the pictures of a condition with the same prompt and seed. Alone, a
            metric of texts scores `prompt`, and `target` if there is one; one of pictures compares with `baseline`.
            Built in are `clip`, `clip_image`, `judge`, `blip_vqa`, `l1`, `ssim`, `lpips` and `fid` (`interp score
            --list` says what each measures); or a file of yours, `my_metric.py:name`; or a function. `x0` is no number:
            it decodes what the model predicted the clean picture to be, at each step, into the node `x0` (`run.x0`).
            None is `clip`, and `judge` for runs of `scenes`.
        pipe: For `x0`: the pipeline whose autoencoder decodes; default is the run's own, loaded again.
        steps: For `x0`: which steps, as `Capture.steps` (a slice, a list, a share); default is all.
        batch_size: Pictures that are read and scored together; no more are held.
        again: Compute anew what is there. Otherwise only samples without a value are scored, unless the metric's file,
            version or options changed.
        progress: Show a progress bar.
        options: Options of the metrics, such as `clip_model="openai/clip-vit-base-patch32"`.

    Returns:
        The run with its scores, named `<metric>:<column or condition>`, in the metric's own unit. A metric is written
        as soon as it is finished. What is measured on a condition as a whole (`fid`) is in
        `run.tree["scores"].attrs["by_condition"]`, metric → condition → value.

    Raises:
        InterpError: no pictures were captured; a metric, column, condition or option does not exist; a package or model
            that a metric needs is not there; a metric failed.

    >>> import interp
    >>> run = interp.score(interp.trace("scenes", "a red circle", steps=2, progress=False), ["clip"])
    >>> list(run.scores.metric.values)
    ['clip:prompt']
    """
    run = run if isinstance(run, Run) else open_run(run)
    asked = _asked(run, metrics)
    if X0 in asked:
        from interp.x0 import write_x0

        write_x0(run, pipe, steps)
        asked = [m for m in asked if m != X0]
        run = run.reopened()
        if not asked:
            return run
    if batch_size < 1:
        raise InterpError(f"batch_size={batch_size}: give a whole number of pictures, at least 1")
    if not (run.samples["status"].to_numpy() == 1).any():
        raise InterpError("the run has no finished sample to score")
    _ = run.images  # says how to get pictures if there are none, before a model is loaded
    wanted = check_metrics(run.samples, asked, options)
    for metric, one in wanted:
        (_by_condition if metric.whole else _by_sample)(run, metric, one, batch_size, again, progress)
    return run.reopened() if wanted else run


def check_metrics(
    samples: pd.DataFrame, metrics: Sequence[Any], options: Mapping[str, Any] | None = None
) -> list[tuple[Metric, str]]:
    """Return each metric with what it is measured against; `samples` is the table of a run, or of one that is planned.

    Raises InterpError for a metric, column, condition or option that does not exist.
    """
    found = [(find_metric(name, options), against) for name, against in map(_parted, metrics)]
    check_options([metric for metric, _ in found], options or {})
    return [(metric, one) for metric, against in found for one in againsts(samples, metric, against)]


def _asked(run: Run, metrics: Any) -> list[Any]:
    if metrics is None:
        bundled = dict(run.attrs.get("pipeline") or {}).get("id") == "scenes"
        return ["clip", "judge"] if bundled else ["clip"]
    return [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)


def _parted(name: Any) -> tuple[Any, str]:
    """Take apart `metric:column`, also of a file: `my_metric.py:name:column`."""
    if not isinstance(name, str):
        return name, ""
    file, dot, rest = name.rpartition(".py:")
    if dot:
        metric, _, against = rest.partition(":")
        return f"{file}.py:{metric}", against
    metric, _, against = name.partition(":")
    return metric, against


def _by_sample(run: Run, metric: Metric, against: str, batch_size: int, again: bool, progress: bool) -> None:
    name = _named(metric, against)
    values, rows = _missing(run, metric, name, again)
    rows, partners = paired(run, metric, against, rows)
    if not len(rows):
        return
    compute = metric.made(run)
    for part, facing in _batches(run, metric, rows, partners, batch_size, name, progress):
        found = _tried(metric, compute, pictures(run, rows[part]), *facing)
        values[rows[part]] = values_of(metric, found, len(rows[part]))
    run.write_scores({name: values}, {"made_by": {name: metric.made_by}})


def _by_condition(run: Run, metric: Metric, against: str, batch_size: int, again: bool, progress: bool) -> None:
    name, samples = _named(metric, against), run.samples
    there = {} if again else _there(run, metric, name)
    found: dict[str, dict[str, float]] = {}
    for condition in run.conditions:
        rows = np.flatnonzero(((samples["condition"] == condition) & (samples["status"] == 1)).to_numpy())
        if not len(rows) or (metric.wants == "references" and condition == against):
            continue
        rows, partners = paired(run, metric, against, rows)
        if there.get(condition, {}).get("samples") == len(rows):
            found[condition] = there[condition]
            continue
        compute = metric.made(run)
        for part, facing in _batches(run, metric, rows, partners, batch_size, f"{name} of {condition}", progress):
            _tried(metric, compute.update, pictures(run, rows[part]), *facing)
        found[condition] = {"value": float(_tried(metric, compute.compute)), "samples": len(rows)}
    if not found:
        raise InterpError(
            f"metric {metric.name!r} needs a condition beside {against!r}; this run has no other finished one"
        )
    if found != there:
        run.write_scores({}, {"made_by": {name: metric.made_by}, "by_condition": {name: found}})


def _there(run: Run, metric: Metric, name: str) -> dict[str, dict[str, float]]:
    """Return what is known of each condition, if it was made in this way."""
    attrs = run.tree["scores"].attrs if "scores" in run.tree.children else {}
    same = bool(metric.origin) and attrs.get("made_by", {}).get(name) == metric.made_by
    return dict(attrs.get("by_condition", {}).get(name, {})) if same else {}


def _named(metric: Metric, against: str) -> str:
    return f"{metric.name}:{against}" if against else metric.name


def _missing(run: Run, metric: Metric, name: str, again: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores that are there, float32 (sample,), NaN where there is none, and the samples to be scored."""
    done = run.samples["status"].to_numpy() == 1
    values = np.full(len(run), np.nan, "float32")
    node = run.tree["scores"].to_dataset() if "scores" in run.tree.children else None
    if node is None or name not in node["metric"].values.tolist():
        return values, np.flatnonzero(done)
    same = bool(metric.origin) and dict(node.attrs.get("made_by") or {}).get(name) == metric.made_by
    if same and not again:
        values = np.asarray(node["score"].sel(metric=name).values, "float32").copy()
    elif not same and _others(run):
        raise InterpError(
            f"the scores {name!r} of the other samples were made by another version or with other options: score the "
            "whole run, not a selection"
        )
    return values, np.flatnonzero(done & ~np.isfinite(values))


def _batches(
    run: Run, metric: Metric, rows: np.ndarray, partners: list[Any] | None, size: int, text: str, progress: bool
) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Yield slices of `rows` and what a metric is given beside the pictures there: texts, pictures, or nothing."""
    with tqdm(total=len(rows), desc=text, unit="picture", disable=not progress) as bar:
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            facing = None if partners is None else partners[part]
            if facing is None:
                yield part, ()
            else:
                yield part, (pictures(run, facing) if metric.wants == "references" else facing,)
            bar.update(len(rows[part]))


def _tried(metric: Metric, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a metric; whatever goes wrong in one is said in a sentence that names it."""
    try:
        return call(*arguments)
    except InterpError:
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise InterpError(f"metric {metric.name!r} failed: {type(error).__name__}: {first}") from error


def _others(run: Run) -> bool:
    """Whether this is a selection of a stored run that has further samples."""
    return run.path is not None and len(open_run(run.path)) > len(run)
