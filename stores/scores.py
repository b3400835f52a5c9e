"""Add scores to a run: one chunk a metric, then the root's metadata, so that a reader sees all or nothing
new.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from interp.stores.chunks import TABLE_ROWS, Placement, array_metadata
from interp.stores.codec import encode, padded
from interp.stores.errors import StoreError
from interp.stores.files import PARTIAL, make_folder, write_file, write_json
from interp.stores.schema import Array
from interp.stores.skeleton import group_metadata, with_consolidated
from interp.stores.table import SCORES_NODE, node_rows

Attrs = Mapping[str, Mapping[str, Any]]
"""Attributes of the node by name: metric → JSON value."""

_METRIC_ROWS = 64


def write_scores(
    tree: xr.DataTree,
    path: str | Path | None,
    rows: np.ndarray | None,
    metrics: Mapping[str, Any],
    attrs: Attrs,
) -> xr.DataTree:
    """Write metrics (name → one value a sample of `tree`) and attrs of the node; return the tree with them."""
    n = int(tree.sizes["sample"])
    new = {}
    for name, values in metrics.items():
        found = np.asarray(values, "float32")
        if not isinstance(name, str) or not name:
            raise StoreError(f"a metric is called {name!r}; name it by text such as 'clip:prompt'")
        if found.shape != (n,):
            raise StoreError(f"scores {name!r} have shape {found.shape} for {n} samples; give one value for each")
        new[name] = found
    if path is not None:
        if not isinstance(path, Path):
            raise StoreError(f"scores cannot be written to {path}; copy the run to a local folder first")
        _write(path, np.arange(n) if rows is None else rows, new, attrs)
    return _with_scores(tree, new, attrs)


def _merged(old: Mapping[str, Any], new: Attrs) -> dict[str, Any]:
    """Return attrs of the node in which the entries of some metrics are replaced."""
    return {**old, **{name: {**old.get(name, {}), **entries} for name, entries in new.items()}}


def _with_scores(tree: xr.DataTree, new: dict[str, np.ndarray], attrs: Attrs) -> xr.DataTree:
    kept: dict[str, np.ndarray] = {}
    before: dict[str, Any] = {}
    if SCORES_NODE in tree.children:
        old = tree.children[SCORES_NODE].to_dataset(inherit=False)
        kept = {str(m): old["score"].values[:, k] for k, m in enumerate(old["metric"].values)}
        before = {str(k): v for k, v in old.attrs.items()}
    both = kept | new
    n = int(tree.sizes["sample"])
    values = np.stack(list(both.values()), 1) if both else np.empty((n, 0), "float32")
    row = node_rows(SCORES_NODE)["score"]
    metric = np.array(list(both), np.dtypes.StringDType())
    described = {"description": row.meaning, "units": row.units}
    variables = {"score": (row.dims, values, described)}
    scores = xr.Dataset(variables, {"metric": ("metric", metric)}, _merged(before, attrs))
    changed = tree.copy()
    changed[SCORES_NODE] = xr.DataTree(scores)
    return changed


def _write(path: Path, rows: np.ndarray, new: dict[str, np.ndarray], attrs: Attrs) -> None:
    root = json.loads((path / "zarr.json").read_text())
    listed = root["consolidated_metadata"]["metadata"]
    n = listed["sample"]["shape"][0]
    stored = listed.get(f"{SCORES_NODE}/score")
    tall = stored["chunk_grid"]["configuration"]["chunk_shape"][0] if stored else max(n, TABLE_ROWS)
    names: list[str] = []
    before_attrs = listed[SCORES_NODE]["attributes"] if SCORES_NODE in listed else {}
    if stored and 0 not in stored["shape"]:
        with xr.open_zarr(path, group=SCORES_NODE, chunks=None) as old:
            before = old["score"].load()
        names = [str(m) for m in before["metric"].values]
    folder = path / SCORES_NODE
    score, metric = Placement((tall, 1)), Placement((_METRIC_ROWS,), compress=True)
    for target in (folder / "score", folder / "metric"):
        make_folder(target)
    for name, values in new.items():
        column = np.full(n, np.nan, "float32")
        if name in names:
            column[:] = before.values[:, names.index(name)]
        column[rows] = values
        names += [] if name in names else [name]
        for first in range(0, n, tall):
            data = encode(padded(column[first : first + tall, None], score.outer), compress=False)
            place = f"{first // tall}/{names.index(name)}"
            write_file(
                folder / "score" / f".{place.replace('/', '.')}{PARTIAL}",
                folder / "score" / "c" / place,
                data,
            )
    for first in range(0, len(names), _METRIC_ROWS):
        data = encode(padded(np.array(names[first : first + _METRIC_ROWS], object), metric.outer), compress=True)
        part = first // _METRIC_ROWS
        write_file(folder / "metric" / f".{part}{PARTIAL}", folder / "metric" / "c" / str(part), data)
    row = node_rows(SCORES_NODE)["score"]
    array = Array(row.dims, (n, len(names)), row.dtype, {"description": row.meaning, "units": row.units})
    documents = {
        SCORES_NODE: group_metadata(_merged(before_attrs, attrs) | {"coordinates": "metric"}),
        f"{SCORES_NODE}/score": array_metadata(array.shape, array.dims, array.dtype, array.attrs, score),
        f"{SCORES_NODE}/metric": array_metadata((len(names),), ("metric",), "str", {}, metric),
    }
    for place, document in documents.items():
        write_json(path / place, document)
    write_json(path, with_consolidated(root, {**listed, **documents}))
