"""Check a layout before anything is written, and bring the table of samples into its stored form."""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from interp.stores.errors import StoreError
from interp.stores.rows import Rows
from interp.stores.schema import Array, Group, Layout
from interp.stores.table import ROOT_RESERVED

_PART = re.compile(r"[A-Za-z0-9_+\-][A-Za-z0-9_+\-.:]*")
_DTYPES = {
    "str",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "float16",
    "float32",
    "float64",
}


def checked(layout: Layout) -> Layout:
    """Return the layout with complete, typed sample columns and typed coordinates; raise StoreError if it
    cannot be.
    """
    for column in ("prompt", "seed"):
        if column not in layout.samples:
            raise StoreError(f"the table of samples has no column {column!r}; it has {sorted(layout.samples)}")
    n = len(layout)
    defaults: dict[str, Any] = {
        "negative_prompt": [""] * n,
        "condition": ["baseline"] * n,
        "prompt_id": list(range(n)),
        "batch": list(range(n)),
    }
    columns = {name: _column(name, values, n) for name, values in {**defaults, **layout.samples}.items()}
    groups = {name: _group(name, group, n) for name, group in layout.groups.items()}
    return Layout(columns, groups, dict(layout.attrs))


def check_name(path: str) -> None:
    """Raise StoreError unless every part of `path` is a plain name: nothing absolute, empty, hidden or
    `..`.
    """
    if not path or any(not _PART.fullmatch(part) for part in path.split("/")):
        raise StoreError(f"{path!r} cannot name a part of a run; use letters, digits and _ + - . : joined by slashes")


def as_column(values: Any) -> np.ndarray:
    """Return values as int64, float64 or text (object dtype); None becomes NaN among numbers and "" among
    text.
    """
    items = [v.item() if isinstance(v, np.generic) else v for v in np.asarray(values, object).tolist()]
    present = [v for v in items if v is not None and v == v]
    if present and all(isinstance(v, int) for v in present) and len(present) == len(items):
        return np.array([int(v) for v in items], "int64")
    if present and all(isinstance(v, int | float) for v in present):
        return np.array([np.nan if v is None else float(v) for v in items], "float64")
    return np.array(["" if v is None or v != v else str(v) for v in items], object)


def _column(name: str, values: Any, n: int) -> np.ndarray:
    check_name(name)
    if "/" in name or name in ROOT_RESERVED:
        taken = ", ".join(sorted(ROOT_RESERVED))
        raise StoreError(f"a column of the prompt table cannot be called {name!r}; rename it (taken: {taken})")
    if len(values) != n:
        raise StoreError(f"column {name!r} has {len(values)} values for {n} samples; give one for each sample")
    if name in ("seed", "prompt_id", "batch"):
        return np.asarray(values, "int64")
    if name in ("prompt", "negative_prompt", "condition"):
        return np.array(["" if v is None else str(v) for v in values], object)
    return as_column(values)


def _group(name: str, group: Group, n: int) -> Group:
    check_name(name)
    sizes: dict[str, int] = {"sample": n}
    coords = {}
    for key, (dims, raw) in group.coords.items():
        check_name(f"{name}/{key}")
        values = raw if isinstance(raw, Rows) else np.asarray(raw)
        if values.dtype.kind in "UOT" and not isinstance(values, Rows):
            values = np.array([str(v) for v in values.ravel()], object).reshape(values.shape)
        if values.ndim != len(dims):
            raise StoreError(f"coordinate {name}/{key} has dims {dims} but shape {values.shape}; they must agree")
        _agree(name, key, dims, values.shape, sizes)
        coords[key] = (tuple(dims), values)
    arrays = {}
    for key, array in group.arrays.items():
        check_name(f"{name}/{key}")
        arrays[key] = _array(name, key, array, sizes)
    return replace(group, arrays=arrays, coords=coords)


def _array(name: str, key: str, array: Array, sizes: dict[str, int]) -> Array:
    if array.dims[:1] != ("sample",) or "step" in array.dims[2:]:
        raise StoreError(f"{name}/{key} has dims {array.dims}; sample must come first, and step (if any) second")
    if array.dtype not in _DTYPES:
        raise StoreError(f"{name}/{key} cannot be stored as {array.dtype!r}; possible: {', '.join(sorted(_DTYPES))}")
    if array.dtype == "str" and len(array.dims) > 1:
        raise StoreError(f"{name}/{key}: text is stored one string a sample; make its dims ('sample',)")
    _agree(name, key, array.dims, array.shape, sizes)
    return array


def _agree(name: str, key: str, dims: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    for dim, size in zip(dims, shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise StoreError(f"{name}/{key} has {size} along {dim!r} where {sizes[dim]} were expected; make them agree")
