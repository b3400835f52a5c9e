"""Recording: what passes by becomes samples of a run store. `Recorder` does it for a batch, `record` for any call."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.capture import Capture
from interp.catalog import text_length
from interp.clock import StepEnd
from interp.errors import InterpError
from interp.families import find_family
from interp.hooks import At, DenoiserCall, HookRegistry, Prediction
from interp.kernels import AttentionCall
from interp.outbox import Outbox
from interp.planning import Plan, assemble, attention_groups, site_node
from interp.prompts import PromptTable
from interp.reduction import AttentionReducer
from interp.stores import Run, RunWriter, create_run
from interp.tokens import TokenSelection

BRANCHES = ("cond", "uncond")


class Recorder:
    """Write one batch of samples, from the first step to the pictures; reads only, so the image is untouched.

    Query and key of a step are kept until the step ends; then probabilities are formed once per group of layers,
    reduced on the device, copied asynchronously, and written from the background. Nothing grows with the steps.
    """

    def __init__(
        self,
        hooks: HookRegistry,
        writer: RunWriter,
        plan: Plan,
        samples: Sequence[int],
        waiting: Sequence[int] | None = None,
    ) -> None:
        self.hooks, self.writer, self.plan, self.samples = hooks, writer, plan, list(samples)
        self.waiting = set(samples if waiting is None else waiting)  # the others are done: computed, not written
        capture, columns = plan.capture, plan.selection
        pads = None if columns.pads is None else columns.pads[self.samples]
        selection = TokenSelection(columns.positions[self.samples], pads, columns.table)
        self._kept = set(capture.chosen_steps(len(plan.timeline)))
        self._groups = attention_groups(plan.attention)
        self._reducers = {
            name: AttentionReducer(
                members[0].grid,
                None if capture.heads == "mean" else capture.chosen_heads(members[0].heads),
                None if members[0].kind == "self" else selection,
                getattr(torch, capture.dtype),
            )
            for name, members in self._groups.items()
        }
        self._calls: dict[str, tuple[AttentionCall, DenoiserCall]] = {}
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        self._noise: dict[str, torch.Tensor] = {}
        self._text: dict[str, torch.Tensor] = {}
        self._evaluated: tuple[str, ...] = ()
        self._passes = dict.fromkeys(BRANCHES, 0)
        self._final: torch.Tensor | None = None
        self._steps = 0
        self._outbox = Outbox()
        self._attach()

    def _attach(self) -> None:
        for site in self.plan.attention:
            self.hooks.on_attention(site, self._on_attention)
        for wanted in self.plan.sites:
            self.hooks.read(wanted.site, self._on_site)
        self.hooks.on_prediction(self._on_prediction)
        self.hooks.on_step(self._on_step)
        if self.plan.capture.text:
            self.hooks.on_call(self._on_call)

    def begin(self) -> None:
        """Start the samples; what an earlier attempt left of them is dropped."""
        for i in sorted(self.waiting):
            self.writer.begin(i)

    # What passes by

    def _on_attention(self, kernel: AttentionCall, call: DenoiserCall) -> None:
        if call.step in self._kept and call.evaluation == 0 and kernel.call == 0:
            kernel.value = None  # not needed, and as large as the key
            self._calls[kernel.site] = (kernel, call)

    def _on_site(self, tensor: torch.Tensor, at: At) -> None:
        if at.step in self._kept and at.evaluation == 0 and at.branch in self.plan.capture.branches:
            self._values[at.site, at.branch] = tensor.detach().clone()  # later modules may work in place

    def _on_call(self, call: DenoiserCall) -> None:
        if call.step == 0 and call.evaluation == 0:
            states = self.hooks.family.text_inputs(call.kwargs).embeddings
            self._text = {b: t.detach().clone() for b, t in _rows_of(states, call.branches).items()}

    def _on_prediction(self, prediction: Prediction) -> None:
        for branch in prediction.outputs:
            self._passes[branch] += 1
        if prediction.call.evaluation == 0:
            self._evaluated = tuple(prediction.outputs)
            if self.plan.capture.noise_pred:
                self._noise = {b: t.detach().clone() for b, t in prediction.outputs.items()}

    def _on_step(self, end: StepEnd) -> None:
        self._final = end.next_latents
        if end.evaluation:
            return
        if end.step >= len(self.plan.timeline):
            raise InterpError(
                f"the pipeline runs more than the {len(self.plan.timeline)} steps that its scheduler announced; "
                "record one call at a time, without changing the scheduler inside it"
            )
        self._steps += 1
        parcel: dict[str, torch.Tensor] = {}
        if self.plan.capture.latents:
            parcel["trajectory/latents"] = end.latents.float()
        if self.plan.capture.noise_pred:
            channels = end.latents.shape[1]  # a model that also predicts its variance has twice as many
            predicted = {b: t[:, :channels].float() for b, t in self._noise.items()}
            parcel["trajectory/noise_pred"] = _branches(predicted, BRANCHES, end.latents.float())
        parcel["trajectory/guidance_scale"] = torch.full((len(self.samples),), self._applied_guidance())
        if end.step in self._kept:
            parcel |= self._reduced()
        self._calls.clear()
        self._values.clear()
        self._noise = {}
        self._outbox.send(parcel, self._append)

    def _applied_guidance(self) -> float:
        """The scale w of u + w·(c − u) that was really applied: 0 without text, 1 with text alone."""
        if self._evaluated == ("uncond",):
            return 0.0
        if self._evaluated == ("cond",):
            return 1.0
        return float(getattr(self.hooks.pipe, "guidance_scale", self.plan.guidance_scale))

    def _reduced(self) -> dict[str, torch.Tensor]:
        """Attention and module sites of the step that ends."""
        parcel, wanted = {}, self.plan.capture.branches
        for name, members in self._groups.items():
            missing = [s.name for s in members if s.name not in self._calls]
            if missing:
                raise InterpError(
                    f"{missing[0]!r} did not run in this step, so its attention cannot be recorded; a cache that skips "
                    "blocks must be turned off (pipe.unet.disable_cache(), DeepCache and the like)"
                )
            kernels = [self._calls[s.name][0] for s in members]
            call = self._calls[members[0].name][1]
            parts = {
                b: self._reducers[name](kernels, slice(i * call.samples, (i + 1) * call.samples))
                for i, b in enumerate(call.branches)
                if b in wanted
            }
            shape = self.plan.layout.arrays[f"{name}/probs"].shape[3:]
            like = torch.empty((len(self.samples), *shape), dtype=getattr(torch, self.plan.capture.dtype))
            parcel[f"{name}/probs"] = _branches(parts, wanted, like)
        for site in self.plan.sites:
            parts = {b: t.float() for (name, b), t in self._values.items() if name == site.site}
            like = torch.empty((len(self.samples), *site.shape))
            parcel[f"{site_node(site.site)}/value"] = _branches(parts, wanted, like)
        return parcel

    def _append(self, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            for i, value in zip(self.samples, values, strict=True):
                if i in self.waiting:
                    self.writer.append(i, name, value)

    # The end

    def finish(self, images: np.ndarray | None) -> None:
        """Write what is known at the end, and commit.

        Args:
            images: uint8 (sample, height, width, rgb), or None if the run keeps none.

        Raises:
            InterpError: the pipeline took fewer steps than planned.
        """
        self._outbox.flush()
        if self._steps != len(self.plan.timeline) or self._final is None:
            raise InterpError(
                f"the pipeline took {self._steps} steps, but {len(self.plan.timeline)} were planned; "
                "was it interrupted, or the scheduler changed inside the call?"
            )
        final = self._final.detach().float().cpu().numpy()
        passes = np.array([self._passes[b] for b in BRANCHES])
        encoder = next(iter(self.hooks.family.text_encoders))
        text = {b: t.float().cpu() for b, t in self._text.items()}
        for row, i in enumerate(self.samples):
            if i not in self.waiting:
                continue
            self.writer.put(i, "trajectory/final_latents", final[row])
            self.writer.put(i, "trajectory/nfe", passes)
            if text:
                states = _branches(text, BRANCHES, next(iter(text.values())))
                self.writer.put(i, f"text/{encoder}/embeddings", states[row].numpy())
            if images is not None:
                self.writer.put(i, "images/image", images[row])
            self.writer.commit(i)


def _rows_of(tensor: torch.Tensor, branches: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(branches, tensor.chunk(len(branches)), strict=True))


def _branches(parts: dict[str, torch.Tensor], wanted: Sequence[str], like: torch.Tensor) -> torch.Tensor:
    """Stack branches to (sample, branch, …); one that was not evaluated is NaN, never 0."""
    device = next((t.device for t in parts.values()), like.device)
    empty = torch.full(like.shape, float("nan"), dtype=like.dtype, device=device)
    return torch.stack([parts.get(b, empty) for b in wanted], dim=1)


def pictures(output: Any) -> np.ndarray | None:
    """Return a pipeline's pictures as uint8 (sample, height, width, rgb), or None if it gave latents."""
    images = output[0] if isinstance(output, tuple) else output.images
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu().numpy()
        images = np.moveaxis(images, 1, -1) if images.shape[1] == 3 else images
    if isinstance(images, np.ndarray):
        return (images * 255).round().astype("uint8") if images.shape[-1] == 3 else None
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


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
    recording = Recording(pipe, store, capture or Capture(), condition)
    original = type(pipe)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return recording.call(original, args, kwargs)

    pipe.__class__ = type(original.__name__, (original,), {"__call__": __call__, "__module__": original.__module__})
    try:
        yield recording
    finally:
        pipe.__class__ = original
        recording.close()


