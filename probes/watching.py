"""Whether a probe reads a run piece by piece: arrays that note how many samples each reading of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from dask.callbacks import Callback
from xarray.backends import BackendArray
from xarray.core import indexing

from interp.probes.base import Probe
from interp.probes.sparing import SparingRun
from interp.stores import Run

MANY = 8  # samples of the run that is watched
SMALL = 3  # dims: tables such as guidance_scale (sample, step) may be read whole


class _Watched(BackendArray):
    """An array in memory that is read like one on disk, and notes how many samples each reading takes."""

    def __init__(self, values: np.ndarray, path: str, log: dict[str, _Reading]) -> None:
        self.values, self.path, self.log = values, path, log
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        found = self.values
        for axis, part in enumerate(key):
            one = part if isinstance(part, slice) else np.atleast_1d(part)
            found = found[(slice(None),) * axis + (one,)]
        reading = self.log.setdefault(self.path, _Reading(self.values.nbytes))
        reading.most = max(reading.most, len(found))
        return found.reshape([n for n, part in zip(found.shape, key, strict=True) if not isinstance(part, int)])


@dataclass
class _Reading:
    """Of one array: its size, and the most samples that were held at once."""

    size: int
    most: int = 0


class _Results(Callback):
    """Notes a dask computation whose result is nearly as large as an array that went into it."""

    def __init__(self, log: dict[str, _Reading], samples: int) -> None:
        super().__init__()
        self.log, self.samples = log, samples

    def _finish(self, graph: Any, state: Any, failed: bool) -> None:
        held = sum(getattr(value, "nbytes", 0) for value in state["cache"].values())
        for reading in self.log.values():
            if held > reading.size / 2:
                reading.most = self.samples


def bounded(probe: Probe, run: Run, **params: Any) -> None:
    """Ask the probe of a run whose arrays are watched; AssertionError if it reads a large one whole.

    run: at least 8 samples. Large is what has more than three dims, the first of them `sample`: latents, attention,
    images, not their thumbnails. A probe passes by reading sample by sample (`array.isel(sample=i).values`) or by
    leaving the shortcuts' arrays lazy (`run.latents.mean("x")`).

    >>> from interp.probes import find_probe
    >>> from interp.stores import synthetic_run
    >>> bounded(find_probe("frequency_energy"), synthetic_run(samples=8))
    """
    log: dict[str, _Reading] = {}
    nodes = {}
    for node in run.tree.subtree:
        dataset = node.to_dataset(inherit=False)
        watched = {}
        for name, v in dataset.data_vars.items():
            if v.ndim > SMALL and name != "thumb" and v.dims[0] == "sample" and v.dtype.kind in "fiub":
                stored = _Watched(v.values, f"{node.path}/{name}".strip("/"), log)
                watched[str(name)] = xr.Variable(v.dims, indexing.LazilyIndexedArray(stored), v.attrs)
        nodes[node.path] = dataset.assign(watched)
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs.update(run.tree.attrs)
    with _Results(log, len(run)):
        probe.fn(SparingRun(tree, large=0), **params)  # not the probe itself, which loads a small result
    for path, reading in log.items():
        assert reading.most < len(run) / 2, (
            f"{path} was read {reading.most} of {len(run)} samples at a time: a run may be larger than the memory, so "
            f"read sample by sample (isel(sample=i).values), or leave arrays lazy"
        )
