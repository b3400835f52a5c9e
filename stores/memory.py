"""A run kept in memory, with the interface and the tree of one on disk."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.core.indexing import LazilyIndexedArray

from interp.stores.chunks import fill_value
from interp.stores.files import plain
from interp.stores.growth import grown
from interp.stores.repeats import Repeats
from interp.stores.schema import Layout, TokenTable
from interp.stores.skeleton import documents
from interp.stores.table import DONE
from interp.stores.writer import RunWriter

if TYPE_CHECKING:
    from interp.stores.reader import Run


class MemoryWriter(RunWriter):
    """Keeps the arrays of a run in memory."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, np.zeros(len(layout), "int8"))
        # not filled: a run's arrays are large, and what is committed is whole; `_blank` fills what is not
        self._data = {name: _room(array.shape, array.dtype) for name, array in self._arrays.items() if not array.steady}
        self._repeats = {
            name: Repeats(array.shape, array.dtype) for name, array in self._arrays.items() if array.steady
        }
        self._error = _filled((len(layout),), "str")
        self._documents = documents(layout)

    @property
    def run(self) -> "Run":
        """The run as it is now; its arrays are the writer's, not copies."""
        from interp.stores.reader import Run

        for i in np.flatnonzero(self._status != DONE):
            self._blank(int(i))
        return Run(self._tree())

    def grow(  # noqa: D102
        self,
        samples: Mapping[str, Any],
        tokens: Mapping[str, TokenTable] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> range:
        old = len(self)
        self.layout = grown(self.layout, samples, tokens or {})
        self._documents[""]["attributes"] |= plain(dict(attrs or {}))
        self._arrays = self.layout.arrays
        more = len(self.layout) - old
        for name, data in self._data.items():
            self._data[name] = np.concatenate([data, _room((more, *data.shape[1:]), self._arrays[name].dtype)])
        for repeats in self._repeats.values():
            repeats.grow(more)
        self._error = np.concatenate([self._error, _filled((more,), "str")])
        self._status = np.concatenate([self._status, np.zeros(more, "int8")])
        return range(old, old + more)

    def _add(self, samples: tuple[int, ...], name: str, step: int, blocks: np.ndarray) -> None:
        for i, block in zip(samples, blocks, strict=True):
            if name in self._repeats:
                self._repeats[name].write(i, step, block)
            else:
                self._data[name][i, step] = block

    def _put(self, i: int, name: str, value: np.ndarray) -> None:
        if name in self._repeats:
            for step, block in enumerate(value):
                self._repeats[name].write(i, step, block)
        else:
            self._data[name][i] = value

    def _discard(self, i: int) -> None:
        for repeats in self._repeats.values():
            repeats.clear(i)

    def _blank(self, i: int) -> None:
        """Fill what is not written of a sample that is not done."""
        progress = self._progress.get(i, {})
        for name, data in self._data.items():
            written = progress.get(name, 0)
            if self._arrays[name].steps:
                data[i, written:] = fill_value(self._arrays[name].dtype)
            elif not written:
                data[i] = fill_value(self._arrays[name].dtype)

    def _finish(self, i: int, status: int, error: str) -> None:
        self._error[i] = error
        self._status[i] = status

    def _values(self, name: str) -> Any:
        return LazilyIndexedArray(self._repeats[name]) if name in self._repeats else _text(self._data[name])

    def _attrs(self, name: str) -> dict[str, Any]:
        attrs = dict(self._documents[name]["attributes"])
        attrs.pop("coordinates", None)
        return attrs

    def _tree(self) -> xr.DataTree:
        layout = self.layout
        root = {name: (("sample",), values) for name, values in layout.samples.items()}
        root |= {"status": (("sample",), self._status.copy()), "error": (("sample",), self._error)}
        variables = {name: (dims, _text(v), self._attrs(name)) for name, (dims, v) in root.items()}
        index = {"sample": ("sample", np.arange(len(layout)), self._attrs("sample"))}
        parts = {"/": xr.Dataset(variables, index, self._attrs(""))}
        for group_name, group in layout.groups.items():
            arrays = {
                name: (array.dims, self._values(f"{group_name}/{name}"), plain(array.attrs))
                for name, array in group.arrays.items()
            }
            coords = {
                name: (dims, _text(np.asarray(values)), self._attrs(f"{group_name}/{name}"))
                for name, (dims, values) in group.coords.items()
            }
            parts[group_name] = xr.Dataset(arrays, coords, self._attrs(group_name))
        return xr.DataTree.from_dict(parts)


def _room(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.empty(shape, object if dtype == "str" else dtype)


def _filled(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.full(shape, fill_value(dtype), object if dtype == "str" else dtype)


def _text(values: np.ndarray) -> np.ndarray:
    """Return text as numpy's variable-width strings, as a run opened from disk has it."""
    return values.astype(np.dtypes.StringDType()) if values.dtype == object else values
