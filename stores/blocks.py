"""Steps of samples on their way into shards, laid out as their chunks: each is encoded as it lies."""

import itertools

import numpy as np

from interp.stores.chunks import fill_value

Place = tuple[int, ...]


class Block:
    """Room for `shape` values (sample, step, …) of one row of chunks along `step`, in memory sample by sample, chunk by chunk.

    A chunk that reaches over the array's edge is filled up with the fill value.
    """

    def __init__(self, shape: tuple[int, ...], inner: tuple[int, ...], dtype: str) -> None:
        counts = [-(-size // chunk) for size, chunk in zip(shape[2:], inner[1:], strict=True)]
        self.shape = shape
        self.places: list[Place] = list(itertools.product(*(range(c) for c in counts)))
        """Of each chunk of a sample, along the dims after `step`."""
        self.chunks = np.empty((shape[0], len(self.places), *inner), dtype)
        """(sample, chunk, step, …)"""
        self.unwritten = shape[0]
        """How many samples are still to be written."""
        self._parts = [
            tuple(slice(p * c, min(size, p * c + c)) for p, c, size in zip(place, inner[1:], shape[2:], strict=True))
            for place in self.places
        ]
        self._rooms = [tuple(slice(0, s.stop - s.start) for s in part) for part in self._parts]
        if shape[1] != inner[0] or any(size % chunk for size, chunk in zip(shape[2:], inner[1:], strict=True)):
            self.chunks[...] = fill_value(dtype)

    def set_step(self, step: int, values: np.ndarray) -> None:
        """Fill in one step, counted from the block's first, of all samples."""
        for k, (part, room) in enumerate(zip(self._parts, self._rooms, strict=True)):
            target = self.chunks[:, k, step]
            target[(slice(None), *room)] = values[(slice(None), *part)]

    def set_all(self, values: np.ndarray) -> None:
        """Fill in all steps of all samples."""
        for k, (part, room) in enumerate(zip(self._parts, self._rooms, strict=True)):
            target = self.chunks[:, k, : self.shape[1]]
            target[(slice(None), slice(None), *room)] = values[(slice(None), slice(None), *part)]
