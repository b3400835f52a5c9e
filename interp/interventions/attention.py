"""Changing attention probabilities: what all that do so share, and heads taken out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from interp.catalog import attention_sites
from interp.errors import InterpError, nearest, sentence_list
from interp.families import PARTS, AttentionSite, Family
from interp.hooks import At, HookRegistry
from interp.interventions.base import Batch, Intervention
from interp.interventions.claims import claim
from interp.interventions.layers import chosen_layers
from interp.interventions.places import BRANCHES
from interp.interventions.text import Prompts


@dataclass(frozen=True, kw_only=True, repr=False)
class _Where(Intervention):
    branch: Literal["cond", "uncond", "both"] = "cond"
    heads: tuple[int, ...] | None = None


class AttentionChange(_Where):
    """Change the probabilities (head, query, key) of attention layers within the window.

    Args:
        branch: `"cond"` (default), `"uncond"` or `"both"`.
        heads: Numbers of the heads that are changed; default all.
    """

    layers: str | tuple[str, ...] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_tuples("layers", "heads")
        if self.branch not in BRANCHES:
            raise InterpError(f"{self!r}: branch is {sentence_list(BRANCHES)}{nearest(str(self.branch), BRANCHES)}")
        if not all(isinstance(h, int) and not isinstance(h, bool) for h in self.heads or ()):
            raise InterpError(f"{self!r}: heads are whole numbers, counted from 0")

    @property
    def changed_part(self) -> str | None:
        """The part of the attention that is changed, which a layer must have: `cross`, `self`; None for all of it."""
        return None

    def whats(self) -> frozenset[str]:
        """Name what of the attention it owns, in its layers, heads and branch."""
        raise NotImplementedError

    def claims(self) -> frozenset[str]:
        """What it owns, in its layers, heads and branch."""
        return self._claimed(self.layers)

    def claims_in(self, family: Family) -> frozenset[str]:
        """The same, with the layers by name."""
        return self._claimed([s.name for s in self.sites(family)])

    def _claimed(self, layers: Sequence[str] | None) -> frozenset[str]:
        return frozenset(
            claim(what, layers=layers, heads=self.heads, branch=BRANCHES[self.branch]) for what in self.whats()
        )

    def writes(self, family: Family) -> list[str]:
        """The probabilities of its layers."""
        return [f"{site.name}:probs" for site in self.sites(family)]

    def acts_on(self) -> tuple[str, ...]:
        """The branches whose attention is changed."""
        return BRANCHES[self.branch]

    def sites(self, family: Family) -> list[AttentionSite]:
        """The attention modules that are changed, in running order.

        Raises:
            InterpError: there are none, or one has not so many heads.
        """
        part, every = self.changed_part, attention_sites(family)
        if part is None:
            among = every if self.layers else [s for s in every if s.kind != "text"]  # unasked, none within the text
            sites = chosen_layers(self, self.layers or ("*",), among)
        else:
            among = [s for s in every if part in PARTS[s.kind]]
            sites = chosen_layers(self, self.layers or (part,), among, f"layer with {part}-attention")
        for site in sites:
            wrong = [h for h in self.heads or () if not 0 <= h < site.heads]
            if wrong:
                raise InterpError(
                    f"{self!r}: there is no head {wrong[0]} in {site.name!r}, which has 0–{site.heads - 1}"
                )
        return sites

    def check_model(self, family: Family, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        """The layers and heads must exist."""
        self.sites(family)

    def attach(self, hooks: HookRegistry, batch: Batch) -> None:
        """Write the probabilities of the chosen layers in the window's steps; elsewhere they are not formed."""
        steps = self.steps(batch.timeline)
        for site in self.sites(hooks.family) if steps else ():
            change = self.change(hooks, batch, site)

            def write(probs: torch.Tensor, at: At, change: Any = change) -> torch.Tensor | None:
                if at.branch not in BRANCHES[self.branch]:
                    return None
                if self.heads is None:
                    return change(probs, at)
                some = change(probs[:, list(self.heads)], at)
                if some is None:
                    return None
                probs = probs.clone()
                probs[:, list(self.heads)] = some
                return probs

            hooks.write(f"{site.name}:probs", write, steps)

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Return what is done at one layer: (probs (sample, head, query, key) of the chosen heads, at) → probs or None."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class AblateHeads(AttentionChange):
    """Take heads out: nothing, their mean over queries, or uniform attention in place of their probabilities.

    Args:
        layers: Attention layers: globs, `"re:…"`, `"cross"` or `"self"` for all of a kind.
        value: `"zero"` (default): the heads put out nothing; the others are untouched. `"mean"`: every query has the
            mean of the head's probabilities over all queries, so that it no longer depends on the place in the
            picture. `"uniform"`: 1/keys, over the keys that are not masked.
        heads: Their numbers; default all of the layer.
        branch: `"cond"` (default), `"uncond"` or `"both"`.
        start, stop, unit: The window of steps.

    In joint attention a head is ablated as a whole, for the queries of image and text.

    >>> AblateHeads("*mid_block*attn2", heads=(0, 3))
    AblateHeads(heads=(0, 3), layers=('*mid_block*attn2',))
    """

    layers: tuple[str, ...]
    value: Literal["zero", "mean", "uniform"] = "zero"

    name: ClassVar[str] = "ablate_heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value not in ("zero", "mean", "uniform"):
            raise InterpError(
                f"{self!r}: value is 'zero', 'mean' or 'uniform'{nearest(str(self.value), ('zero', 'mean', 'uniform'))}"
            )

    def whats(self) -> frozenset[str]:
        """What the heads attend to."""
        return frozenset({"heads"})

    def change(self, hooks: HookRegistry, batch: Batch, site: AttentionSite) -> Any:
        """Exchange the whole matrix of each head."""

        def change(probs: torch.Tensor, at: At) -> torch.Tensor:
            if self.value == "zero":
                return torch.zeros_like(probs)
            if self.value == "mean":
                return probs.mean(2, keepdim=True).expand_as(probs)
            open_keys = (probs > 0).any(2, keepdim=True).any(1, keepdim=True)  # masked: 0 for every head and query
            return (open_keys / open_keys.sum(-1, keepdim=True)).to(probs).expand_as(probs)

        return change


def normalised(probs: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over keys; what sums to nothing stays nothing."""
    return probs / probs.sum(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
