"""Write one shard, a block of steps at a time: the file that Zarr's `sharding_indexed` codec describes.

zarr-python can only write a whole shard at once, which would keep a whole sample's attention in memory. Where a chunk
holds one step, a chunk that is equal to an earlier step's is not written again: the index names the same bytes twice,
which every Zarr reader follows.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from io import FileIO
from pathlib import Path

import numpy as np

from interp.stores.blocks import Block, Place
from interp.stores.chunks import Placement
from interp.stores.codec import ChecksumError, checksummed, decode, encode_parts
from interp.stores.files import publish, write_back

MISSING = np.uint64(2**64 - 1)
POOLED_BYTES = 1 << 20
"""Blocks larger than this are encoded by several threads; the codec leaves Python's lock alone."""
ENCODERS = min(4, max(1, (os.cpu_count() or 1) // 2))

Encoded = Iterable[tuple[bytes | memoryview, bytes]]
"""Of each chunk of a block, its bytes and their checksum."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(ENCODERS, thread_name_prefix="interp-encode")


def encoded(chunks: np.ndarray, placement: Placement) -> Encoded:
    """Encode chunks (chunk, …): large ones from now on in other threads, small ones when they are iterated over."""
    encoding = partial(encode_parts, compress=placement.compress)
    if chunks.nbytes > POOLED_BYTES and len(chunks) > 1:
        return _pool().map(encoding, chunks)
    return map(encoding, chunks)


class ShardFile:
    """A shard under construction, in a `.partial` file until `finish`.

    The file is open only while a block is written: a large batch has more shards than a process may have open files.
    """

    def __init__(self, path: Path, target: Path, placement: Placement) -> None:
        self.partial, self.target, self.placement = path, target, placement
        self._index = np.full((*placement.grid, 2), MISSING, "<u8")
        self._offset = 0
        path.unlink(missing_ok=True)
        self._seen: dict[bytes, tuple[int, int]] = {}  # of single steps: what was written, and where it lies

    def add_all(self, values: np.ndarray) -> None:
        """Encode and append all steps of one sample (dims without sample)."""
        assert self.placement.inner is not None
        inner = self.placement.inner[1:]
        for start in range(0, values.shape[0], inner[0]):
            part = values[None, start : start + inner[0]]
            block = Block(part.shape, inner, values.dtype.name)
            block.set_all(part)
            self.add(start, block.places, encoded(block.chunks[0], self.placement))

    def add(self, start: int, places: Sequence[Place], chunks: Encoded) -> None:
        """Append encoded chunks of one sample's steps from `start` on, which lie at `places` along the other dims."""
        assert self.placement.inner is not None
        first, begun, once = start // self.placement.inner[1], self._offset, self.placement.inner[1] == 1
        with self.partial.open("ab", buffering=0) as file:
            for place, (data, check) in zip(places, chunks, strict=True):
                self._index[(0, first, *place)] = self._written(file, data, check, once=once)
            write_back(file.fileno(), begun, self._offset - begun)

    def _written(self, file: FileIO, data: bytes | memoryview, check: bytes, *, once: bool) -> tuple[int, int]:
        """Write a chunk, unless it is there already; return its offset and length."""
        length = len(data) + len(check)
        digest = hashlib.blake2b(data, digest_size=16).digest() if once else b""
        if once and digest in self._seen:
            return self._seen[digest]
        found = self._offset, length
        self._write(file, data)
        self._write(file, check)
        if once:
            self._seen[digest] = found
        return found

    def close(self) -> tuple[Path, Path]:
        """Append the index; return (partial, target), which `publish` takes."""
        with self.partial.open("ab", buffering=0) as file:
            begun = self._offset
            self._write(file, checksummed(self._index.tobytes()))
            write_back(file.fileno(), begun, 0)
        return self.partial, self.target

    def finish(self) -> None:
        """Append the index, make the file durable and give it its real name."""
        publish([self.close()])

    def abandon(self) -> None:
        """Delete the unfinished file."""
        self.partial.unlink(missing_ok=True)

    def _write(self, file: FileIO, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = file.write(view)
            self._offset += written
            view = view[written:]


def read_index(path: Path, placement: Placement) -> np.ndarray:
    """Return offset and length of every inner chunk, (*grid, 2); ChecksumError if the index is damaged."""
    shape = (*placement.grid, 2)
    size = int(np.prod(shape)) * 8 + 4
    with path.open("rb", buffering=0) as file:
        if file.seek(0, os.SEEK_END) < size:
            raise ChecksumError("it is shorter than its index")
        file.seek(-size, os.SEEK_END)
        return decode(file.read(), "uint64", shape, compress=False)
