"""Latents in 2×2 patches: FLUX and its relatives hand the scheduler (rows, position, channel·4)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange

from interp.errors import InterpError
from interp.families.base import Family
from interp.families.facts import Arguments, AttentionSite, Spans
from interp.families.patches import even_levels, level_shift


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Turn (rows, channel, y, x) into (rows, position, channel·4); positions go row by row."""
    return rearrange(latents, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)


def unpack(latents: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Turn (rows, position, channel·4) into (rows, channel, y, x) of this shape (…, y, x); the inverse of `pack`.

    Raises:
        InterpError: the latents are of another size than the pipeline was called with.
    """
    y, x = shape[-2:]
    if latents.ndim != 3 or latents.shape[1] * 4 != y * x:
        raise InterpError(
            f"packed latents of shape {tuple(latents.shape)} do not fit {y}×{x}; enter the HookRegistry before the pipeline "
            "is called, so that it knows the picture's size"
        )
    return rearrange(latents, "b (y x) (c p q) -> b c (y p) (x q)", y=y // 2, x=x // 2, p=2, q=2)


class PackedFamily(Family):
    """What pipelines with packed latents share: blocks read the text first, then the image, one position a patch.

    Noise levels are evenly spaced, and shifted with the size.
    """

    text_first_blocks: ClassVar[frozenset[str]] = frozenset({"transformer_blocks"})

    def attention_kind(self, path: str, module: Any) -> str:
        """Joint, everywhere."""
        return "joint"

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of 2×2 latents."""
        return max(8, 2 * self.pipe.vae_scale_factor)

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per 2×2 latents."""
        height, width = self.size(arguments)
        step = 2 * self.pipe.vae_scale_factor
        return height // step, width // step

    @property
    def channels(self) -> int:
        """Of a patch, as the transformer predicts it."""
        return int(self.denoiser.config.in_channels)

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """Two latent positions a patch of the transformer, each way."""
        y, x = self.grid(arguments)
        return self.channels // 4, 2 * y, 2 * x

    def unpack(self, latents: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """From patches to a picture of latents."""
        return unpack(latents, self.latent_shape(arguments))

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """From a picture of latents to patches."""
        return pack(latents)

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """The levels, unless the scheduler is to space them, and their shift."""
        shift = {"mu": self.level_shift(arguments)}
        if self.pipe.scheduler.config.get("use_flow_sigmas"):
            return shift
        return {"sigmas": even_levels(int(arguments["num_inference_steps"])), **shift}

    def level_shift(self, arguments: Arguments) -> float:
        """Of the noise levels, by the number of patches."""
        return level_shift(self.pipe.scheduler.config, self.grid(arguments))

    def packed_inputs(self, arguments: Arguments) -> dict[str, Any]:
        """Of a denoiser call with one row, what all of them are given: patches, time, and text states."""
        config, dtype, (y, x) = self.denoiser.config, self.denoiser.dtype, self.grid(arguments)
        return {
            "hidden_states": torch.empty(1, y * x, config.in_channels, dtype=dtype),
            "timestep": torch.ones(1, dtype=dtype),
            "encoder_hidden_states": torch.empty(
                1, self.text_length(arguments), config.joint_attention_dim, dtype=dtype
            ),
        }

    def blank_output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """As many positions as the latents have."""
        hidden = kwargs["hidden_states"]
        return hidden.new_empty((*hidden.shape[:-1], self.channels))

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is given a thousandth of it, rounded to its dtype: the scheduler knows better."""

    def spans(self, site: AttentionSite, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Spans:
        """The text first, then the image; also in one-stream blocks, which see one sequence."""
        text = int(kwargs["encoder_hidden_states"].shape[1])
        first, image = slice(0, text), slice(text, queries)
        return Spans(image, first, image, first)
