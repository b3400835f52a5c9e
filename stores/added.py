"""Add a group to a finished run: its data first, then the root's metadata, so that a reader sees all or nothing."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from interp.stores.chunks import Placement, fill_value
from interp.stores.codec import encode
from interp.stores.errors import StoreError
from interp.stores.files import PARTIAL, make_folder, plain, write_file, write_json
from interp.stores.layout_check import checked
from interp.stores.schema import Group, Layout
from interp.stores.shards import ShardFile
from interp.stores.skeleton import Node, chunk_file, documents, nodes, with_consolidated, write_table

Block = tuple[int, dict[str, np.ndarray]]
"""Position of a sample in the run, and its values by variable (dims without sample)."""


def add_group(
    tree: xr.DataTree, path: Any, rows: np.ndarray | None, name: str, group: Group, blocks: Iterable[Block]
) -> None:
    """Write a group sample by sample; a group of that name is replaced. Samples without a block hold fill values.

    Args:
        tree: The run, or a selection of it; in memory it is changed in place.
        path: Where the run lies, or None.
        rows: Numbers in the stored run of a selection's samples, or None for a whole run.
        name: One new name at the root.
        group: Its arrays, whose first dim is `sample`, all the run's samples.
        blocks: The samples' values, in any order; taken one by one.
    """
    if path is not None and not isinstance(path, Path):
        raise StoreError(f"{name} cannot be written to {path}; copy the run to a local folder first")
    if path is None:
        _in_memory(tree, name, group, blocks)
    else:
        numbers = np.arange(int(tree.sizes["sample"])) if rows is None else rows
        _on_disk(path, numbers, name, group, blocks)


def _in_memory(tree: xr.DataTree, name: str, group: Group, blocks: Iterable[Block]) -> None:
    data = {n: np.full(a.shape, fill_value(a.dtype), a.dtype) for n, a in group.arrays.items()}
    for i, values in blocks:
        for key, value in values.items():
            data[key][i] = value
    arrays = {n: (a.dims, data[n], plain(a.attrs)) for n, a in group.arrays.items()}
    coords = {n: (dims, np.asarray(values)) for n, (dims, values) in group.coords.items()}
    tree[name] = xr.DataTree(xr.Dataset(arrays, coords, plain(group.attrs)))


def _on_disk(path: Path, numbers: np.ndarray, name: str, group: Group, blocks: Iterable[Block]) -> None:
    root = json.loads((path / "zarr.json").read_text())
    listed = root["consolidated_metadata"]["metadata"]
    if any(n == name or n.startswith(f"{name}/") for n in listed):  # readers first forget what is to be replaced
        listed = {n: d for n, d in listed.items() if n != name and not n.startswith(f"{name}/")}
        write_json(path, with_consolidated(root, listed))
    shutil.rmtree(path / name, ignore_errors=True)
    n = listed["sample"]["shape"][0]
    layout = checked(Layout({"prompt": [""] * n, "seed": [0] * n}, {name: group}))
    made = {p: node for p, node in nodes(layout).items() if p.startswith(f"{name}/")}
    for place, node in made.items():
        make_folder(path / place)
        if node.values is not None and node.values.size:
            write_table(path / place, node.values, node.placement)
    left = set(range(n))
    for i, values in blocks:
        left.discard(int(numbers[i]))
        for key, value in values.items():
            _write(
                path / name / key, int(numbers[i]), np.asarray(value, group.arrays[key].dtype), made[f"{name}/{key}"]
            )
    for i in sorted(left):  # a chunk that is missing always means damage
        for key, array in group.arrays.items():
            _write(
                path / name / key,
                i,
                np.full(array.sample_shape, fill_value(array.dtype), array.dtype),
                made[f"{name}/{key}"],
            )
    written = {p: d for p, d in documents(layout).items() if p == name or p.startswith(f"{name}/")}
    for place, document in written.items():
        write_json(path / place, document)
    write_json(path, with_consolidated(root, {**listed, **written}))


def _write(folder: Path, i: int, value: np.ndarray, node: Node) -> None:
    place: Placement = node.placement
    partial, target = folder / f".{i}{PARTIAL}", chunk_file(folder, i, len(place.outer))
    if place.inner is None:
        if place.outer[0] != 1:
            raise StoreError(f"{folder.name} is too small to be added to a run sample by sample; store it as a score")
        write_file(partial, target, encode(value.reshape(place.outer), compress=place.compress))
        return
    shard = ShardFile(partial, target, place)
    shard.add_all(value)
    shard.finish()
