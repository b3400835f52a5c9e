"""Choose samples by position, and arrange them as condition × prompt_id × seed."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.stores.errors import StoreError, nearest

_AXES = ("condition", "prompt_id", "seed")


def positions(sample: Any, n: int) -> np.ndarray:
    """Return the positions that an int, slice, list or boolean mask chooses among `n` samples."""
    if isinstance(sample, slice):
        return np.arange(n)[sample]
    chosen = np.atleast_1d(np.asarray(sample))
    if chosen.dtype == bool:
        if len(chosen) != n:
            raise StoreError(f"a mask of {len(chosen)} was given for {n} samples; give one value for each sample")
        return np.flatnonzero(chosen)
    if chosen.dtype.kind not in "iu" and chosen.size:
        raise StoreError(
            f"samples were chosen by {sample!r}; give positions, a slice or a mask, or use sel(column=value)"
        )
    chosen = chosen.astype("int64")
    bad = chosen[(chosen < -n) | (chosen >= n)]
    if len(bad):
        raise StoreError(f"sample {bad[0]} was asked for, but there are {n}, numbered from 0 to {n - 1}")
    return chosen % n if n else chosen


def matching(table: pd.DataFrame, columns: Mapping[str, Any]) -> np.ndarray:
    """Return which rows of the table of samples have these values in these columns; a list means any of them."""
    keep = np.ones(len(table), bool)
    for name, value in columns.items():
        if name not in table.columns:
            known = sorted(str(c) for c in table.columns)
            raise StoreError(f"samples have no column {name!r}; they have: {', '.join(known)}{nearest(name, known)}")
        many = isinstance(value, Iterable) and not isinstance(value, str)
        wanted = list(value) if many else [value]
        absent = [v for v in wanted if not (table[name] == v).any()]
        if absent:
            known = [str(v) for v in dict.fromkeys(table[name])]
            more = "" if len(known) <= 8 else f" and {len(known) - 8} more"
            hint = nearest(str(absent[0]), known)
            raise StoreError(f"no sample has {name} {absent[0]!r}; there are: {', '.join(known[:8])}{more}{hint}")
        keep &= table[name].isin(wanted).to_numpy()
    return keep


def unstack(tree: xr.DataTree, table: pd.DataFrame) -> xr.DataTree:
    """Return the tree with dims condition × prompt_id × seed instead of sample, through dask."""
    keys = table[list(_AXES)]
    twice = keys[keys.duplicated()]
    if len(twice):
        condition, prompt_id, seed = twice.iloc[0]
        raise StoreError(
            f"samples cannot be arranged as condition × prompt_id × seed: two have condition {condition!r}, "
            f"prompt_id {prompt_id} and seed {seed}; select the samples you want first"
        )
    axes = {name: list(dict.fromkeys(keys[name])) for name in _AXES}
    shape = tuple(len(v) for v in axes.values())
    codes = [pd.Categorical(keys[name], categories=axes[name]).codes.astype("int64") for name in _AXES]
    where = np.full(math.prod(shape), -1)
    where[np.ravel_multi_index(codes, shape)] = np.arange(len(table))
    coords = {
        name: np.asarray(values, np.dtypes.StringDType() if name == "condition" else "int64")
        for name, values in axes.items()
    }
    parts = {}
    for node in tree.subtree:
        data = node.to_dataset(inherit=False).drop_vars(["sample", *_AXES], errors="ignore")
        new = data.map(_arrange, where=where, shape=shape, keep_attrs=True)
        new = new.assign_coords({n: _arrange(c.reset_coords(drop=True), where, shape) for n, c in data.coords.items()})
        new.attrs = data.attrs
        parts[node.path] = new.assign_coords(coords) if node.path == tree.path else new
    return xr.DataTree.from_dict(parts)


def _arrange(array: xr.DataArray, where: np.ndarray, shape: tuple[int, ...]) -> xr.DataArray:
    if "sample" not in array.dims:
        return array
    text = array.dtype.kind not in "iufb"
    chunks = {"sample": len(where) if text else 1}
    lazy = (array if text else array.chunk(chunks)).drop_vars(array.coords, errors="ignore")
    if (where < 0).any():
        absent = xr.DataArray(where < 0, dims="sample")
        lazy = lazy.isel(sample=np.maximum(where, 0))
        lazy = lazy.where(~absent, "") if text else lazy.where(~absent)
    else:
        lazy = lazy.isel(sample=where)
    rest = [d for d in array.dims if d != "sample"]
    data = lazy.transpose("sample", *rest).data
    data = data.reshape((*shape, *data.shape[1:]))
    return xr.DataArray(data, dims=(*_AXES, *rest), attrs=array.attrs, name=array.name)
