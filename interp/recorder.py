"""The recorder: what passes by in one batch becomes samples of a run store."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from interp.branches import spread, stack_branches
from interp.captured import UPDATE, SiteCapture, site_node
from interp.clock import StepEnd, StepStart
from interp.encoder_states import fitted, hidden_states
from interp.errors import InterpError
from interp.hooks import At, DenoiserCall, HookRegistry, Prediction
from interp.kernels import AttentionCall
from interp.outbox import Outbox
from interp.planning import Plan
from interp.step_attention import StepAttention
from interp.stores import RunWriter

BRANCHES = ("cond", "uncond")
TIMESTEP = "timestep"


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
        self._kept = set(plan.capture.chosen_steps(len(plan.timeline)))
        self._attention = StepAttention(hooks, plan, self.samples)
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        self._noise: dict[str, torch.Tensor] = {}
        self._text: dict[str, torch.Tensor] = {}
        self._evaluated: dict[str, tuple[int, ...]] = {}
        self._scale: float | None = None
        self._passes: dict[str, np.ndarray] = defaultdict(
            lambda: np.zeros(len(self.samples), int), {b: np.zeros(len(self.samples), int) for b in BRANCHES}
        )
        self._names: dict[str, str] = {}  # of numbered branches
        self._final: torch.Tensor | None = None
        self._steps = 0
        self._outbox = Outbox()
        self._attach()

    def _attach(self) -> None:
        for site in self._attention.sites:
            self.hooks.on_attention(site, self._on_attention)
        for wanted in self.plan.sites:
            for source in wanted.sources:
                self.hooks.read(source, partial(self._on_site, wanted))
        self.hooks.on_prediction(self._on_prediction)
        self.hooks.on_exit(self._outbox.close)
        self.hooks.before_step(self._before_step)
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
            self._attention.add(kernel, call)

    def _on_site(self, wanted: SiteCapture, tensor: torch.Tensor, at: At) -> None:
        if at.step not in self._kept or at.evaluation or at.call or not self._wanted(at.branch):
            return
        value, key = wanted.keep(tensor), (wanted.site, at.branch)
        if wanted.quantity == UPDATE:  # the input comes first
            if at.site.endswith(":in"):
                self._values[key] = value
                return
            value = value - self._values[key]
        elif key in self._values:
            raise InterpError(
                f"{wanted.site!r} runs several times within one call of the denoiser, so which tensor to keep is unknown; "
                "read it with interp.HookRegistry"
            )
        self._values[key] = spread(value, at.members, len(self.samples))

    def _wanted(self, branch: str) -> bool:
        """Numbered branches are named at the step's end."""
        return branch in self.plan.capture.branches or branch.startswith("#")

    def _on_call(self, call: DenoiserCall) -> None:
        if call.step == 0 and call.evaluation == 0:
            states = self.hooks.family.text_inputs(call.kwargs).embeddings
            parts = call.split(states)
            self._text |= {b: t.detach().clone() for b, t in parts.items() if b in call.keep}

    def _on_prediction(self, prediction: Prediction) -> None:
        call = prediction.call
        for branch in prediction.outputs:
            self._passes[branch][list(call.held[branch])] += 1
        if call.evaluation == 0:
            self._evaluated |= call.held
            self._scale = call.scale
            if self.plan.capture.noise_pred or any(b.startswith("#") for b in prediction.outputs):
                outputs = prediction.outputs.items()
                self._noise |= {b: spread(t.detach().clone(), call.held[b], call.samples) for b, t in outputs}

    def _on_step(self, end: StepEnd) -> None:
        self._final = end.next_latents

    def _before_step(self, start: StepStart) -> None:
        """Send off what the step has shown: a scheduler may wait for the device, which then has this to do, too."""
        self._name_branches(start)
        if start.evaluation:
            return
        if start.step >= len(self.plan.timeline):
            raise InterpError(
                f"the pipeline runs more than the {len(self.plan.timeline)} steps that its scheduler announced; "
                "record one call at a time, without changing the scheduler inside it"
            )
        self._steps += 1
        parcel: dict[str, torch.Tensor] = {}
        if not isinstance(start.time, torch.Tensor) or start.time.device.type == "cpu":
            self._check_time(start.step, start.timestep)
        else:  # known without waiting when the parcel arrives
            parcel[TIMESTEP] = start.time.reshape(1)
        if self.plan.capture.latents:
            parcel["trajectory/latents"] = start.latents.float()
        if self.plan.capture.noise_pred:
            predicted = {b: t.float() for b, t in self._noise.items()}
            parcel["trajectory/noise_pred"] = stack_branches(predicted, BRANCHES, start.latents.shape)
        parcel["trajectory/guidance_scale"] = self._applied_guidance()
        if start.step in self._kept:
            parcel |= self._reduced(start.step)
        self._attention.clear()
        self._values.clear()
        self._noise = {}
        self._evaluated, self._scale = {}, None
        self._outbox.send(parcel, partial(self._append, start.step))

    def _check_time(self, step: int, timestep: float) -> None:
        planned = float(self.plan.timeline.timestep[step])
        if abs(timestep - planned) > 1e-3 * max(1.0, abs(planned)):
            raise InterpError(
                f"step {step} is at timestep {timestep:g}, but {planned:g} was planned; the scheduler was changed, or the "
                "pipeline sets its timesteps in a way that its family does not know"
            )

    def _name_branches(self, start: StepStart) -> None:
        """Give numbered branches their names, which a step's first evaluation tells."""
        if not any(b.startswith("#") for b in self._passes):
            return
        if start.evaluation == 0:
            try:
                self._names = self.hooks.family.name_branches(self._noise, start.model_output)
            except InterpError:
                if self.plan.capture.noise_pred or self.plan.sites:
                    raise
                self._names = {}
            self._noise = {self._names.get(b, b): t for b, t in self._noise.items()}
            self._values = {(site, self._names.get(b, b)): t for (site, b), t in self._values.items()}
            self._evaluated = {self._names.get(b, b): held for b, held in self._evaluated.items()}
        for number in [b for b in self._passes if b.startswith("#")]:
            count = self._passes.pop(number)
            self._passes[self._names.get(number, "unnamed")] += count

    def _applied_guidance(self) -> torch.Tensor:
        """The scale w of u + w·(c − u) that was really applied, (sample,): 0 without text, 1 with text alone."""
        if any(b.startswith("#") for b in self._evaluated):  # of branches without names
            return torch.full((len(self.samples),), float("nan"))
        own = self.hooks.family.applied_guidance(self.plan.arguments)
        both = own if self._scale is None else self._scale
        cond, uncond = (set(self._evaluated.get(b, ())) for b in BRANCHES)
        samples = range(len(self.samples))
        return torch.tensor([both if i in cond & uncond else 1.0 if i in cond else 0.0 for i in samples])

    def _reduced(self, step: int) -> dict[str, torch.Tensor]:
        """Attention and module sites of the step that ends."""
        parcel, wanted = self._attention.reduced(last=step == max(self._kept)), self.plan.capture.branches
        for site in self.plan.sites:
            parts = {b: t.float() for (name, b), t in self._values.items() if name == site.site}
            gaps = set(self._evaluated) & set(wanted) - set(parts)
            if gaps and not self.hooks.stood_in(site.site):
                raise InterpError(
                    f"{site.site!r} did not run in this step, so it cannot be recorded; a cache that skips blocks must be "
                    "turned off (disable_cache() of the denoiser, DeepCache and the like)"
                )
            whole = (len(self.samples), *site.shape)
            parcel[f"{site_node(site.site)}/value"] = stack_branches(parts, wanted, whole)
        return parcel

    def _append(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        if TIMESTEP in arrays:
            self._check_time(step, float(arrays.pop(TIMESTEP)[0]))
        rows, samples = [row for row, _ in self._written], [i for _, i in self._written]
        for name, values in arrays.items():
            if samples:
                self.writer.append_together(samples, name, values if len(rows) == len(values) else values[rows])

    def rehearse(self, step: int, branches: Sequence[str]) -> None:
        """Reduce what was kept of a step on tensors without data; nothing is written."""
        self._evaluated = dict.fromkeys(branches, tuple(range(len(self.samples))))
        self._reduced(step)

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
        passes = np.stack([self._passes[b] for b in BRANCHES], axis=1)
        if self._passes["unnamed"].any():
            passes[:] = -1
        text = self._text_states()
        for row, i in self._written:
            self.writer.put(i, "trajectory/final_latents", final[row])
            self.writer.put(i, "trajectory/nfe", passes[row])
            for name, states in text.items():
                self.writer.put(i, name, states[row].numpy())
            if images is not None:
                self.writer.put(i, "images/image", images[row])
            self.writer.commit(i)

    def _text_states(self) -> dict[str, torch.Tensor]:
        """Array → (sample, branch, token, feature), one a text encoder; unused positions are NaN."""
        found: dict[str, torch.Tensor] = {}
        for name, span in self.hooks.family.text_segments(self.plan.arguments).items():
            if not self._text:
                break
            array = f"text/{name}/embeddings"
            width = self.plan.layout.arrays[array].shape[2]
            parts = {b: t[:, span].float().cpu() for b, t in self._text.items()}
            parts = {b: F.pad(t, (0, 0, 0, width - t.shape[1]), value=float("nan")) for b, t in parts.items()}
            found[array] = stack_branches(parts, BRANCHES, next(iter(parts.values())).shape)
        if self._text and self.plan.capture.text == "layers":
            found |= self._hidden_states()
        return found

    def _hidden_states(self) -> dict[str, torch.Tensor]:
        """Array → (sample, branch, layer, token, feature) of each text encoder, for the branches that were evaluated."""
        family, plan, by_branch = self.hooks.family, self.plan, {}
        columns = {"cond": plan.texts[0], "uncond": plan.texts[1]}
        for branch in self._text:
            arguments = plan.arguments if branch == "cond" else family.negative_arguments(plan.arguments)
            by_branch[branch] = hidden_states(family, [columns[branch][i] for i in self.samples], arguments)
        found = {}
        for name in family.text_encoders:
            array = f"text/{name}/hidden"
            width, parts = self.plan.layout.arrays[array].shape[3], {}
            for branch, states in by_branch.items():
                known = plan.tokens if branch == "cond" else plan.negatives
                read = name in family.text_segments(plan.arguments)
                lengths = [sum(t >= 0 for t in known[i].ids) if read and family.ragged else width for i in self.samples]
                parts[branch] = fitted(states[name], lengths, width)
            found[array] = stack_branches(parts, BRANCHES, next(iter(parts.values())).shape)
        return found


def pictures(output: Any) -> np.ndarray | None:
    """Return a pipeline's pictures as uint8 (sample, height, width, rgb), or None if it gave latents."""
    images = output[0] if isinstance(output, tuple) else output.images
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu().numpy()
        images = np.moveaxis(images, 1, -1) if images.shape[1] == 3 else images
    if isinstance(images, np.ndarray):
        return (images * 255).round().astype("uint8") if images.shape[-1] == 3 else None
    return np.stack([np.asarray(image.convert("RGB")) for image in images])
