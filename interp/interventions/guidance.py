"""Removing a branch: forward passes that are really skipped.

Two readings of "guidance removal" exist. Yi et al. (arXiv:2405.15330, Eq. 9) drop the branch *with* text and denoise
with ε(∅) alone: `RemoveText`. Diffusers' callback and Lumina drop the branch *without* text and denoise with ε(C)
alone: `RemoveGuidance`. The names cannot be confused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from interp.errors import InterpError
from interp.hooks import DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention


@dataclass(frozen=True, kw_only=True, repr=False)
class _KeepBranch(Intervention):
    """Evaluate one branch within the window; the other's rows leave the batch."""

    kept: ClassVar[str]

    def claims(self) -> frozenset[str]:
        """The choice of branches has one owner a step."""
        return frozenset({"branches"})

    def branches(self) -> tuple[str, ...]:
        """The one branch that is left."""
        return (self.kept,)

    def check(self, table: Mapping[str, Sequence[Any]], guided: bool) -> None:
        """Without guidance there is one branch only, and nothing that could be skipped."""
        if not guided:
            raise InterpError(
                f"{self!r} needs a run with guidance: at guidance_scale ≤ 1 the pipeline evaluates the branch with "
                "text alone, so there are no two branches of which one could be removed"
            )

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
