"""Scores: what needs a model to be computed is written into the run as data, so that probes only read."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from interp.errors import InterpError, nearest, sentence_list
from interp.stores import Run, open_run

Metric = Callable[[np.ndarray, list[str]], np.ndarray]
"""(images uint8 (sample, height, width, rgb), texts) → one number a sample."""

X0 = "x0"
CLIP_MODEL = "openai/clip-vit-base-patch32"


def score(
    run: Run | str | PathLike[str],
    metrics: Sequence[str] = ("clip", "judge"),
    *,
    clip_model: str | None = None,
    pipe: Any = None,
    steps: Any = None,
) -> Run:
    """Score the pictures of a run against its texts and write `/scores (sample, metric)`; or decode x̂0.

    Args:
        run: A run or its path.
        metrics: `clip` (cosine of picture and text in CLIP) and `judge` (share of the attributes that the text names
            and the attribute judge of `scenes` sees; for runs of `scenes`). A metric alone scores the prompt, and
            the column `target` if there is one; `clip:target` scores against one column. `x0` is no number: it decodes
            what the model predicted the clean picture to be, at each step, into the node `x0` (`run.x0`).
        clip_model: Hub id of the CLIP; default is the one `scenes` was trained with for its runs, else
            openai/clip-vit-base-patch32.
        pipe: For `x0`: the pipeline whose autoencoder decodes; default is the run's own, loaded again.
        steps: For `x0`: which steps, as `Capture.steps` (a slice, a list, a share); default is all.

    Returns:
        The run, with its scores; metric names are `<metric>:<column>`.

    Raises:
        InterpError: no pictures were captured, or the metric or column does not exist.

    >>> import interp
    >>> run = interp.score(interp.trace("scenes", "a red circle", steps=2, progress=False), ["clip"])
    >>> list(run.scores.metric.values)
    ['clip:prompt']
    """
    run = run if isinstance(run, Run) else open_run(run)
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if X0 in metrics:
        from interp.x0 import write_x0

        write_x0(run, pipe, steps)
        metrics = [m for m in metrics if m != X0]
        run = run if run.path is None else open_run(run.path)
        if not metrics:
            return run
    done = np.flatnonzero(run.samples["status"].to_numpy() == 1)
    wanted = _expand(run, metrics)
    if not len(done):
        raise InterpError("the run has no finished sample to score")
    images = np.asarray(run.isel(sample=done).images.values)
    bundled = dict(run.attrs.get("pipeline") or {}).get("id") == "scenes"
    results = {}
    for name, column in wanted:
        values = np.full(len(run), np.nan, "float32")
        texts = [str(t) for t in run.samples[column].to_numpy()[done]]
        values[done] = _metric(name, bundled, clip_model)(images, texts)
        results[f"{name}:{column}"] = values
    run.write_scores(results)
    return run if run.path is None else open_run(run.path)


def _expand(run: Run, metrics: Sequence[str]) -> list[tuple[str, str]]:
    columns = [c for c in run.samples.columns if run.samples[c].map(lambda v: isinstance(v, str)).all()]
    known = ("clip", "judge", X0)
    found = []
    for metric in metrics:
        name, _, column = metric.partition(":")
        if name not in known:
            raise InterpError(f"no metric named {name!r}{nearest(name, known)}; there are {sentence_list(known)}")
        if column and column not in columns:
            raise InterpError(
                f"{metric!r} scores against the column {column!r}, which the prompt table lacks{nearest(column, columns)}; "
                f"its texts are in {sentence_list(columns)}"
            )
        found += [(name, c) for c in ([column] if column else [c for c in ("prompt", "target") if c in columns])]
    return found


def _metric(name: str, bundled: bool, clip_model: str | None) -> Metric:
    if name == "judge":
        if not bundled:
            raise InterpError("the attribute judge knows the pictures of 'scenes' only; score other models with 'clip'")
        from interp.scenes import agreement

        return agreement
    if bundled and clip_model is None:
        from interp.scenes import alignment

        return alignment
    return _hub_clip(clip_model or CLIP_MODEL)


def _hub_clip(name: str) -> Metric:
    """CLIPScore (Hessel et al. 2021) without its factor 2.5: the raw cosine, as T2I-CompBench has it."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    try:
        model: Any = CLIPModel.from_pretrained(name).eval()
        processor: Any = CLIPProcessor.from_pretrained(name)
    except Exception as error:  # the Hub client raises a dozen types for "not there"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InterpError(f"cannot load the CLIP model {name!r} ({first}); name another by clip_model") from error

    @torch.no_grad()
    def cosine(images: np.ndarray, texts: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), 32):
            part = slice(start, start + 32)
            inputs = processor(
                text=texts[part], images=list(images[part]), return_tensors="pt", padding=True, truncation=True
            )
            out = model(**inputs)
            found.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).numpy())
        return np.concatenate(found)

    return cosine
