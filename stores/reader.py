"""A run that is read: `Run`, an `xr.DataTree` with labelled shortcuts."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.stores.added import add_group
from interp.stores.describe import describe
from interp.stores.errors import StoreError, nearest
from interp.stores.labels import as_python, axes_of, labelled
from interp.stores.schema import Group
from interp.stores.scores import write_scores
from interp.stores.select import matching, positions, unstack
from interp.stores.table import DONE, TOKEN_FILL

_CAPTURED_BY = {
    "latents": "Capture(latents=True)",
    "noise_pred": "Capture(noise_pred=True)",
    "image": "Capture(image=True)",
    "final_latents": "Capture(latents=True)",
    "score": None,
}


class Run:
    """A run of samples. `run.tree` is the whole of it, an ordinary `xr.DataTree`; the rest are shortcuts
    into it.

    Nothing is loaded until its values are asked for. A selection (`condition`, `sel`, `isel`, `done`) is a
    run again.
    """

    def __init__(self, tree: xr.DataTree, path: str | Path | None = None, rows: np.ndarray | None = None) -> None:
        self.tree = tree
        self.path = path
        self._rows = rows
        """Numbers in the stored run of a selection's samples; None for a whole run."""
        self._labelled_arrays: dict[str, tuple[xr.Variable, xr.DataArray]] = {}
        """By path: a variable of the tree, and the array made of it, of which copies are given out."""

    # The table of samples

    @property
    def attrs(self) -> dict[str, Any]:
        """What the run was made with: pipeline, scheduler, steps, capture, conditions, …."""
        return {str(k): v for k, v in self.tree.attrs.items()}

    @cached_property
    def samples(self) -> pd.DataFrame:
        """The table of samples: prompt, seed, condition, status, …, one row a sample (index `sample`)."""
        root = self.tree.to_dataset(inherit=False)
        columns = {str(n): as_python(v.values) for n, v in root.data_vars.items() if v.dims == ("sample",)}
        return pd.DataFrame(columns, index=pd.Index(root["sample"].values, name="sample"))

    def __len__(self) -> int:
        return int(self.tree.sizes["sample"])

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions, in the order in which they first occur."""
        return [str(c) for c in dict.fromkeys(self.samples["condition"])]

    # Shortcuts to the data

    @property
    def trajectory(self) -> xr.Dataset:
        """All that goes along the trajectory: latents, noise_pred, guidance_scale, nfe and the steps."""
        return self._dataset("trajectory", "Capture(latents=True)")

    @property
    def latents(self) -> xr.DataArray:
        """x_t entering each step (sample, step, channel, y, x), in the units of the model's latents."""
        return self._array("trajectory", "latents")

    @property
    def final_latents(self) -> xr.DataArray:
        """Latents after the last step (sample, channel, y, x)."""
        return self._array("trajectory", "final_latents")

    @property
    def noise_pred(self) -> xr.DataArray:
        """Raw model output (sample, step, branch, channel, y, x); NaN where a branch was not evaluated."""
        return self._array("trajectory", "noise_pred")

    @property
    def guidance(self) -> xr.DataArray:
        """The guidance term c − u (sample, step, channel, y, x), what the text changes in the model output.

        NaN where one branch was not evaluated. `run.guidance * run.trajectory.guidance_scale` is w·(c − u).
        """
        noise = self.noise_pred
        return noise.sel(branch="cond", drop=True) - noise.sel(branch="uncond", drop=True)

    @property
    def nfe(self) -> xr.DataArray:
        """Forward passes really run (sample, branch)."""
        return self._array("trajectory", "nfe")

    @property
    def images(self) -> xr.DataArray:
        """Images (sample, height, width, rgb) uint8; those of samples that are not done are black: use
        `run.done`.
        """
        return self._array("images", "image")

    @property
    def x0(self) -> xr.DataArray:
        """x̂0 decoded at each step (sample, step, height, width, rgb) uint8, once `interp score RUN -m x0` wrote it."""
        if "x0" not in self.tree.children:
            raise StoreError("x0 was asked for, but this run has none; run `interp score RUN --metric x0` first")
        return self._labelled(self.tree.children["x0"], "image")

    @property
    def scores(self) -> xr.DataArray:
        """Scores (sample, metric), metrics named `<metric>:<column>`; NaN where a sample was not scored."""
        if "scores" not in self.tree.children:
            raise StoreError("scores were asked for, but this run has none; run `interp score RUN` first")
        return self._array("scores", "score")

    @property
    def grids(self) -> list[str]:
        """Names of the attention grids, `"32x32"`, the finest first."""
        found = self.tree.children.get("attention")
        names = list(found.children) if found is not None else []
        return sorted(names, key=lambda g: -int(np.prod([int(p) for p in g.split("x")])))

    def attention(self, grid: str | None = None) -> xr.DataArray:
        """Attention from image to text (sample, step, branch, layer, head, token, query_y, query_x) of one
        grid.

        `grid` is `"<height>x<width>"`; it may be left out when there is just one.
        """
        return self._labelled(self._attention_node(grid), "probs")

    def tokens(self, grid: str | None = None) -> xr.Dataset:
        """The token table of a grid: token_text, token_id, token_role, token_word, token_count (sample,
        token).

        Without `grid` that of the finest: the tables of one run's grids agree.
        """
        node = self._attention_node(grid or (self.grids[0] if self.grids else None))
        names = [n for n in TOKEN_FILL if n in node.coords]
        table = node.to_dataset(inherit=True)
        return table.drop_vars([v for v in table.variables if v not in {*names, "sample"}]).reset_coords(names)

    @property
    def sites(self) -> list[str]:
        """Names of the captured sites (`unet.mid_block:out`) and reductions."""
        found = self.tree.children.get("sites")
        nodes = found.children if found is not None else {}
        return [str(node.attrs.get("site", name)) for name, node in nodes.items()]

    def site(self, name: str) -> xr.DataArray:
        """What passed at a captured site, or a reduction (sample, step, branch, …); `:out` may be left out."""
        known, wanted = self.sites, name.removesuffix(":out")
        if wanted not in (n.removesuffix(":out") for n in known):
            if not known:
                raise self._lacking(f"site {name!r}", f"Capture(sites=({name!r},))")
            raise StoreError(f"this run has no site {name!r}{nearest(name, known)}; it has: {', '.join(known)}")
        return self._labelled(self.tree.children["sites"].children[wanted], "value")

    # Selections

    def isel(self, sample: Any) -> "Run":
        """Return the run of the samples at these positions: an int, slice, list, or boolean mask."""
        rows = positions(sample, len(self))
        chosen: Any = rows
        if len(rows) and len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():
            chosen = slice(int(rows[0]), int(rows[-1]) + 1)  # a slice reads whole chunks, a list each by itself
        base = np.arange(len(self)) if self._rows is None else self._rows
        return Run(self.tree.isel(sample=chosen), self.path, base[rows])

    def sel(self, **columns: Any) -> "Run":
        """Return the run of the samples whose columns have these values; a list means any of them.

        >>> run.sel(condition="baseline", seed=[0, 1])  # doctest: +SKIP
        """
        return self.isel(matching(self.samples, columns))

    def condition(self, name: str) -> "Run":
        """Return the run of the samples made under one condition."""
        return self.sel(condition=name)

    @property
    def done(self) -> "Run":
        """The run of the finished samples."""
        return self.isel(self.samples["status"].to_numpy() == DONE)

    def reopened(self) -> "Run":
        """Return the run of the same samples with what has been written since it was opened."""
        if self.path is None:
            return self
        from interp.stores.opening import open_run

        run = open_run(self.path)
        return run if self._rows is None else run.isel(self._rows)

    def unstack(self) -> xr.DataTree:
        """Return the tree with dims condition × prompt_id × seed in place of sample; dask arrays, loaded
        piece by piece.

        Combinations that the run lacks are NaN. StoreError if two samples share one combination.
        """
        return unstack(self.tree, self.samples)

    # What is added, and what is asked

    def write_scores(self, metrics: Mapping[str, Any], attrs: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Write scores, one value a sample of this run; metrics of that name are replaced, others kept.

        `attrs` of the node `/scores`, name → metric → JSON value, say how metrics were made (`made_by`), or hold what is
        of a condition as a whole (`by_condition`); entries of other metrics are kept. On disk a reader sees all of it or
        nothing. In a selection the other samples' scores stay what they were.
        """
        self.tree = write_scores(self.tree, self.path, self._rows, metrics, attrs or {})

    def write_group(self, name: str, group: Group, blocks: Iterable[tuple[int, dict[str, np.ndarray]]]) -> None:
        """Write a group of arrays (sample, …), a sample at a time: (position in this run, values by variable).

        On disk a reader sees all of it or nothing; a group of that name is replaced, and samples without values hold
        fill values. Open the run again to see it.
        """
        add_group(self.tree, self.path, self._rows, name, group, blocks)

    def probe(self, probe: Any, /, **params: Any) -> xr.Dataset:
        """Ask a question of this run: the name of a probe, a file (`my_probe.py`), or `my_probe.py:name`."""
        found = import_module("interp.probes").find_probe(probe)
        return found(self, **params)

    def summary(self) -> str:
        """Return what is in the run, as `interp info` prints it."""
        return describe(self)

    def __repr__(self) -> str:
        return describe(self)

    # How shortcuts find things, and what they say when they do not

    def _dataset(self, node: str, field: str | None) -> xr.Dataset:
        if node not in self.tree.children:
            raise self._lacking(node, field)
        return self.tree.children[node].to_dataset(inherit=True)

    def _array(self, node: str, name: str) -> xr.DataArray:
        field = _CAPTURED_BY.get(name, "Capture(latents=True)")
        found = self.tree.children.get(node)
        if found is None or name not in found.data_vars:
            raise self._lacking(name, field)
        return self._labelled(found, name)

    def _labelled(self, node: xr.DataTree, name: str) -> xr.DataArray:
        """Return a variable whose samples have their condition, prompt_id and seed; half precision as float32."""
        path, variable = f"{node.path}/{name}", node.variables[name]
        known = self._labelled_arrays.get(path)
        if known is None or known[0] is not variable:
            known = self._labelled_arrays[path] = variable, labelled(node, name, self._axes)
        return known[1].copy(deep=False)  # what one reader loads is not kept for the next

    @cached_property
    def _axes(self) -> dict[str, xr.DataArray]:
        return axes_of(self.tree)

    def _attention_node(self, grid: str | None) -> xr.DataTree:
        grids = self.grids
        if not grids:
            raise self._lacking("attention", 'Capture(attention="cross")')
        if grid is None and len(grids) > 1:
            raise StoreError(f"this run has several attention grids; name one of: {', '.join(grids)}")
        if grid is not None and grid not in grids:
            hint = nearest(grid, grids)
            raise StoreError(f"this run has no attention grid {grid!r}{hint}; it has: {', '.join(grids)}")
        return self.tree.children["attention"].children[grid or grids[0]]

    def _lacking(self, name: str, field: str | None) -> StoreError:
        has = [str(p.path).strip("/") + "/" + str(v) for p in self.tree.subtree if p.path != "/" for v in p.data_vars]
        fix = f"trace again with {field}" if field else "trace again"
        return StoreError(f"{name} was asked for, but this run did not capture it; it has: {', '.join(has)}; {fix}")
