"""Cross-attention that is computed once and reused: T-GATE (arXiv:2404.02747)."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from interp.branches import spread
from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import Family
from interp.hooks import At, DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.tokens import Tokens


@dataclass(frozen=True, kw_only=True, repr=False)
class CacheCrossAttention(Intervention):
    """Freeze the output of cross-attention within the window: the modules do not run (T-GATE, arXiv:2404.02747).

    Args:
        layers: Globs over cross-attention sites; default all.
        value: What is reused: `"mean"` of both branches, as T-GATE has it, or each branch's `"own"`.

    The output is that of the last step before the window, or of the window's first step where it opens the run. T-GATE
    itself also drops a branch: `[CacheCrossAttention(start=0.4), RemoveGuidance(start=0.4)]`. In the run, attention that did
    not run is NaN.

    >>> CacheCrossAttention(start=0.4)
    CacheCrossAttention(start=0.4)
    """

    layers: tuple[str, ...] | None = None
    value: Literal["mean", "own"] = "mean"

    name: ClassVar[str] = "cache_cross_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str | list):
            object.__setattr__(self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers))
        if self.value not in ("mean", "own"):
            raise InterpError(f"{self!r}: value is 'mean' or 'own'{nearest(str(self.value), ['mean', 'own'])}")

    def claims(self) -> frozenset[str]:
        """The output of cross-attention."""
        return frozenset({"cross_attention"})

    def check_model(
        self, family: Family, prompts: list[tuple[Tokens, dict[str, Any]]], arguments: Mapping[str, Any]
    ) -> None:
        """There must be cross-attention."""
        self._paths(family)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Keep the outputs of one step, and give them in the steps that follow."""
        steps = self.steps(batch.timeline)
        gate = max(0, min(steps, default=0) - 1)
        for path in self._paths(hooks.family) if steps else ():
            kept: dict[str, torch.Tensor] = {}
            hooks.read(f"{path}:out", partial(self._keep, kept, gate, len(batch.rows)))
            hooks.stand_in(path, partial(self._give, kept, steps - {gate}, path))

    def _keep(self, kept: dict[str, torch.Tensor], gate: int, samples: int, output: torch.Tensor, at: At) -> None:
        if at.step == gate:
            if at.branch in kept and at.evaluation == 0:
                kept.clear()  # another run of the same pipeline
            kept[at.branch] = spread(output.detach().clone(), at.members, samples)

    def _give(
        self, kept: dict[str, torch.Tensor], steps: frozenset[int], path: str, call: DenoiserCall
    ) -> torch.Tensor | None:
        if call.step not in steps:
            return None
        mean = torch.stack(list(kept.values())).nanmean(0) if self.value == "mean" else None
        parts = []
        for branch, members in call.held.items():
            if mean is None and branch not in kept:
                raise InterpError(
                    f"{self!r}: the branch {branch!r} was not evaluated before the window, so {path!r} has no output of its "
                    "own to reuse; say value='mean', or keep both branches until then"
                )
            parts.append((kept[branch] if mean is None else mean)[list(members)])
        return torch.cat(parts)

    def _paths(self, family: Family) -> list[str]:
        cross = [s.name for s in attention_sites(family) if s.kind == "cross"]
        if not cross:
            raise InterpError(
                f"{self!r}: {type(family.pipe).__name__} has no cross-attention whose output could be reused; text and image "
                "share one attention"
            )
        chosen = [n for n in cross if any(fnmatchcase(n, p) for p in self.layers or ("*",))]
        if not chosen:
            raise InterpError(f"{self!r} matches no cross-attention layer; there are {sentence_list(cross, 2)}")
        return chosen
