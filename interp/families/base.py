"""What a model family knows: where attention is, in which order branches come, how a prompt becomes tokens.

A family is a class with a `matches(pipe)` static method, found through the entry-point group `interp.families`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from interp.errors import InterpError, sentence_list


@dataclass(frozen=True)
class AttentionSite:
    """One attention module: its name without quantity, e.g. `unet.mid_block.attentions.0.transformer_blocks.0.attn2`.

    kind: `cross` (image → text) or `self` (image → image); grid: (height, width) of the query positions.
    """

    name: str
    module: torch.nn.Module
    kind: str
    heads: int
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class EncodedPrompt:
    """Text states as the denoiser receives them: embeddings (sample, token, feature), pooled (sample, feature)."""

    embeddings: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class DenoiserInputs:
    """Shapes of one denoiser call, enough for a dry run without computing anything."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Family(ABC):
    """The facts about one pipeline object. Subclass it, and name the class in the group `interp.families`."""

    name: ClassVar[str]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @staticmethod
    @abstractmethod
    def matches(pipe: Any) -> bool:
        """Tell whether this family describes `pipe`."""

    @property
    @abstractmethod
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Modules called once per evaluation with all branches as rows; the first is the denoiser proper."""

    @property
    def denoiser(self) -> torch.nn.Module:
        """The denoiser proper."""
        return next(iter(self.denoisers.values()))

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        """Name → (tokenizer, encoder), in the order in which the pipeline uses them."""

    @abstractmethod
    def branches(self) -> tuple[str, ...]:
        """Branches in row order of the running call, e.g. ("uncond", "cond"); read while the pipeline runs."""

    @abstractmethod
    def guided(self, guidance_scale: float) -> bool:
        """Tell whether a call with this guidance scale evaluates the branch without text."""

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """All attention modules of the denoiser, in the order in which they run, without grids."""

    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a call that names no size."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channel, y, x) of the latents for a picture of this size."""

    @abstractmethod
    def dry_inputs(self, height: int, width: int) -> DenoiserInputs:
        """Inputs of one denoiser call with one row, made within the caller's (fake) tensor mode."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> EncodedPrompt:
        """Encode prompts exactly as the pipeline does for the branch with text."""

    @abstractmethod
    def text_inputs(self, kwargs: dict[str, Any]) -> EncodedPrompt:
        """Read the text states out of a denoiser call's keyword arguments (all rows)."""

    @abstractmethod
    def with_text(self, kwargs: dict[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Return the denoiser call's keyword arguments with other text states; the given dict is not touched."""


def families() -> dict[str, type[Family]]:
    """Return every installed family by name."""
    from interp.probes.discovery import load_plugins

    return load_plugins("interp.families")


def find_family(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        InterpError: no installed family describes it.
    """
    known = families()
    for cls in known.values():
        if cls.matches(pipe):
            return cls(pipe)
    raise InterpError(
        f"no model family describes a {type(pipe).__name__}; installed families: {sentence_list(known)}; "
        "a family for it can be added through the entry-point group 'interp.families'"
    )
