"""Append samples to a run on disk: the rows first, then every shape at once, by swapping the root's
metadata.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from interp.stores.chunks import placement_of
from interp.stores.codec import encode, padded
from interp.stores.errors import StoreError
from interp.stores.files import PARTIAL, plain, write_file, write_json
from interp.stores.layout_check import checked
from interp.stores.schema import Group, Layout, TokenTable
from interp.stores.skeleton import chunk_file, read_table


def grown(layout: Layout, samples: Mapping[str, Any], tokens: Mapping[str, TokenTable]) -> Layout:
    """Return the layout with samples appended; StoreError if they do not fit it."""
    n, more = len(layout), len(next(iter(samples.values()), ()))
    tail = checked(Layout(dict(samples), {}))
    if {*samples} - {*layout.samples}:
        extra, known = sorted({*samples} - {*layout.samples}), sorted(layout.samples)
        raise StoreError(f"this run has no columns {extra}; a grown run keeps its columns: {known}")
    columns = {}
    for name, values in layout.samples.items():
        new = tail.samples.get(name)
        if new is None:
            new = np.full(more, "" if values.dtype == object else 0, values.dtype)
        columns[name] = np.concatenate([values, new.astype(values.dtype)])
    groups = {name: _grown_group(name, group, n, more, tokens.get(name)) for name, group in layout.groups.items()}
    return Layout(columns, groups, layout.attrs)


def _grown_group(name: str, group: Group, n: int, more: int, tokens: TokenTable | None) -> Group:
    coords = {}
    new: dict[str, Any] = {}
    if tokens is not None and "token_id" in group.coords:
        new = tokens.padded(group.coords["token_id"][1].shape[1]).coords()
    for key, (dims, values) in group.coords.items():
        if dims[:1] == ("sample",):
            if key not in new or len(new[key][1]) != more:
                raise StoreError(f"{more} samples are to be added, but {name}/{key} has no rows for them; pass tokens")
            values = np.concatenate([values, np.asarray(new[key][1], values.dtype)])
        coords[key] = (dims, values)
    arrays = {k: replace(a, shape=(n + more, *a.shape[1:])) for k, a in group.arrays.items()}
    return replace(group, arrays=arrays, coords=coords)


def grow_files(
    path: Path,
    layout: Layout,
    samples: Mapping[str, Any],
    tokens: Mapping[str, TokenTable],
    attrs: Mapping[str, Any],
) -> Layout:
    """Append samples to the run at `path`, which a reader sees all at once or not at all."""
    new = grown(layout, samples, tokens)
    n, total = len(layout), len(new)
    root = json.loads((path / "zarr.json").read_text())
    listed = root["consolidated_metadata"]["metadata"]
    values: dict[str, np.ndarray] = {"sample": np.arange(total, dtype="int64"), **new.samples}
    for group_name, group in new.groups.items():
        values |= {f"{group_name}/{k}": v for k, (dims, v) in group.coords.items() if dims[:1] == ("sample",)}
    for name, column in values.items():
        append_rows(path / name, column, listed[name], n)
    for name, metadata in listed.items():
        if metadata["node_type"] == "array" and metadata["dimension_names"][:1] == ["sample"]:
            metadata["shape"][0] = total
            write_json(path / name, metadata)
    root["attributes"] |= plain(dict(attrs))
    write_json(path, root)
    return new


def append_rows(folder: Path, values: np.ndarray, metadata: dict[str, Any], n: int) -> None:
    """Write the chunks of a table that hold rows from `n` on; rows before `n` stay what they were."""
    place = placement_of(metadata)
    rows = place.outer[0]
    for first in range(n - n % rows, len(values), rows):
        data = encode(padded(values[first : first + rows], place.outer), compress=place.compress)
        target = chunk_file(folder, first // rows, values.ndim)
        write_file(folder / f".{first // rows}{PARTIAL}", target, data)


def without_tables(layout: Layout, n: int) -> Layout:
    """Return the layout of `n` samples without what is known of each: a writer has no use for it, and it may be much."""
    groups = {}
    for name, group in layout.groups.items():
        arrays = {k: replace(a, shape=(n, *a.shape[1:])) for k, a in group.arrays.items()}
        coords = {k: (dims, None if dims[:1] == ("sample",) else v) for k, (dims, v) in group.coords.items()}
        groups[name] = replace(group, arrays=arrays, coords=coords)
    return Layout({}, groups, layout.attrs, size=n)


def with_tables(path: Path, layout: Layout) -> Layout:
    """Return a layout `without_tables` with those that lie in the run at `path`."""
    listed = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]

    def read(name: str) -> np.ndarray:
        return read_table(path / name, listed[name], placement_of(listed[name]))

    own = ("sample", "status", "error")
    columns = [n for n, found in listed.items() if found["node_type"] == "array" and "/" not in n and n not in own]
    groups = {}
    for name, group in layout.groups.items():
        coords = {
            k: (dims, read(f"{name}/{k}") if dims[:1] == ("sample",) else v) for k, (dims, v) in group.coords.items()
        }
        groups[name] = replace(group, coords=coords)
    return Layout({name: read(name) for name in columns}, groups, layout.attrs)
