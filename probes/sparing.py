"""Runs larger than the memory: the arrays that a probe gets from a run's shortcuts are read piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from interp.stores import Run

LARGE = 256 * 2**20  # bytes: a smaller array is left as it is, since dask costs more than it saves there
STEPS_AT_ONCE = 10  # the height of a stored chunk of attention


class SparingRun(Run):
    """A run whose shortcuts (`run.latents`, `run.attention()`, …) give dask arrays where an array is large.

    One chunk holds one sample (of attention ten steps), so that `run.latents.mean("x")` over a thousand samples
    needs the memory of a few. `run.tree` is what is stored, untouched. A selection is sparing again.

    >>> from interp.stores import synthetic_run
    >>> run = SparingRun(synthetic_run(samples=2, steps=6).tree, large=0)
    >>> run.latents.chunksizes["sample"], run.isel(1).latents.chunksizes["sample"]
    ((1, 1), (1,))
    """

    def __init__(self, tree: xr.DataTree, path: Any = None, rows: np.ndarray | None = None, *, large: int = LARGE):
        super().__init__(tree, path, rows)
        self.large = large

    def isel(self, sample: Any) -> Run:
        """Return the run of the samples at these positions, sparing too."""
        part = super().isel(sample)
        return SparingRun(part.tree, part.path, part._rows, large=self.large)

    def _labelled(self, node: xr.DataTree, name: str) -> xr.DataArray:
        labelled = super()._labelled(node, name)
        return labelled.chunk(_pieces(labelled)) if self._divisible(labelled) else labelled

    def _dataset(self, node: str, field: str | None) -> xr.Dataset:
        dataset = super()._dataset(node, field)
        large = {k: v.chunk(_pieces(v)) for k, v in dataset.data_vars.items() if self._divisible(v)}
        return dataset.assign(large)

    def _divisible(self, array: xr.DataArray) -> bool:
        return array.chunks is None and "sample" in array.dims and array.ndim > 2 and array.nbytes > self.large


def sparing(run: Run) -> Run:
    """Return the run with shortcuts that spare the memory; a run that lies in memory is returned as it is."""
    return run if run.path is None or isinstance(run, SparingRun) else SparingRun(run.tree, run.path, run._rows)


def _pieces(array: xr.DataArray) -> dict[str, int]:
    pieces = {"sample": 1}
    if {"step", "layer"} <= set(array.dims):
        pieces["step"] = STEPS_AT_ONCE
    return pieces
