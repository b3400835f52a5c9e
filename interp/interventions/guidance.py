"""Which branches are evaluated, and how both are combined: forward passes that are really skipped.

Two readings of "guidance removal" exist. Yi et al. (arXiv:2405.15330, Eq. 9) drop the branch *with* text and denoise
with ε(∅) alone: `RemoveText`. Diffusers' callback and Lumina drop the branch *without* text and denoise with ε(C)
alone: `RemoveGuidance`. The names cannot be confused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from interp.clock import Timeline
from interp.errors import InterpError
from interp.families import Family
from interp.hooks import DenoiserCall, HookRegistry, Prediction
from interp.interventions.base import Batch, Intervention, Unit, frozen, is_number


@dataclass(frozen=True, kw_only=True, repr=False)
class _Guided(Intervention):
    """An intervention on guidance, which there must be."""

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Without guidance there is one branch only, and nothing that could be skipped or combined."""
        if not guided:
            raise InterpError(
                f"{self!r} needs a run with guidance: as it is called, the pipeline evaluates the branch with text alone, "
                "so there are no two branches; raise guidance_scale above 1 (FLUX.1 and Qwen-Image: true_cfg_scale and a "
                "negative prompt)"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class _KeepBranch(_Guided):
    """Evaluate one branch within the window; the other's rows leave the batch."""

    kept: ClassVar[str]

    def claims(self) -> frozenset[str]:
        """The choice of branches has one owner a step, and where there is one branch nothing is combined."""
        return frozenset({"branches", "scale"})

    def branches(self) -> tuple[str, ...]:
        """The one branch that is left."""
        return (self.kept,)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Drop the other branch's rows before each denoiser call of the window."""
        steps = self.steps(batch.timeline)

        def edit(call: DenoiserCall) -> None:
            if call.step in steps:
                call.keep = (self.kept,)

        hooks.on_call(edit)


@dataclass(frozen=True, kw_only=True, repr=False)
class RemoveText(_KeepBranch):
    """Denoise without the text within the window: ε(x, ∅) alone, Eq. 9 of Yi et al. (2405.15330).

    The branch with text is not computed (`nfe` counts it). `RemoveText(start=0.6)` drops the text for the last 40 %
    of the steps; `RemoveText(stop=0.2)` for the first 20 % (their experiment on when the text is used).

    >>> RemoveText(start=0.6)
    RemoveText(start=0.6)
    """

    name: ClassVar[str] = "remove_text"
    kept: ClassVar[str] = "uncond"


@dataclass(frozen=True, kw_only=True, repr=False)
class RemoveGuidance(_KeepBranch):
    """Denoise with the text but without guidance within the window: ε(x, C) alone, as diffusers and Lumina truncate.

    The branch without text is not computed (`nfe` counts it).

    >>> RemoveGuidance(start=30, unit="step")
    RemoveGuidance(start=30, unit='step')
    """

    name: ClassVar[str] = "remove_guidance"
    kept: ClassVar[str] = "cond"


@dataclass(frozen=True, repr=False)
class GuidanceScale(_Guided):
    """Guide with another scale w of u + w·(c − u) within the window (Ho & Salimans, arXiv:2207.12598).

    Args:
        scale: One number, or several that are run through evenly from the window's first step to its last, linear in
            between: `(1, 7.5)` rises.

    Both branches are evaluated and combined by the pipeline's own formula, rescaling included; with the run's own
    scale nothing is touched. `run.trajectory.guidance_scale` tells what was applied.

    >>> GuidanceScale((1, 7.5), stop=0.5)
    GuidanceScale(stop=0.5, scale=(1, 7.5))
    """

    scale: float | tuple[float, ...]

    name: ClassVar[str] = "guidance_scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", frozen(self.scale))
        given = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not given or not all(map(is_number, given)):
            raise InterpError(f"{self!r}: the scale is a number, or several that the window runs through")

    def claims(self) -> frozenset[str]:
        """One scale a step."""
        return frozenset({"scale"})

    def scales(self, timeline: Timeline) -> dict[int, float]:
        """Return the scale of each step in the window."""
        steps = sorted(self.steps(timeline))
        points = np.atleast_1d(np.asarray(self.scale, float))
        values = np.interp(np.linspace(0, 1, len(steps)), np.linspace(0, 1, len(points)), points)
        return dict(zip(steps, values.tolist(), strict=True))

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Set the scale of each denoiser call in the window."""
        scales = self.scales(batch.timeline)

        def edit(call: DenoiserCall) -> None:
            if call.step in scales:
                call.scale = scales[call.step]

        hooks.on_call(edit)


@dataclass(frozen=True, kw_only=True, repr=False)
class GuidanceInterval(_Guided):
    """Guide within an interval of noise levels only, ε(x, C) alone outside (Kynkäänniemi et al., arXiv:2404.07724).

    Args:
        start, stop: Here the window is where guidance is *on*, by default in σ: (stop, start], start being the larger.
        scale: The scale within; None is the run's own.

    Outside, the branch without text is not computed (`nfe` counts it).

    >>> GuidanceInterval(start=5.42, stop=0.28)
    GuidanceInterval(start=5.42, stop=0.28)
    """

    unit: Unit = "sigma"
    scale: float | None = None

    name: ClassVar[str] = "guidance_interval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not is_number(self.scale):
            raise InterpError(f"{self!r}: the scale is a number, or None for the run's own")

    def claims(self) -> frozenset[str]:
        """Branches and scale, in every step of the run."""
        return frozenset({"branches", "scale"})

    def identity(self) -> "GuidanceInterval":
        """Guidance everywhere, with the run's own scale; an empty interval means no guidance at all."""
        return GuidanceInterval()

    def changes(self, timeline: Timeline) -> frozenset[int]:
        """The steps outside of the window, and those inside, if they get a scale."""
        every = frozenset(range(len(timeline)))
        return every if self.scale is not None else every - self.steps(timeline)

    def claimed(self, timeline: Timeline, family: Family | None = None) -> dict[str, frozenset[int]]:
        """Outside the window there is no text-free branch; inside there is, with this scale if one is given."""
        return {"branches": frozenset(range(len(timeline))), "scale": self.changes(timeline)}

    def evaluated(self, timeline: Timeline) -> dict[int, tuple[str, ...]]:
        """Outside the window the branch with text alone."""
        inside = self.steps(timeline)
        return {step: ("cond",) for step in range(len(timeline)) if step not in inside}

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Drop the branch without text outside the window, set the scale inside."""
        inside = self.steps(batch.timeline)

        def edit(call: DenoiserCall) -> None:
            if call.step not in inside:
                call.keep = ("cond",)
            elif self.scale is not None:
                call.scale = float(self.scale)

        hooks.on_call(edit)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptiveGuidance(_Guided):
    """End a sample's guidance once both branches agree (Castillo et al., arXiv:2312.12487).

    Args:
        threshold: Once the cosine of ε(x, C) and ε(x, ∅), over all their values, reaches it in a step, the sample goes on
            with ε(x, C) alone from the next step to the end of the window.

    Decided for each sample by itself: the rows of those that are finished leave the batch, and `nfe` differs between
    samples. What a plan says of forward passes is the most there can be.

    >>> AdaptiveGuidance(threshold=0.99)
    AdaptiveGuidance()
    """

    threshold: float = 0.99

    name: ClassVar[str] = "adaptive_guidance"
    skips_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold):
            raise InterpError(f"{self!r}: the threshold is a cosine, a number up to 1")

    def claims(self) -> frozenset[str]:
        """The choice of branches has one owner a step."""
        return frozenset({"branches"})

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Compare both predictions in each step of the window, drop finished samples' rows in those that follow."""
        steps = self.steps(batch.timeline)
        finished: dict[int, int] = {}  # sample → the step in which its branches agreed
        seen: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}

        def edit(call: DenoiserCall) -> None:
            if call.step == 0 and call.evaluation == 0:
                finished.clear()
            if call.step in steps:
                done = frozenset(sample for sample, step in finished.items() if step < call.step)
                call.leave["uncond"] = call.leave.get("uncond", frozenset()) | done

        def compare(prediction: Prediction) -> None:
            call = prediction.call
            if call.step not in steps or call.evaluation:
                return
            seen.update({b: (call.held[b], t) for b, t in prediction.outputs.items()})
            if len(seen) < 2:
                return
            (cond_members, cond), (members, uncond) = seen["cond"], seen["uncond"]
            cond = cond[[cond_members.index(sample) for sample in members]]
            cosine = torch.nn.functional.cosine_similarity(cond.flatten(1).float(), uncond.flatten(1).float())
            for sample, value in zip(members, cosine.tolist(), strict=True):
                if value >= self.threshold:
                    finished.setdefault(sample, call.step)
            seen.clear()

        hooks.on_call(edit)
        hooks.on_prediction(compare)
        hooks.on_step(lambda _: seen.clear())
