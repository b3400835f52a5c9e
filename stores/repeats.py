"""Arrays in memory that hold what is equal at many steps once, and look like ordinary ones to xarray."""

from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from interp.stores.chunks import fill_value

UNWRITTEN = -1


class Repeats(BackendArray):
    """An array (sample, step, …); each sample's different steps are kept once."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._number = np.full(shape[:2], UNWRITTEN)
        self._blocks: list[dict[bytes, tuple[int, np.ndarray]]] = [{} for _ in range(shape[0])]

    def write(self, i: int, step: int, block: np.ndarray) -> None:
        """Set one step of a sample."""
        kept = self._blocks[i]
        block = np.ascontiguousarray(block, self.dtype)
        number, _ = kept.setdefault(block.tobytes(), (len(kept), block))
        self._number[i, step] = number

    def clear(self, i: int) -> None:
        """Forget a sample."""
        self._number[i] = UNWRITTEN
        self._blocks[i] = {}

    def grow(self, more: int) -> None:
        """Append samples."""
        self.shape = (self.shape[0] + more, *self.shape[1:])
        self._number = np.concatenate([self._number, np.full((more, self.shape[1]), UNWRITTEN)])
        self._blocks += [{} for _ in range(more)]

    @property
    def held(self) -> int:
        """Bytes really held."""
        return sum(block.nbytes for kept in self._blocks for _, block in kept.values())

    def __getitem__(self, key: Any) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._basic)

    def _basic(self, key: tuple[Any, ...]) -> np.ndarray:
        samples, steps = np.arange(self.shape[0])[key[0]], key[1]
        parts = [self._steps(int(i), steps, key[2:]) for i in np.atleast_1d(samples)]
        return parts[0] if np.ndim(samples) == 0 else self._stacked(parts, key)

    def _stacked(self, parts: list[np.ndarray], key: tuple[Any, ...]) -> np.ndarray:
        if parts:
            return np.stack(parts)
        rest = np.empty((0, *self.shape[1:]), self.dtype)
        return rest[(slice(None), *key[1:])]

    def _steps(self, i: int, steps: Any, rest: tuple[Any, ...]) -> np.ndarray:
        blocks = {number: block[rest] for number, block in self._blocks[i].values()}
        blocks[UNWRITTEN] = np.full(self.shape[2:], fill_value(self.dtype.name), self.dtype)[rest]
        numbers = self._number[i][steps]
        if np.ndim(numbers) == 0:
            return np.array(blocks[int(numbers)])
        if not len(numbers):
            return np.empty((0, *blocks[UNWRITTEN].shape), self.dtype)
        return np.stack([blocks[int(n)] for n in numbers])
