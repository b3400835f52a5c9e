"""Spreading maps over the pixels that belong together: a walk along self-attention, from a pixel to those it looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.maps import chosen_steps, resize
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run


@dataclass(frozen=True)
class Paths:
    """Self-attention of the finest grid that has it, in chosen steps; probs is lazy (sample, step, layer, head, …)."""

    height: int
    width: int
    probs: xr.DataArray

    def of(self, i: int) -> np.ndarray:
        """Return one sample's chance to go from each pixel to each other, (pixel, pixel), its rows adding up to 1.

        The mean over steps, layers and heads, read step by step; steps at which the branch was not evaluated are left out.
        """
        size = self.height * self.width
        total = np.zeros((size, size))
        for step in range(self.probs.sizes["step"]):
            one = self.probs.isel(sample=i, step=step).values.reshape(-1, size, size)
            for head in one if np.isfinite(one).all() else ():
                total += head
        with np.errstate(invalid="ignore"):
            return total / total.sum(1, keepdims=True)


def paths(run: Run, *, steps: Any = None, branch: str = "cond") -> Paths | None:
    """Return the run's self-attention of the finest grid that was captured whole, None if there is none."""
    children = run.tree["self_attention"].children if "self_attention" in run.tree.children else {}
    found = []
    for node in children.values():
        dataset = node.to_dataset()
        sizes = dataset.sizes
        branches = [str(b) for b in dataset["branch"].values]
        whole = (sizes["query_y"], sizes["query_x"]) == (sizes["key_y"], sizes["key_x"])  # not so for a region alone
        if whole and branch in branches:
            probs = dataset["probs"].isel(
                branch=branches.index(branch), step=chosen_steps(dataset["step"].values, steps)
            )
            found.append(Paths(sizes["query_y"], sizes["query_x"], probs))
    return max(found, key=lambda p: p.height * p.width, default=None)


def walks(run: Run, times: int | None, default: int, *, steps: Any = None) -> tuple[int, Paths | None]:
    """Return how often maps are to walk, and along what: `default` times where the run allows if `times` is None.

    Raises InterpError for a number below 0, and if self-attention is asked for that was not captured.
    """
    if times is not None and (not isinstance(times, int) or times < 0):
        raise InterpError(
            f"spread={times!r} is not possible: it is None or a number of walks along self-attention, 0 or more"
        )
    along = None if times == 0 else paths(run, steps=steps)
    if times and along is None:
        raise InterpError(
            f"spread={times} needs self-attention of the whole picture, which this run did not capture: trace again with "
            'Capture(attention="all"), or leave spread out'
        )
    return (default if times is None else times) if along is not None else 0, along


def walked(maps: np.ndarray, along: Paths, chances: np.ndarray, times: int) -> np.ndarray:
    """Return maps (map, y, x) after some walks: each pixel gets the mean of the pixels it looks at, `times` over.

    chances: (pixel, pixel), as `Paths.of` gives it. Maps of another grid are resized there and back. NaN maps stay NaN.

    >>> import xarray as xr
    >>> square = Paths(1, 2, xr.DataArray())
    >>> walked(np.array([[[4.0, 0.0]]]), square, np.array([[0.5, 0.5], [0.0, 1.0]]), 1).tolist()
    [[[2.0, 0.0]]]
    """
    height, width = maps.shape[1:]
    low = -np.inf
    found = np.full(maps.shape, np.nan)
    there = np.isfinite(maps).all((1, 2))
    spread = resize(maps[there], along.height, along.width, low=low).reshape(int(there.sum()), -1)
    for _ in range(times):
        spread = spread @ chances.T
    found[there] = resize(spread.reshape(-1, along.height, along.width), height, width, low=low)
    return found
