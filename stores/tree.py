"""The tree of a run in a folder, made from the root's metadata alone, as xarray's own reader of Zarr makes it."""

from pathlib import Path
from typing import Any

import xarray as xr
from xarray.core import indexing

from interp.stores.chunks import array_metadata, placement_of
from interp.stores.stored_array import StoredArray

_MEANT = {"_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned", "dtype", "calendar", "coordinates"}
"""Attributes of an array by which xarray would change its values or place."""


def read_tree(path: Path, root: dict[str, Any]) -> xr.DataTree | None:
    """Return the tree of the run at `path`, whose root's metadata are `root`; None if it holds arrays of others.

    What indexes are made of is read, the rest when it is asked for. The tree equals that of `xr.open_datatree`.
    """
    listed = root["consolidated_metadata"]["metadata"]
    arrays = {name: found for name, found in listed.items() if found["node_type"] == "array"}
    if not all(map(_is_ours, arrays.values())):
        return None
    groups = {"": root} | {name: found for name, found in listed.items() if found["node_type"] == "group"}
    members: dict[str, dict[str, xr.Variable]] = {name: {} for name in groups}
    for name, found in arrays.items():
        group, _, key = name.rpartition("/")
        members[group][key] = _variable(path / name, key, found)
    return xr.DataTree.from_dict({f"/{name}": _dataset(members[name], found) for name, found in groups.items()})


def _is_ours(found: dict[str, Any]) -> bool:
    """Whether an array is as this package writes it, and xarray would show it as it is."""
    attrs = found.get("attributes") or {}
    if attrs.get("units", "1") != "1" or attrs.keys() & _MEANT:
        return False
    dtype = "str" if found["data_type"] == "string" else found["data_type"]
    shape, dims = tuple(found["shape"]), tuple(found["dimension_names"])
    return bool(found == array_metadata(shape, dims, dtype, attrs, placement_of(found)))


def _variable(folder: Path, name: str, found: dict[str, Any]) -> xr.Variable:
    stored, dims = StoredArray(folder, found), tuple(found["dimension_names"])
    if dims == (name,):
        return xr.Variable(dims, stored.read((slice(None),)), found["attributes"])
    lazy: Any = indexing.LazilyIndexedArray(stored)
    return xr.Variable(dims, indexing.MemoryCachedArray(indexing.CopyOnWriteArray(lazy)), found["attributes"])


def _dataset(members: dict[str, xr.Variable], group: dict[str, Any]) -> xr.Dataset:
    attrs = dict(group.get("attributes") or {})
    named = {*str(attrs.pop("coordinates", "")).split(), *(n for n, v in members.items() if v.dims == (n,))}
    data = {n: v for n, v in members.items() if n not in named}
    return xr.Dataset(data, {n: v for n, v in members.items() if n in named}, attrs)