class Recording:
    """The run that `interp.record` is writing."""

    def __init__(self, pipe: Any, store: str | PathLike[str] | None, capture: Capture, condition: str) -> None:
        self._pipe, self._store, self._capture, self._condition = pipe, store, capture, condition
        self._writer: RunWriter | None = None
        self._plan: Plan | None = None

    @property
    def run(self) -> Run:
        """The run with all samples recorded so far."""
        if self._writer is None:
            raise InterpError("nothing was recorded: the pipeline was not called inside interp.record")
        self._writer.drain()
        return self._writer.run

    def call(self, original: type, args: tuple, kwargs: dict) -> Any:
        """Run the pipeline's own `__call__` and record it."""
        call = original.__call__
        bound = inspect.signature(call).bind(self._pipe, *args, **kwargs)
        bound.apply_defaults()
        capture = self._capture
        if bound.arguments.get("output_type") == "latent":
            capture = Capture(**{**{f: getattr(capture, f) for f in capture.__dataclass_fields__}, "image": False})
        plan, samples = self._next(_call_plan(self._pipe, capture, bound.arguments, self._condition))
        assert self._writer is not None
        with HookRegistry(self._pipe) as hooks:
            recorder = Recorder(hooks, self._writer, plan, samples)
            recorder.begin()
            output = call(self._pipe, *args, **kwargs)
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
        tables = {name: plan.selection.table for name in self._plan.layout.groups if name.startswith("attention/")}
        samples = list(self._writer.grow(columns, tables))
        return _moved(plan, self._plan, samples), samples

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.close()


