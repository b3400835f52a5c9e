"""Cross-attention that is computed once and reused: T-GATE (arXiv:2404.02747)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from interp.branches import spread, take_rows
from interp.catalog import attention_sites
from interp.clock import Timeline
from interp.errors import InterpError, nearest
from interp.families import Family
from interp.hooks import At, DenoiserCall, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.interventions.claims import claim
from interp.interventions.layers import chosen_cross_layers
from interp.interventions.text import TextChange, dry_text
from interp.standing import StandIns
from interp.tokens import Tokens


@dataclass
class _Kept:
    """What one module gave at the gate: branch → its samples, and (sample, …) of the whole batch."""

    by_branch: dict[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    _mean: torch.Tensor | None = None

    def keep(self, branch: str, members: tuple[int, ...], output: torch.Tensor, samples: int) -> None:
        """Keep a branch's output; samples that the branch does not hold are NaN."""
        self.by_branch[branch], self._mean = (members, spread(output.detach().clone(), members, samples)), None

    @property
    def mean(self) -> torch.Tensor:
        """The mean of the branches that each sample had."""
        if self._mean is None:
            self._mean = torch.stack([output for _, output in self.by_branch.values()]).nanmean(0)
        return self._mean


@dataclass(frozen=True, kw_only=True, repr=False)
class CacheCrossAttention(Intervention):
    """Freeze the output of cross-attention within the window: the modules do not run (T-GATE, arXiv:2404.02747).

    Args:
        layers: Globs over cross-attention sites; default all.
        value: What is reused: `"mean"` of both branches, as T-GATE has it, or each branch's `"own"`.

    The output is that of the last step before the window, or of the window's first step where it opens the run. T-GATE
    itself also drops a branch: `[CacheCrossAttention(start=0.4), RemoveText(start=0.4)]`; where the text enters through
    cross-attention alone (Stable Diffusion 1, PixArt), `RemoveGuidance` is the same to the last bit.

    In the run, attention that did not run is NaN. Several windows are several caches, with a step between them. Other text
    that is read in these steps has no effect on these layers, and is refused where nothing else would read it; so are
    changes of what is inside them, or of their output.

    >>> CacheCrossAttention(start=0.4)
    CacheCrossAttention(start=0.4)
    """

    layers: tuple[str, ...] | None = None
    value: Literal["mean", "own"] = "mean"

    name: ClassVar[str] = "cache_cross_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_tuples("layers")
        if self.value not in ("mean", "own"):
            raise InterpError(f"{self!r}: value is 'mean' or 'own'{nearest(str(self.value), ['mean', 'own'])}")

    def claims(self) -> frozenset[str]:
        """The output of cross-attention."""
        return frozenset({claim("cross_attention", layers=self.layers)})

    def claims_in(self, family: Family) -> frozenset[str]:
        """The layers by name."""
        return frozenset({claim("cross_attention", layers=self._paths(family))})

    def check_beside(self, others: Sequence[Intervention], timeline: Timeline, family: Family) -> None:
        """Nothing is changed in a module that does not run, nor is other text read where every layer is frozen."""
        absent, reused = StandIns(), self._steps(timeline)[1]
        for path in self._paths(family):
            absent.add(path, lambda _: None, reused)
        for other in others:
            for site in other.writes(family):
                absent.refuse_writer(site, other.steps(timeline))
        every = [s.name for s in attention_sites(family) if s.kind == "cross"]
        for other in others if self._paths(family) == every else ():
            steps = other.steps(timeline)
            if not isinstance(other, TextChange) or not steps or not steps <= reused:
                continue
            pooled = other.pooled != "keep" and dry_text(family, family.arguments()).pooled is not None
            if not pooled and not family.text_elsewhere:
                raise InterpError(
                    f"{other!r} would change nothing: in all of its steps {self!r} reuses what cross-attention gave before; "
                    "give them other windows"
                )

    def _steps(self, timeline: Timeline) -> tuple[int, frozenset[int]]:
        """The step whose outputs are kept, and those in which they are reused."""
        steps = self.steps(timeline)
        gate = max(0, min(steps, default=0) - 1)
        return gate, steps - {gate}

    def check_model(
        self, family: Family, prompts: list[tuple[Tokens, dict[str, Any]]], arguments: Mapping[str, Any]
    ) -> None:
        """There must be cross-attention."""
        self._paths(family)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Keep the outputs of one step, and give them in the steps that follow."""
        gate, reused = self._steps(batch.timeline)
        for path in self._paths(hooks.family) if reused else ():
            kept = _Kept()
            hooks.read(f"{path}:out", partial(self._keep, kept, len(batch.rows)), {gate})
            hooks.stand_in(path, partial(self._give, kept, path, gate), reused)

    def _keep(self, kept: _Kept, samples: int, output: torch.Tensor, at: At) -> None:
        if at.branch in kept.by_branch and at.evaluation == 0:
            kept.by_branch.clear()  # another run of the same pipeline
        kept.keep(at.branch, at.members, output, samples)

    def _give(self, kept: _Kept, path: str, gate: int, call: DenoiserCall) -> torch.Tensor:
        if not kept.by_branch:
            raise InterpError(
                f"{self!r}: {path!r} did not run in step {gate}, so it gave nothing to reuse; leave a step between the "
                "windows of two caches"
            )
        parts = []
        for branch, members in call.held.items():
            if self.value == "own":
                known, output = kept.by_branch.get(branch, ((), None))
                if output is None or not set(members) <= set(known):
                    raise InterpError(
                        f"{self!r}: the branch {branch!r} was not evaluated for every sample in step {gate}, so {path!r} has "
                        "no output of its own to reuse; say value='mean', or keep both branches until then"
                    )
                parts.append(take_rows(output, members))
            else:
                parts.append(take_rows(kept.mean, members))
        return torch.cat(parts)

    def _paths(self, family: Family) -> list[str]:
        model = type(family.pipe).__name__
        without = f"{model} has no cross-attention whose output could be reused; text and image share one attention"
        return [s.name for s in chosen_cross_layers(self, family, self.layers, without)]
