"""Where an array's values lie on disk: chunk shapes, shards, compression, and the Zarr v3 metadata saying so.

Every chunk ends in a crc32c. The shapes are those measured best for both questions asked of attention, "one
token
at all steps" and "one step, all tokens": about ten steps, one branch, all layers, seven tokens, the whole
grid.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.stores.schema import Array
from interp.stores.table import Storage, find_variable

STEPS, TOKENS = 10, 7
CHUNK_BYTES = 8 << 20
TABLE_ROWS = 128
"""Rows in the chunk of a small table: room to grow in, so that `record` rewrites one file."""
BATCH_ROWS = 64


@dataclass(frozen=True)
class Placement:
    """How one array is cut: `outer` chunks are files; `inner` chunks, if any, lie inside a file (a shard)."""

    outer: tuple[int, ...]
    inner: tuple[int, ...] | None = None
    compress: bool = False

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of inner chunks in a shard along each dim."""
        assert self.inner is not None
        return tuple(o // i for o, i in zip(self.outer, self.inner, strict=True))


def batch_rows(batch: Iterable[int], limit: int = BATCH_ROWS) -> int:
    """Return the largest chunk of samples, at most `limit`, in which no two batches meet.

    Workers own whole batches, so no two of them ever write one chunk. With equal batches that is the batch
    size;
    with none yet, as in a run that only grows (one writer), `limit`.

    >>> batch_rows([0, 0, 0, 0, 1, 1, 1, 1, 2])
    4
    """
    batch = list(batch)
    starts = [i for i in range(1, len(batch)) if batch[i] != batch[i - 1]]
    step = math.gcd(*starts) if starts else 0
    if not step:
        return min(limit, len(batch)) if batch else limit
    return max(d for d in range(1, min(step, limit) + 1) if step % d == 0)


def place(path: str, array: Array, rows: int) -> Placement:
    """Return the placement of an array that is written sample by sample; `rows` is the run's `batch_rows`."""
    row = find_variable(path)
    storage: Storage = row.storage if row else "auto"
    nbytes = math.prod(array.sample_shape) * _itemsize(array.dtype)
    if storage == "auto" and nbytes > 4096 and array.steps and array.steady:
        return _steady(array)
    if storage == "auto":
        storage = "batch" if nbytes <= 4096 else "shard" if array.steps and nbytes > CHUNK_BYTES else "sample"
    rest = tuple(max(1, s) for s in array.sample_shape)
    if storage == "batch":
        return Placement((rows, *rest))
    if storage == "shard":
        return _steady(array) if array.steady else _shard(array)
    return Placement((1, *rest))


def table_placement(shape: tuple[int, ...], dims: tuple[str, ...]) -> Placement:
    """Return the placement of a coordinate or column: one chunk; along `sample`, with room to grow.

    Tables of tokens are cut, so that the few rows which come along with a sample's maps are read without all others'.
    """
    first = max(1, shape[0])
    if dims[:1] == ("sample",):
        first = TABLE_ROWS if len(dims) > 1 else max(first, TABLE_ROWS)
    return Placement((first, *(max(1, s) for s in shape[1:])), compress=True)


def _shard(array: Array) -> Placement:
    sizes = dict(zip(array.dims, array.shape, strict=True))
    inner = dict(sizes) | {"sample": 1}
    for dim, most in (("step", STEPS), ("branch", 1), ("token", TOKENS)):
        if dim in inner:
            inner[dim] = _even(sizes[dim], most)
    for dim in ("head", "layer", "step", "query_y", "channel", "query_x"):
        if math.prod(inner.values()) * _itemsize(array.dtype) > CHUNK_BYTES and dim in inner:
            inner[dim] = 1
    chunk = tuple(max(1, inner[d]) for d in array.dims)
    outer = tuple(-(-max(1, s) // c) * c for s, c in zip(array.shape, chunk, strict=True))
    return Placement((1, *outer[1:]), chunk, compress=True)


def _steady(array: Array) -> Placement:
    """One chunk a step and branch, as it is: equal ones are found and stored once, and lz4 gains little on floats."""
    inner = dict(zip(array.dims, array.shape, strict=True)) | {"sample": 1, "step": 1, "branch": 1}
    for dim in ("layer", "head", "channel", "position"):
        if math.prod(inner.values()) * _itemsize(array.dtype) > CHUNK_BYTES and dim in inner:
            inner[dim] = 1 if dim != "position" else _even(inner[dim], 1024)
    chunk = tuple(max(1, inner.get(d, s)) for d, s in zip(array.dims, array.shape, strict=True))
    outer = tuple(-(-max(1, s) // c) * c for s, c in zip(array.shape, chunk, strict=True))
    return Placement((1, *outer[1:]), chunk)


def _even(size: int, most: int) -> int:
    """Cut `size` into equal parts of at most `most`, so that little padding is written."""
    parts = max(1, -(-size // most))
    return max(1, -(-size // parts))


def _itemsize(dtype: str) -> int:
    return 64 if dtype == "str" else np.dtype(dtype).itemsize


def fill_value(dtype: str) -> Any:
    """Return what stands where nothing was written: NaN, 0 or "". Status, not the value, tells what is
    missing.
    """
    if dtype == "str":
        return ""
    return np.dtype(dtype).type(np.nan if np.dtype(dtype).kind == "f" else 0)


def array_metadata(
    shape: tuple[int, ...], dims: tuple[str, ...], dtype: str, attrs: dict[str, Any], placement: Placement
) -> dict[str, Any]:
    """Return the `zarr.json` of an array."""
    codecs = _codecs(dtype, placement.compress)
    if placement.inner:
        raw = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        configuration = {"chunk_shape": list(placement.inner), "codecs": codecs}
        configuration |= {"index_codecs": raw, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    fill = fill_value(dtype)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": "string" if dtype == "str" else dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(placement.outer)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill if isinstance(fill, str) else "NaN" if fill != fill else fill.item(),
        "codecs": codecs,
        "attributes": attrs,
        "dimension_names": list(dims),
        "storage_transformers": [],
    }


def _codecs(dtype: str, compress: bool) -> list[dict[str, Any]]:
    size = 1 if dtype == "str" else np.dtype(dtype).itemsize
    if dtype == "str":
        first: dict[str, Any] = {"name": "vlen-utf8"}
    else:
        first = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if size > 1 else {})
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": size, "blocksize": 0}
    middle = [{"name": "blosc", "configuration": blosc}] if compress else []
    return [first, *middle, {"name": "crc32c"}]


def placement_of(metadata: dict[str, Any]) -> Placement:
    """Return the placement that an existing array's metadata describe."""
    outer = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codec, codecs, inner = metadata["codecs"][0], metadata["codecs"], None
    if codec["name"] == "sharding_indexed":
        inner, codecs = tuple(codec["configuration"]["chunk_shape"]), codec["configuration"]["codecs"]
    return Placement(outer, inner, any(c["name"] == "blosc" for c in codecs))
