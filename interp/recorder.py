"""The recorder: what passes by in one batch becomes samples of a run store."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from interp.branches import split_rows
from interp.captured import UPDATE, ReduceCapture, SiteCapture, attention_groups, site_node
from interp.clock import StepEnd
from interp.errors import InterpError
from interp.hooks import At, DenoiserCall, HookRegistry, Prediction
from interp.kernels import AttentionCall
from interp.outbox import Outbox
from interp.planning import Plan
from interp.reduction import AttentionReducer
from interp.regions import Cells
from interp.stores import RunWriter
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
        waiting: Collection[int] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.hooks, self.writer, self.plan, self.samples = hooks, writer, plan, list(samples)
        self.waiting = set(samples if waiting is None else waiting)  # the others are done: computed, not written
        # a row whose place belongs to another sample only fills the batch, and is not written
        self._written = [(row, i) for row, i in enumerate(places or samples) if i in self.waiting]
        capture, columns = plan.capture, plan.selection
        pads = None if columns.pads is None else columns.pads[self.samples]
        selection = TokenSelection(columns.positions[self.samples], pads, columns.table)
        self._kept = set(capture.chosen_steps(len(plan.timeline)))
        self._groups = attention_groups(plan.attention)
        observed = [*plan.attention, *(s for one in plan.reductions for s in one.layers)]
        self._observed = {s.name: s for s in observed}
        self._cells = {s.name: Cells(s.grid, *capture.chosen_cells(s.grid)) for s in observed}
        self._reducers = {
            name: AttentionReducer(
                self._cells[members[0].name].size,
                None if capture.heads == "mean" else capture.chosen_heads(members[0].heads),
                None if members[0].kind == "self" else selection,
                getattr(torch, capture.dtype),
                members[0].grid,
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
        for site in self._observed.values():
            self.hooks.on_attention(site, self._on_attention)
        for wanted in self.plan.sites:
            for source in wanted.sources:
                self.hooks.read(source, partial(self._on_site, wanted))
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
            kernel = replace(kernel, value=None)  # values are not needed, and large
            self._calls[kernel.site] = (self._cells[kernel.site].crop(kernel), call)

    def _on_site(self, wanted: SiteCapture, tensor: torch.Tensor, at: At) -> None:
        if at.step not in self._kept or at.evaluation or at.call or at.branch not in self.plan.capture.branches:
            return
        value, key = wanted.keep(tensor), (wanted.site, at.branch)
        if wanted.quantity == UPDATE:  # the input comes first
            value = value if at.site.endswith(":in") else value - self._values[key]
        self._values[key] = value

    def _on_call(self, call: DenoiserCall) -> None:
        if call.step == 0 and call.evaluation == 0:
            states = self.hooks.family.text_inputs(call.kwargs).embeddings
            parts = split_rows(states, call.branches)
            self._text = {b: t.detach().clone() for b, t in parts.items() if b in call.keep}

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
        for one in self.plan.reductions:
            layers = [self._reduce_layer(one, site.name) for site in one.layers]
            parcel[f"{site_node(one.name)}/value"] = torch.stack(layers, dim=2)
        for site in self.plan.sites:
            parts = {b: t.float() for (name, b), t in self._values.items() if name == site.site}
            like = torch.empty((len(self.samples), *site.shape))
            parcel[f"{site_node(site.site)}/value"] = _branches(parts, wanted, like)
        return parcel

    def _reduce_layer(self, one: ReduceCapture, site: str) -> torch.Tensor:
        """Apply a user's reduction to one layer: (sample, branch, …)."""
        if site not in self._calls:
            raise InterpError(f"{site!r} did not run in this step, so {one.name!r} cannot be reduced from it")
        kernel, call = self._calls[site]
        rows = {b: slice(i * call.samples, (i + 1) * call.samples) for i, b in enumerate(call.branches)}
        parts = {
            b: one.fn(kernel.probabilities(rows[b]), call.at(f"{site}:probs", b)).detach().float()
            for b in self.plan.capture.branches
            if b in rows
        }
        return _branches(parts, self.plan.capture.branches, torch.empty((len(self.samples), *one.shape)))

    def _append(self, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            for row, i in self._written:
                self.writer.append(i, name, values[row])

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
        for row, i in self._written:
            self.writer.put(i, "trajectory/final_latents", final[row])
            self.writer.put(i, "trajectory/nfe", passes)
            if text:
                states = _branches(text, BRANCHES, next(iter(text.values())))
                self.writer.put(i, f"text/{encoder}/embeddings", states[row].numpy())
            if images is not None:
                self.writer.put(i, "images/image", images[row])
            self.writer.commit(i)


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
