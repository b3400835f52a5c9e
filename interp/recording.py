"""`interp.record`: record whatever a pipeline does inside a context."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.capture import Capture, default_capture
from interp.errors import InterpError, sentence_list
from interp.families import find_family
from interp.hooks import HookRegistry
from interp.overriding import override_call
from interp.planning import Plan, assemble
from interp.prompts import PromptTable
from interp.recorder import Recorder, pictures
from interp.stores import Run, RunWriter, TokenTable, create_run
from interp.token_columns import TokenSelection


@contextmanager
def record(
    pipe: Any,
    store: str | PathLike[str] | None = None,
    *,
    capture: Capture | None = None,
    condition: str = "recorded",
) -> Iterator["Recording"]:
    """Record whatever the pipeline does inside the context; each call appends its samples.

    Args:
        pipe: A diffusers pipeline; call it as always.
        store: Path of a new run, or None to keep it in memory.
        capture: What to keep.
        condition: Name of the samples' condition.

    Yields:
        Recording: its `run` is the run with all samples so far.

    Raises:
        InterpError: something is at `store` already; a call gives no prompt text, or differs from the first one in
            steps, size or guidance; or attention could not be observed.

    >>> import interp
    >>> pipe = interp.load("scenes")
    >>> with interp.record(pipe) as recording:
    ...     _ = pipe("a red circle", num_inference_steps=2)
    >>> recording.run.latents.sizes["step"]
    2
    """
    if store is not None and Path(store).exists():
        raise InterpError(
            f"{str(store)!r} exists already, and interp.record starts a new run; choose another path, or use "
            "interp.trace, which resumes"
        )
    recording = Recording(store, capture or default_capture(pipe), condition)
    undo = override_call(pipe, recording.call)
    try:
        yield recording
    finally:
        undo()
        recording.close()


class Recording:
    """The run that `interp.record` is writing."""

    def __init__(self, store: str | PathLike[str] | None, capture: Capture, condition: str) -> None:
        self._store, self._capture, self._condition = store, capture, condition
        self._writer: RunWriter | None = None
        self._plan: Plan | None = None

    @property
    def run(self) -> Run:
        """The run with all samples recorded so far."""
        if self._writer is None:
            raise InterpError("nothing was recorded: the pipeline was not called inside interp.record")
        self._writer.drain()
        return self._writer.run

    def call(self, pipe: Any, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run the pipeline's own call and record it."""
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.apply_defaults()
        capture = self._capture
        if bound.arguments.get("output_type") == "latent":
            capture = Capture(**{**{f: getattr(capture, f) for f in capture.__dataclass_fields__}, "image": False})
        plan, samples = self._next(_call_plan(pipe, capture, bound.arguments, self._condition))
        assert self._writer is not None
        with HookRegistry(pipe) as hooks, hooks.pipeline_call(run, args, kwargs):
            recorder = Recorder(hooks, self._writer, plan, samples)
            recorder.begin()
            output = run(*args, **kwargs)
            recorder.finish(pictures(output) if plan.capture.image else None)
        return output

    def _next(self, plan: Plan) -> tuple[Plan, list[int]]:
        """Start the run with the first call's samples, or append another call's."""
        if self._writer is None or self._plan is None:
            self._writer, self._plan = create_run(self._store, plan.layout), plan
            return plan, list(range(len(plan)))
        for name in ("steps", "guidance_scale", "height", "width", "capture"):
            there, asked = getattr(self._plan, name), getattr(plan, name)
            if there != asked:
                raise InterpError(
                    f"one run holds samples of equal plan: the first call had {name}={there!r}, this one {asked!r}; "
                    "record it into another run"
                )
        columns = dict(plan.layout.samples)
        before = len(self._writer)
        columns["prompt_id"] = [before + p for p in columns["prompt_id"]]
        columns["batch"] = [max(self._plan.layout.samples["batch"]) + before + b for b in columns["batch"]]
        tables = {n: TokenTable.of(group) for n, group in plan.layout.groups.items() if "token_id" in group.coords}
        samples = list(self._writer.grow(columns, tables))
        return _moved(plan, self._plan, samples), samples

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.close()


def _moved(plan: Plan, first: Plan, samples: list[int]) -> Plan:
    """Give an appended call's plan the run's token columns and sample numbers."""
    old = plan.selection
    positions = np.full((samples[-1] + 1, first.selection.width), -1)
    own = old.width - (old.pads is not None)  # the last column is the summed padding
    positions[samples, :own] = np.asarray(old.positions)[:, :own]
    pads = None
    if old.pads is not None:
        pads = np.zeros((samples[-1] + 1, old.pads.shape[1]), bool)
        pads[samples] = np.asarray(old.pads)
    before = samples[0]  # whose tokens are not looked at again
    tokens, negatives = plan.tokens.after(before), plan.negatives.after(before)
    texts = [[""] * before + some for some in plan.texts]
    return replace(
        plan, selection=TokenSelection(positions, pads, old.table), layout=first.layout, tokens=tokens, negatives=negatives,
        texts=(texts[0], texts[1]),
    )  # fmt: skip


def _fresh_seed(generator: torch.Generator | None) -> int:
    """The seed whose noise the sample gets; -1 if unknown: no generator, or one that was used before."""
    if generator is None:
        return -1
    seed = int(generator.initial_seed())
    fresh = torch.Generator(generator.device).manual_seed(seed).get_state()
    return seed if torch.equal(fresh, generator.get_state()) else -1


def _call_plan(pipe: Any, capture: Capture, arguments: dict[str, Any], condition: str) -> Plan:
    """Read a pipeline call's own arguments."""
    prompt = arguments.get("prompt")
    if prompt is None:
        raise InterpError(
            "interp.record needs the prompt as text (prompt=…), to label the tokens; embeddings have none"
        )
    if any(arguments.get(name) is not None for name in ("timesteps", "sigmas")):
        raise InterpError("interp.record follows whole sampling runs; custom timesteps and sigmas are not supported")
    others = [
        n for n in arguments if n.startswith(("prompt_", "negative_prompt_")) and n[-1].isdigit() and arguments[n]
    ]
    if others:
        raise InterpError(
            f"interp.record labels the tokens of one prompt, but the call gives {sentence_list(others)} beside it; leave "
            "them out"
        )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negative = arguments.get("negative_prompt") or ""
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    per = int(arguments.get("num_images_per_prompt") or 1)
    generator = arguments.get("generator")
    generators = generator if isinstance(generator, list) else [generator] * len(prompts) * per
    order = [p for p in range(len(prompts)) for _ in range(per)]
    family = find_family(pipe)
    height, width = family.picture_size(arguments)
    return assemble(
        pipe,
        columns=family.text_length(arguments) + (capture.tokens != "all"),  # later calls may have longer prompts
        arguments=arguments,
        capture=capture,
        table=PromptTable({"prompt": prompts, "negative_prompt": negatives}),
        samples={
            "prompt": [prompts[p] for p in order],
            "negative_prompt": [negatives[p] for p in order],
            "seed": [_fresh_seed(g) if isinstance(generator, list) or len(order) == 1 else -1 for g in generators],
            "condition": [condition] * len(order),
            "prompt_id": order,
            "batch": [0] * len(order),
        },
        batches=[list(range(len(order)))],
        conditions={condition: []},
        steps=int(arguments["num_inference_steps"]),
        guidance=float(arguments.get(family.guidance_argument) or 1),
        height=height,
        width=width,
    )
