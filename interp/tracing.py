"""`interp.trace`: run a pipeline over prompts × seeds × conditions and record it."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from interp.capture import Capture
from interp.errors import InterpError
from interp.families import find_family
from interp.hooks import HookRegistry
from interp.interventions import Intervention, attach_all
from interp.loading import load
from interp.plan_arguments import Conditions
from interp.planning import Plan, plan
from interp.recorder import Recorder, pictures
from interp.stores import Run, RunWriter, create_run


@dataclass(frozen=True)
class BatchDone:
    """Handed to `progress` after each batch: its condition, how many samples, and the wall seconds they took."""

    condition: str
    samples: int
    seconds: float


def trace(
    pipe: Any,
    prompts: Any,
    *,
    seeds: Sequence[int] | int = 0,
    steps: int = 50,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    capture: Capture | None = None,
    interventions: Sequence[Intervention] | None = None,
    conditions: Conditions | None = None,
    batch_size: int | Literal["auto"] = "auto",
    options: Mapping[str, Any] | None = None,
    store: str | PathLike[str] | None = None,
    scores: Sequence[str] = (),
    progress: bool | Callable[[BatchDone], None] = True,
) -> Run:
    """Generate and record samples = conditions × prompts × seeds; the pictures are bit-equal to untraced ones.

    Args:
        pipe: A diffusers pipeline, or what `interp.load` accepts.
        prompts: Text, a list of texts, or a table (list of dicts, DataFrame, CSV or JSON-lines file) with a column
            `prompt`, optionally `negative_prompt`, and any others, which interventions may name: `"{target}"`.
        seeds: One CPU generator a sample: the same noise on every device and in every condition.
        steps: Sampling steps.
        guidance_scale: Scale w of classifier-free guidance u + w·(c − u); default is the model's own.
        height, width: Picture size in pixels; default is the model's own.
        negative_prompt: For rows that name none.
        capture: What to keep; default: cross-attention (head mean, prompt tokens), latents, noise, pictures.
        interventions: Changes of the run, in order of application: one condition, named `intervened`.
        conditions: Several by name, e.g. `{"baseline": [], "late": [interp.RemoveText(start=0.6)]}`.
        batch_size: Samples that run together.
        options: Further arguments of the pipeline's call, e.g. `{"guidance_rescale": 0.7}`; JSON values.
        store: Path of the run; an existing run of the same plan is resumed, anything else refused. None keeps it
            in memory.
        scores: Metrics to add, see `interp.score`.
        progress: Show a progress bar; or a function that is called after each batch.

    Returns:
        The run; `run.tree` is an ordinary `xr.DataTree`.

    Raises:
        InterpError: a user's mistake, in one sentence, before anything runs.

    >>> import interp
    >>> run = interp.trace("scenes", "a red circle", steps=2, progress=False)
    >>> run.latents.dims
    ('sample', 'step', 'channel', 'y', 'x')
    """
    pipe = load(pipe) if isinstance(pipe, str) else pipe
    planned = plan(
        pipe, prompts, seeds=seeds, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
        negative_prompt=negative_prompt, capture=capture, interventions=interventions, conditions=conditions,
        batch_size=batch_size, options=options,
    )  # fmt: skip
    scores = _listed(scores)
    if not isinstance(store, str | PathLike | None):
        raise InterpError(f"store={store!r}: give the path of the run, or None to keep it in memory")
    if scores:
        check_scores(planned, scores)
    with create_run(store, planned.layout) as writer:
        _run_all(pipe, planned, writer, progress)
    run = writer.run
    if scores:
        from interp.scoring import score

        run = score(run, scores, progress=progress is True)
    return run


def _listed(scores: Any) -> list[Any]:
    if scores is None or isinstance(scores, str) or callable(scores):
        return [] if scores is None else [scores]
    if not isinstance(scores, Sequence):
        raise InterpError(f"scores={scores!r}: give names of metrics, e.g. ['clip']")
    return list(scores)


def check_scores(planned: Plan, scores: Sequence[Any]) -> None:
    """Raise InterpError for metrics that the run of this plan could not be given, before it is made."""
    import pandas as pd

    from interp.scoring import X0, check_metrics

    if not planned.capture.image:
        raise InterpError(f"scores={list(scores)}: metrics look at pictures, and Capture(image=False) keeps none")
    check_metrics(pd.DataFrame(planned.layout.samples), [m for m in scores if m != X0])


def _run_all(pipe: Any, planned: Plan, writer: RunWriter, progress: bool | Callable[[BatchDone], None]) -> None:
    done = writer.status == 1
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        with tqdm(total=len(planned), initial=int(done.sum()), unit="sample", disable=progress is not True) as bar:
            for batch in planned.batches:
                waiting = [i for i in batch if not done[i]]
                if waiting:
                    condition = planned.layout.samples["condition"][batch[0]]
                    bar.set_description(condition)
                    began = time.perf_counter()
                    run_batch(pipe, planned, writer, batch, waiting)
                    bar.update(len(waiting))
                    if callable(progress):
                        progress(BatchDone(condition, len(batch), time.perf_counter() - began))
    finally:
        pipe.set_progress_bar_config(**quiet)


def run_batch(
    pipe: Any,
    planned: Plan,
    writer: RunWriter,
    batch: list[int],
    waiting: Collection[int],
    places: Sequence[int] | None = None,
) -> None:
    """Run one batch of the plan and write the samples that are waiting.

    The whole batch is computed even if some of it is done: a sample's rounding depends on its batch, and a run must
    be bit-equal however often it was interrupted. Where `places[k]` is another sample than `batch[k]`, the latter
    stands in for it, so that the batch keeps its size without a sample that fails.
    """
    columns = planned.layout.samples
    changes = planned.conditions[columns["condition"][batch[0]]]
    with HookRegistry(pipe) as hooks:
        attach_all(changes, hooks, planned.batch(batch))
        recorder = Recorder(hooks, writer, planned, batch, waiting, places)
        recorder.begin()
        output = pipe(**call_arguments(pipe, planned, batch))
        recorder.finish(pictures(output) if planned.capture.image else None)


def call_arguments(pipe: Any, planned: Plan, batch: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of the pipeline's own call for some samples of a plan: what an untraced call would get."""
    columns = planned.layout.samples
    family = find_family(pipe)
    negatives = [columns["negative_prompt"][i] for i in batch]
    asked = family.run_arguments(
        planned.guidance_scale, negatives, planned.options, any_negative=any(columns["negative_prompt"])
    )
    return family.call_arguments({
        "prompt": [columns["prompt"][i] for i in batch],
        "num_inference_steps": planned.steps,
        "height": planned.height,
        "width": planned.width,
        "generator": [torch.Generator("cpu").manual_seed(columns["seed"][i]) for i in batch],
        "output_type": "pil" if planned.capture.image else "latent",
        **asked,
    })  # fmt: skip
