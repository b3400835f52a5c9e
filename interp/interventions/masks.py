"""Parts of the picture: masks of any shape and resolution, brought to the grid of a site."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from interp.errors import InterpError
from interp.interventions.arrays import given_numbers, kept_path, read_array

Mask = str | tuple[tuple[int, ...], ...]
"""The path of a file, or rows of 0 and 1."""
WHAT = "a mask"


def kept_mask(given: Any) -> Mask:
    """Return a mask as a spec can hold it.

    Raises:
        InterpError: it is neither (height, width) nor the path of a .npy or .safetensors file, or holds nothing.
    """
    if isinstance(given, (str, Path)):
        return kept_path(given, WHAT)
    return tuple(tuple(row) for row in _checked(torch.from_numpy(given_numbers(given, WHAT)), WHAT).int().tolist())


def read_mask(mask: Mask) -> torch.Tensor:
    """Return a mask: bool (height, width).

    Raises:
        InterpError: its file is not there, or holds something else.
    """
    if not isinstance(mask, str):
        return torch.tensor(mask).bool()
    file = Path(mask)
    return _read(mask, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=8)
def _read(path: str, written: int) -> torch.Tensor:
    return _checked(read_array(path, WHAT), f"{WHAT} ({path!r})")


def _checked(values: torch.Tensor, what: str) -> torch.Tensor:
    if values.ndim != 2 or not values.any():
        raise InterpError(
            f"{what} is (height, width), of any resolution, and above 0 somewhere; this is {tuple(values.shape)}"
            f"{'' if values.any() else ' of zeros'}"
        )
    return values > 0


def on_grid(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the cells (y, x) of a grid of which a mask holds at least half.

    >>> on_grid(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool(), (1, 2)).tolist()
    [[True, False]]
    """
    return F.interpolate(mask[None, None].float(), size=grid, mode="area")[0, 0] >= 0.5
