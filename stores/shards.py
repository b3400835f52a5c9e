"""Write one shard, a block of steps at a time: the file that Zarr's `sharding_indexed` codec describes.

zarr-python can only write a whole shard at once, which would keep a whole sample's attention in memory. Where a chunk
holds one step, a chunk that is equal to an earlier step's is not written again: the index names the same bytes twice,
which every Zarr reader follows.
"""

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from interp.stores.chunks import Placement
from interp.stores.codec import ChecksumError, checksummed, decode, encode, padded
from interp.stores.files import settle

MISSING = np.uint64(2**64 - 1)


class ShardFile:
    """A shard under construction, in a `.partial` file until `finish`."""

    def __init__(self, partial: Path, target: Path, placement: Placement) -> None:
        self.partial, self.target, self.placement = partial, target, placement
        self._index = np.full((*placement.grid, 2), MISSING, "<u8")
        self._file = partial.open("wb", buffering=0)
        self._offset = 0
        self._seen: dict[bytes, tuple[int, int]] = {}  # of single steps: what was written, and where it lies

    def add(self, start: int, block: np.ndarray) -> None:
        """Encode and append `block`, one sample's steps from `start` on (dims without sample); whole inner
        chunks.
        """
        assert self.placement.inner is not None
        inner = self.placement.inner[1:]
        counts = [-(-size // chunk) for size, chunk in zip(block.shape, inner, strict=True)]
        first, begun = start // inner[0], self._offset
        for place in itertools.product(*(range(c) for c in counts)):
            part = block[tuple(slice(p * c, p * c + c) for p, c in zip(place, inner, strict=True))]
            data = encode(padded(part, inner), compress=self.placement.compress)
            self._index[(0, first + place[0], *place[1:])] = self._written(data, once=inner[0] == 1)
        if hasattr(os, "posix_fadvise"):  # Linux starts to write these pages out now, so `finish` waits less
            os.posix_fadvise(self._file.fileno(), begun, self._offset - begun, os.POSIX_FADV_DONTNEED)

    def _written(self, data: bytes, *, once: bool) -> tuple[int, int]:
        """Write a chunk, unless it is there already; return its offset and length."""
        if not once:
            self._write(data)
            return self._offset - len(data), len(data)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._seen:
            self._seen[digest] = (self._offset, len(data))
            self._write(data)
        return self._seen[digest]

    def finish(self) -> None:
        """Append the index, make the file durable and give it its real name."""
        self._write(checksummed(self._index.tobytes()))
        os.fsync(self._file.fileno())
        self._file.close()
        settle(self.partial, self.target)

    def abandon(self) -> None:
        """Close and delete the unfinished file."""
        self._file.close()
        self.partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._file.write(view)
            self._offset += written
            view = view[written:]


def read_index(path: Path, placement: Placement) -> np.ndarray:
    """Return offset and length of every inner chunk, (*grid, 2); ChecksumError if the index is damaged."""
    shape = (*placement.grid, 2)
    size = int(np.prod(shape)) * 8 + 4
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < size:
            raise ChecksumError("it is shorter than its index")
        file.seek(-size, os.SEEK_END)
        return decode(file.read(), "uint64", shape, compress=False)
