"""An array of a run with the labels that one asks by: its samples' condition, prompt_id and seed among them."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from interp.stores.widening import widened

FEW = 1 << 15
"""Labels of one coordinate that are read as a whole when an array is first asked for."""
AXES = ("condition", "prompt_id", "seed")


def axes_of(tree: xr.DataTree) -> dict[str, xr.DataArray]:
    """Return the columns of the table of samples that label every array, read if there are not too many."""
    root = tree.to_dataset(inherit=False)
    return {name: _read(root[name]) for name in AXES if name in root}


def labelled(node: xr.DataTree, name: str, axes: Mapping[str, xr.DataArray]) -> xr.DataArray:
    """Return a variable of `node` with its labels and `axes`; half precision as float32.

    Labels are read here, if there are not too many: else each sample's array would read a dozen files.
    """
    array = node.data_vars[name]
    few = {n: _read(c) for n, c in array.coords.items() if n not in array.indexes}
    return widened(array).assign_coords({**few, **axes})


def _read(array: xr.DataArray) -> xr.DataArray:
    return array.compute() if array.size <= FEW else array


def as_python(values: np.ndarray) -> np.ndarray:
    """Return text as Python strings, which pandas turns into its own; numbers as they are."""
    return values if values.dtype.kind in "iufb" else values.astype(object)
