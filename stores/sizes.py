"""How large a run will be on disk, before compression: computed from its layout alone."""

import json
import math
from collections.abc import Mapping

import numpy as np

from interp.stores.chunks import Placement
from interp.stores.codec import encode, padded
from interp.stores.layout_check import checked
from interp.stores.schema import Layout
from interp.stores.skeleton import Node, documents, nodes

_ENTRY = 16
"""Bytes of one chunk in a shard's index."""
_CRC = 4


def layout_bytes(layout: Layout, different: Mapping[str, float] | None = None) -> dict[str, int]:
    """Return the bytes of a finished run's files by array; `""` holds the metadata.

    Compressed arrays (attention) are counted as they are before compression; everything else is exact.

    Args:
        layout: What the run holds.
        different: For arrays that may repeat steps: path → different steps and branches of all samples together.
            Without an entry none repeats.
    """
    layout = checked(layout)
    known = different or {}
    tables: dict[int, int] = {}
    found = {path: _bytes(node, known.get(path), tables) for path, node in nodes(layout).items()}
    written = documents(layout)
    found[""] = sum(len(json.dumps(document, indent=2, allow_nan=False).encode()) for document in written.values())
    return found


def _bytes(node: Node, different: float | None, tables: dict[int, int]) -> int:
    """Return the bytes of one array; `tables` has those of tables, by identity: grids share the labels of their tokens."""
    place = node.placement
    if node.values is not None:
        if id(node.values) not in tables:
            tables[id(node.values)] = _table_bytes(node.values, place)
        return tables[id(node.values)]
    shape = tuple(max(1, s) for s in node.metadata["shape"])
    if node.metadata["shape"][0] == 0:
        return 0
    text = node.metadata["data_type"] == "string"
    size = 4 if text else np.dtype(node.metadata["data_type"]).itemsize
    if place.inner is None:
        return _count(shape, place.outer) * (math.prod(place.outer) * size + _CRC)
    chunks = float(shape[0] * _count(shape[1:], place.inner[1:]))
    if different is not None:
        chunks *= different / (shape[0] * shape[1] * shape[2])
    # what fills the last chunks up is compressed to nothing
    values = math.prod(shape) if place.compress else chunks * math.prod(place.inner)
    return round(values * size + chunks * _CRC) + shape[0] * (math.prod(place.grid) * _ENTRY + _CRC)


def _count(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    return math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True))


def _table_bytes(values: np.ndarray, place: Placement) -> int:
    rows = place.outer[0]
    parts = [padded(values[i : i + rows], place.outer) for i in range(0, values.shape[0], rows)]
    return sum(len(encode(part, compress=place.compress)) for part in parts)
