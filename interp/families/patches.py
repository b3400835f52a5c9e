"""Transformers that see latents in square patches, and noise levels that move with the number of patches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from interp.families.base import Family
from interp.families.facts import Arguments


class PatchedFamily(Family):
    """What transformers share that take a picture of latents and cut it into patches themselves."""

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per patch of the latents."""
        _, y, x = self.latent_shape(arguments)
        side = self.denoiser.config.patch_size
        return y // side, x // side


def even_levels(steps: int) -> np.ndarray:
    """Noise levels from 1 to 1/steps at equal distances, as several pipelines pass to the scheduler."""
    return np.linspace(1.0, 1 / steps, steps)


def level_shift(scheduler: Mapping[str, Any], grid: tuple[int, int], most: float = 1.15) -> float:
    """The shift of the noise levels for a picture of so many patches; `most` is the pipeline's default for large ones."""
    names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", most))
    return float(calculate_shift(grid[0] * grid[1], *(scheduler.get(name, default) for name, default in names)))
