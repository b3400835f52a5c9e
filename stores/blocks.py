"""Steps of one sample on their way into a shard, laid out as its chunks: each is encoded as it lies."""

import itertools

import numpy as np

from interp.stores.chunks import fill_value

Place = tuple[int, ...]


class Block:
    """Room for `shape` values (step, …) of one row of chunks along `step`, in memory chunk by chunk.

    A chunk that reaches over the array's edge is filled up with the fill value.
    """

    def __init__(self, shape: tuple[int, ...], inner: tuple[int, ...], dtype: str) -> None:
        counts = [-(-size // chunk) for size, chunk in zip(shape[1:], inner[1:], strict=True)]
        self.shape = shape
        self.places: list[Place] = list(itertools.product(*(range(c) for c in counts)))
        """Of each chunk, along the dims after `step`."""
        self.chunks = np.empty((len(self.places), *inner), dtype)
        self._parts = [
            tuple(slice(p * c, min(size, p * c + c)) for p, c, size in zip(place, inner[1:], shape[1:], strict=True))
            for place in self.places
        ]
        self._rooms = [tuple(slice(0, s.stop - s.start) for s in part) for part in self._parts]
        if shape[0] != inner[0] or any(size % chunk for size, chunk in zip(shape[1:], inner[1:], strict=True)):
            self.chunks[...] = fill_value(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.chunks.nbytes

    def set_step(self, step: int, values: np.ndarray) -> None:
        """Fill in one step, counted from the block's first."""
        for chunk, part, room in zip(self.chunks, self._parts, self._rooms, strict=True):
            chunk[(step, *room)] = values[part]

    def set_all(self, values: np.ndarray) -> None:
        """Fill in all steps."""
        for chunk, part, room in zip(self.chunks, self._parts, self._rooms, strict=True):
            chunk[(slice(0, self.shape[0]), *room)] = values[(slice(None), *part)]
