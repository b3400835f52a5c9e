"""One array of a run in a folder, read chunk by chunk as it is asked for: what lies behind an opened run's variables.

Zarr itself reads the same files. This reads one of our arrays with less in between: a chunk is checked and decoded in a
thread, and what is wanted of it goes straight to its place.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from interp.stores.chunks import fill_value, placement_of
from interp.stores.codec import ChecksumError, decoded
from interp.stores.errors import StoreError
from interp.stores.shards import MISSING, read_index

POOLED_BYTES = 1 << 18
"""Chunks larger than this are read by several threads: the codec leaves Python's lock alone."""
READERS = min(8, os.cpu_count() or 1)
TEXT = np.dtypes.StringDType()

Key = int | slice | np.ndarray
Part = tuple[int, Key, slice | None]
"""Along one dim: number of a chunk, what is wanted of it, and where that goes (None: the dim is dropped)."""
Parts = tuple[Part, ...]
Run = Callable[..., Iterator[None]]
"""`map`, or that of a pool."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="interp-read")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked


class StoredArray(BackendArray):
    """The array in `folder` that `metadata` describe. Where nothing was written it holds its fill value.

    A table (whose chunks hold many samples) keeps the chunk that was read last: samples are mostly asked for in order.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self.folder, self.metadata = folder, metadata
        self.shape = tuple(metadata["shape"])
        self._place = placement_of(metadata)
        self._kind = "str" if metadata["data_type"] == "string" else str(metadata["data_type"])
        self.dtype = TEXT if self._kind == "str" else np.dtype(self._kind)
        self._last: tuple[tuple[int, ...], np.ndarray] | None = None

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return StoredArray, (self.folder, self.metadata)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self.read)

    def read(self, key: tuple[Key, ...]) -> np.ndarray:
        """Return the values at `key`: along each dim a number, a slice with a positive step, or ascending numbers.

        Raises:
            StoreError: a file is damaged, or cannot be read.
        """
        parts = [list(_parts(k, size, c)) for k, size, c in zip(key, self.shape, self._chunk, strict=True)]
        kept = [(k, n) for k, n in zip(key, self.shape, strict=True) if not isinstance(k, int | np.integer)]
        out = np.empty([_length(k, n) for k, n in kept], self.dtype)
        files: dict[tuple[int, ...], list[Parts]] = {}
        for wanted in itertools.product(*parts):
            file = tuple(p[0] * c // o for p, c, o in zip(wanted, self._chunk, self._place.outer, strict=True))
            files.setdefault(file, []).append(wanted)
        many = len(files) > 1 and self._is_large
        among_files, among_chunks = (_pool().map, map) if many else (map, _pool().map)  # never one pool in itself
        _each(among_files, lambda item: self._read_file(out, item[0], item[1], among_chunks), files.items())
        return out

    def _read_file(self, out: np.ndarray, number: tuple[int, ...], wanted: list[Parts], run: Run) -> None:
        """Read what is wanted of one file into `out`."""
        path, last = self.folder.joinpath("c", *map(str, number)), self._last
        try:
            if last is not None and last[0] == number:
                _put(out, last[1], wanted[0])
            elif self._place.inner is None:
                values = self._decoded(path.read_bytes())
                if self._place.outer[0] > 1 and self._place.compress:
                    self._last = number, values
                _put(out, values, wanted[0])
            else:
                self._read_shard(out, path, wanted, run)
        except FileNotFoundError:  # a sample that is to be made
            for parts in wanted:
                self._leave_out(out, parts)
        except (ChecksumError, OSError) as error:
            raise StoreError(f"{path} cannot be read: {error}; interp verify tells what is damaged") from error

    def _read_shard(self, out: np.ndarray, path: Path, wanted: list[Parts], run: Run) -> None:
        place, index = self._place, read_index(path, self._place)

        def one(parts: Parts) -> None:
            start, length = (int(v) for v in index[tuple(p[0] % n for p, n in zip(parts, place.grid, strict=True))])
            if start == MISSING:
                self._leave_out(out, parts)
            else:
                _put(out, self._decoded(_bytes(path, start, length)), parts)

        _each(run if len(wanted) > 1 and self._is_large else map, one, wanted)

    @property
    def _chunk(self) -> tuple[int, ...]:
        return self._place.inner or self._place.outer

    @property
    def _is_large(self) -> bool:
        return math.prod(self._chunk) * self.dtype.itemsize > POOLED_BYTES

    def _leave_out(self, out: np.ndarray, parts: Parts) -> None:
        out[_places(parts)] = fill_value(self._kind)

    def _decoded(self, data: bytes) -> np.ndarray:
        values = decoded(data, self._kind, self._chunk, compress=self._place.compress)
        return values.astype(TEXT) if self._kind == "str" else values


def _bytes(path: Path, start: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        if start + length > file.seek(0, os.SEEK_END):
            raise ChecksumError("its index names bytes beyond its end")
        file.seek(start)
        return file.read(length)


def _each(run: Run, do: Callable[[Any], None], items: Iterable[Any]) -> None:
    for _ in run(do, items):
        pass


def _parts(key: Key, size: int, chunk: int) -> Iterator[Part]:
    """Cut what is wanted along one dim at the borders of its chunks."""
    if isinstance(key, int | np.integer):
        yield int(key) // chunk, int(key) % chunk, None
    elif isinstance(key, slice):
        start, stop, step = key.indices(size)
        place = 0
        while start < stop:
            number = start // chunk
            end = min(stop, (number + 1) * chunk)
            count = -(-(end - start) // step)
            yield number, slice(start - number * chunk, end - number * chunk, step), slice(place, place + count)
            place, start = place + count, start + count * step
    else:
        numbers = key // chunk
        for number in np.unique(numbers):
            at = np.flatnonzero(numbers == number)
            yield (
                int(number),
                key[at] - number * chunk,
                slice(int(at[0]), int(at[-1]) + 1),
            )  # ascending, so in one piece


def _length(key: Key, size: int) -> int:
    return len(range(*key.indices(size))) if isinstance(key, slice) else len(key)  # type: ignore[arg-type]


def _places(parts: Parts) -> tuple[slice, ...]:
    return tuple(place for *_, place in parts if place is not None)


def _put(out: np.ndarray, values: np.ndarray, parts: Parts) -> None:
    """Put what is wanted of a chunk in its place."""
    plain = tuple(slice(None) if isinstance(k, np.ndarray) else k for _, k, _ in parts)
    taken, axis = values[plain], 0
    for _, key, place in parts:
        if isinstance(key, np.ndarray):
            taken = np.take(taken, key, axis)
        axis += place is not None
    out[_places(parts)] = taken
