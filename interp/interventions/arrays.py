"""Arrays that interventions hold: as numbers in the spec, or as files of numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError


def kept_path(path: str | Path, what: str) -> str:
    """Return the path of a file of numbers as a spec can hold it.

    Raises:
        InterpError: it has another ending than .npy or .safetensors.
    """
    if Path(path).suffix not in (".npy", ".safetensors"):
        raise InterpError(f"{what}: its file ends in .npy or .safetensors, not {str(path)!r}")
    return str(path)


def given_numbers(given: Any, what: str) -> np.ndarray:
    """Return numbers that were given as an array, a tensor, or a list: float64.

    Raises:
        InterpError: they are none, or not finite.
    """
    try:
        values = np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InterpError(f"{what} is numbers or the path of a file, not a {type(given).__name__}") from error
    if not values.size or not np.isfinite(values).all():
        raise InterpError(f"{what} is finite numbers, not an array of shape {values.shape} with others")
    return values


def read_array(path: str, what: str) -> torch.Tensor:
    """Return the numbers of a file, float32.

    Raises:
        InterpError: it is not there, or does not hold one array of finite numbers.
    """
    if not Path(path).is_file():
        raise InterpError(f"{what}: there is no file {path!r}")
    try:
        found = _arrays(path)
    except Exception as error:  # whatever the readers make of a damaged file, or of one that asks to be unpickled
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InterpError(f"{what}: {path!r} cannot be read as numbers: {first}") from error
    if len(found) != 1:
        raise InterpError(f"{what}: {path!r} holds {len(found)} arrays; keep one a file")
    if not torch.isfinite(found[0]).all():
        raise InterpError(f"{what}: {path!r} holds numbers that are not finite")
    return found[0]


def _arrays(path: str) -> list[torch.Tensor]:
    if path.endswith(".npy"):
        return [torch.from_numpy(np.asarray(np.load(path, allow_pickle=False), dtype=np.float32))]
    from safetensors.torch import load_file

    return [t.float() for t in load_file(path).values()]
