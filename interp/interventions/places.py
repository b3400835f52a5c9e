"""Where an intervention acts: a site of a model, as it passes in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from interp.catalog import dry_run, split_site
from interp.errors import InterpError
from interp.families import Family
from interp.hooks import At, HookRegistry
from interp.interventions.base import Batch
from interp.rehearsal import passing
from interp.tokens import Tokens, tokenize

BRANCHES = {"cond": ("cond",), "uncond": ("uncond",), "both": ("cond", "uncond")}


@dataclass(frozen=True)
class Place:
    """One site of a model as an intervention sees it: `path:quantity`, and whether it is a text encoder's."""

    site: str
    family: Family
    batch: Batch

    @property
    def root(self) -> str:
        """The pipeline's attribute that holds the site."""
        return self.site.partition(".")[0].partition(":")[0]

    @property
    def of_text_encoder(self) -> bool:
        """Whether the site is met once, before the first step."""
        return self.root in self.family.text_encoders

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        """One sample's shape in the denoiser, without running it; None in a text encoder.

        Raises:
            InterpError: nothing passes there.
        """
        if self.of_text_encoder:
            return None
        path, quantity = split_site(self.site)
        if quantity == "out":
            found = dry_run(self.family, self.batch.arguments)[0].get(path)
        else:
            met = passing(self.family, [self.site], self.batch.arguments).get(self.site)
            found = None if met is None else met.shape
        if found is None:
            raise InterpError(
                f"no tensor passes at {self.site!r} in a call of the denoiser, so nothing can be changed there"
            )
        return found

    @cached_property
    def tokens(self) -> list[Tokens]:
        """The prompts' tokens at the positions of this site's text."""
        if not self.of_text_encoder:
            return self.batch.tokens
        span = self.family.text_segments(self.batch.arguments).get(self.root)
        if span is not None:
            return [t.part(span) for t in self.batch.tokens]
        tokenizer = self.family.text_encoders[self.root][0]
        return [tokenize(tokenizer, str(row["prompt"])) for row in self.batch.rows]


def present(at: At) -> list[int]:
    """Return which of the batch's samples a tensor holds, in order: a branch may have been dropped for some alone."""
    return list(at.members) if at.members else list(range(at.samples))


class TextCalls:
    """Which prompt a text encoder is reading: pipelines encode the prompt first, then the negative prompt."""

    def __init__(self, hooks: HookRegistry, encoder: str) -> None:
        self._calls = 0
        self._hooks = hooks
        hooks.read(f"{encoder}:in", self._begin)

    def _begin(self, tensor: torch.Tensor, at: At) -> None:
        self._calls += self._hooks.arguments is not None

    @property
    def branch(self) -> str:
        """`cond`, `uncond`, or "" outside of the pipeline's own call, where another prompt is encoded."""
        if self._hooks.arguments is None:
            return ""
        return {1: "cond", 2: "uncond"}.get(self._calls, "")

    @property
    def read(self) -> tuple[str, ...]:
        """The branches whose prompts have been read."""
        return ("cond", "uncond")[: self._calls]


def neighbours(names: Sequence[str], width: int = 3) -> list[tuple[str, ...]]:
    """Return every run of `width` neighbours of a list, e.g. of the cross-attention layers in running order.

    The layer sweep of LocoGen (Basu et al., arXiv:2405.01008) lets three neighbouring layers read another prompt.

    >>> neighbours(["a", "b", "c", "d"], width=3)
    [('a', 'b', 'c'), ('b', 'c', 'd')]
    """
    if not 1 <= width <= len(names):
        raise InterpError(f"runs of {width} neighbours do not fit {len(names)} names; give a width of 1–{len(names)}")
    return [tuple(names[i : i + width]) for i in range(len(names) - width + 1)]
