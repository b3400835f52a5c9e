"""What families are asked for, and answer with: attention sites, spans, text states, denoiser calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from interp.errors import InterpError

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionSite:
    """One attention module: its name without quantity, e.g. `unet.mid_block.attentions.0.transformer_blocks.0.attn2`.

    kind: `cross` (image → text), `self` (image → image), `joint` (one softmax over text and image) or `text` (text → text);
    grid: (height, width) of the image positions.
    """

    name: str
    module: torch.nn.Module
    kind: str
    heads: int
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Spans:
    """Where image and text lie among the queries and keys of one kernel call; None where a side holds none."""

    image_queries: slice | None = None
    text_queries: slice | None = None
    image_keys: slice | None = None
    text_keys: slice | None = None

    def part(self, part: str) -> tuple[slice, slice]:
        """Return the queries and keys of a part: image → text, image → image, text → image, or text → text."""
        queries = self.text_queries if part in ("text", "within_text") else self.image_queries
        keys = self.text_keys if part in ("cross", "within_text") else self.image_keys
        if queries is None or keys is None:
            raise InterpError(f"this attention has no part {part!r}: it holds {self}")
        return queries, keys


PARTS = {
    "cross": ("cross",), "self": ("self",), "joint": ("cross", "self", "text", "within_text"), "text": ("within_text",),
}  # fmt: skip
"""Kind of a site → the parts of its probabilities, the first one being what a glob means.

`cross` is image → text, `self` image → image, `text` text → image, `within_text` text → text.
"""


@dataclass(frozen=True)
class EncodedPrompt:
    """Text states as the denoiser receives them.

    embeddings (sample, token, feature); pooled (sample, feature); mask (sample, token), 1 where a token is attended to.
    Where prompts are of different lengths and no state stands at the end of the shorter ones, embeddings are NaN there.
    """

    embeddings: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class DenoiserInputs:
    """Arguments of one denoiser call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """A denoiser call that is about to run, as a family needs it to tell the branches.

    arguments: of the pipeline's call, None if it began before the registry was entered; context: the name that the
    pipeline gave the call (`cache_context`), or None; index: denoiser calls since the last `scheduler.step`.
    """

    arguments: Arguments | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    context: str | None
    index: int
