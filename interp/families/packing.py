"""Latents in 2×2 patches: FLUX and its relatives hand the scheduler (rows, position, channel·4)."""

import torch
from einops import rearrange

from interp.errors import InterpError


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Turn (rows, channel, y, x) into (rows, position, channel·4); positions go row by row."""
    return rearrange(latents, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)


def unpack(latents: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Turn (rows, position, channel·4) into (rows, channel, y, x) of this shape; the inverse of `pack`.

    Raises:
        InterpError: the latents are of another size than the pipeline was called with.
    """
    _, y, x = shape
    if latents.ndim != 3 or latents.shape[1] * 4 != y * x:
        raise InterpError(
            f"packed latents of shape {tuple(latents.shape)} do not fit {y}×{x}; enter the HookRegistry before the pipeline "
            "is called, so that it knows the picture's size"
        )
    return rearrange(latents, "b (y x) (c p q) -> b c (y p) (x q)", y=y // 2, x=x // 2, p=2, q=2)
