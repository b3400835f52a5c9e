"""A pipeline that is described, and its parts."""

from abc import ABC
from typing import Any, ClassVar

import torch

from interp.compiling import plain


class Described(ABC):  # noqa: B024 - what derives from it has abstract methods
    """Holds the pipeline; families are made of what they know of its call, of its text, and of its denoiser."""

    root: ClassVar[str] = "transformer"
    """The pipeline's attribute that holds the denoiser proper."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Modules called once per evaluation with the same rows; the first is the denoiser proper."""
        return {self.root: plain(getattr(self.pipe, self.root))}

    @property
    def denoiser(self) -> Any:
        """The denoiser proper."""
        return next(iter(self.denoisers.values()))

    @property
    def text_encoders(self) -> dict[str, tuple[Any, torch.nn.Module]]:
        """Name → (tokenizer, encoder), in the order in which the pipeline uses them."""
        found = {}
        for end in ("", "_2", "_3"):
            tokenizer, encoder = (getattr(self.pipe, f"{kind}{end}", None) for kind in ("tokenizer", "text_encoder"))
            if tokenizer is not None and encoder is not None:
                found[f"text_encoder{end}"] = (tokenizer, encoder)
        return found
