"""Half-precision arrays shown in single precision, converted as they are read.

A sum of a hundred thousand probabilities overflows half precision, and xarray's means and sums keep the dtype: what users
reduce is never of it.
"""

from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing


class _Widened(BackendArray):
    """A variable that is read as float32; only what is asked for is read."""

    def __init__(self, variable: xr.Variable) -> None:
        self.variable, self.shape, self.dtype = variable, variable.shape, np.dtype("float32")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        part = self.variable.isel(dict(zip(self.variable.dims, key, strict=True)))
        return np.asarray(part.values, dtype=self.dtype)


def widened(array: xr.DataArray) -> xr.DataArray:
    """Return the array, of float32 if it is of half precision; nothing is read or copied before it is asked for.

    >>> half = xr.DataArray(np.full(1_000_000, 0.5, "float16"), dims="pixel")
    >>> float(widened(half).mean()), widened(half)[3].dtype
    (0.5, dtype('float32'))
    """
    if array.dtype != np.float16:
        return array
    if array.chunks is not None:
        return array.astype("float32")
    lazy = indexing.MemoryCachedArray(indexing.LazilyIndexedArray(_Widened(array.variable)))
    return xr.DataArray(xr.Variable(array.dims, lazy, array.attrs), array.coords, name=array.name)