def _moved(plan: Plan, first: Plan, samples: list[int]) -> Plan:
    """Give an appended call's plan the run's token columns and sample numbers."""
    old, columns = plan.selection, first.selection.positions.shape[1]
    positions = np.full((samples[-1] + 1, columns), -1)
    own = old.positions.shape[1] - (old.pads is not None)  # the last column is the summed padding
    positions[samples, :own] = old.positions[:, :own]
    pads = None
    if old.pads is not None:
        pads = np.zeros((samples[-1] + 1, old.pads.shape[1]), bool)
        pads[samples] = old.pads
    return replace(plan, selection=TokenSelection(positions, pads, old.table), layout=first.layout)


def _call_plan(pipe: Any, capture: Capture, arguments: dict[str, Any], condition: str) -> Plan:
    """Read a pipeline call's own arguments."""
    prompt = arguments.get("prompt")
    if prompt is None:
        raise InterpError(
            "interp.record needs the prompt as text (prompt=…), to label the tokens; embeddings have none"
        )
    if any(arguments.get(name) is not None for name in ("timesteps", "sigmas")) or "strength" in arguments:
        raise InterpError(
            "interp.record follows whole sampling runs; custom timesteps, sigmas and image-to-image are not supported yet"
        )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negative = arguments.get("negative_prompt") or ""
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    per = int(arguments.get("num_images_per_prompt") or 1)
    generator = arguments.get("generator")
    generators = generator if isinstance(generator, list) else [generator] * len(prompts) * per
    order = [p for p in range(len(prompts)) for _ in range(per)]
    height, width = pipe_size(pipe, arguments)
    return assemble(
        pipe,
        columns=text_length(find_family(pipe)) + 1,  # later calls may have longer prompts
        capture=capture,
        table=PromptTable({"prompt": prompts, "negative_prompt": negatives}),
        samples={
            "prompt": [prompts[p] for p in order],
            "negative_prompt": [negatives[p] for p in order],
            "seed": [-1 if g is None else int(g.initial_seed()) for g in generators],
            "condition": [condition] * len(order),
            "prompt_id": order,
            "batch": [0] * len(order),
        },
        batches=[list(range(len(order)))],
        conditions={condition: []},
        steps=int(arguments["num_inference_steps"]),
        guidance=float(arguments["guidance_scale"]),
        height=height,
        width=width,
    )


def pipe_size(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """Return (height, width) in pixels of a pipeline call."""
    default = find_family(pipe).default_size()
    return int(arguments.get("height") or default[0]), int(arguments.get("width") or default[1])
