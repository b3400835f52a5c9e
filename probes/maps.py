"""Reading attention maps sample by sample: choosing steps and layers, means, masses, bicubic resizing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from einops import einsum

from interp.probes.labels import plain_text
from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp.stores import Run

ROLES = ("bos", "word", "eos", "pad")
STEPS_AT_ONCE = 10  # the height of a stored chunk: a block is read once and held alone in memory


@dataclass(frozen=True)
class Grid:
    """The chosen part of one attention grid; `probs` is lazy (sample, step, layer, head, token, y, x)."""

    name: str
    probs: xr.DataArray
    table: xr.Dataset

    @property
    def layers(self) -> list[str]:
        """Site names of the chosen layers."""
        return [str(name) for name in self.probs["layer"].values]


def open_grids(
    run: Run, *, steps: Any = None, layers: str | Sequence[str] | None = None, branch: str = "cond"
) -> list[Grid]:
    """Return one branch of every captured attention grid that has one of the chosen layers, lazily.

    steps: None (all captured), a step, a sequence of steps, a slice or "start:stop" (half-open). layers: None
    (all), or site names with wildcards, one or several. Raises InterpError for steps or layers that were not
    captured, and for grids whose token columns differ.
    """
    nodes = {str(name): run.tree[f"attention/{name}"].to_dataset() for name in run.grids}
    return _grids(nodes, f"attention/{next(iter(nodes), '')}", steps, layers, branch)


def open_masses(
    run: Run, *, steps: Any = None, layers: str | Sequence[str] | None = None, branch: str = "cond", asker: str
) -> list[Grid]:
    """Return what the whole picture gives to each token, as grids of one pixel, or of all pixels where maps were kept.

    A reduction "token_mass" of the run (`Capture(reduce=["token_mass"])`: every head, no maps) is taken if there is one,
    else captured attention. Choosing and errors are those of `open_grids`; InterpError if the run has neither.
    """
    for name, node in run.tree["sites"].children.items() if "sites" in run.tree.children else ():
        if node.attrs.get("reduction") == "token_mass":
            dataset = node.to_dataset()
            pixel = dataset["value"].expand_dims({"query_y": 1, "query_x": 1}, (-2, -1))
            heads = [str(h) for h in range(dataset.sizes["head"])]
            return _grids({name: dataset.assign(probs=pixel).assign_coords(head=heads)}, name, steps, layers, branch)
    if "attention" not in run.tree.children:
        raise InterpError(
            f'{asker} needs attention, which this run did not capture: trace again with Capture(attention="cross", '
            'heads="all"), or keep what the heads give to each token alone: Capture(attention=None, reduce=["token_mass"])'
        )
    return open_grids(run, steps=steps, layers=layers, branch=branch)


def _grids(
    nodes: dict[str, xr.Dataset], path: str, steps: Any, layers: str | Sequence[str] | None, branch: str
) -> list[Grid]:
    grids, known = [], []
    for name, dataset in nodes.items():  # the finest first, in memory and on disk alike
        branches = [str(b) for b in dataset["branch"].values]
        if branch not in branches:
            raise InterpError(
                f"this needs the branch {branch!r}, where {path} has {', '.join(branches)}: "
                f'trace again with Capture(branches=("{branch}",))'
            )
        sites = [str(site) for site in dataset["layer"].values]
        known += sites
        chosen = [i for i, site in enumerate(sites) if _matches(site, layers)]
        if not chosen:
            continue
        # No transpose here: of an array not yet loaded it makes an index as large as the data.
        at = chosen_steps(dataset["step"].values, steps)
        probs = dataset["probs"].isel(branch=branches.index(branch), layer=_slice(chosen), step=_slice(at))
        grids.append(Grid(name, probs, _token_table(dataset)))
    for pattern in () if layers is None else (layers,) if isinstance(layers, str) else layers:
        if not isinstance(pattern, str) or not any(fnmatchcase(site, pattern) for site in known):
            listed = ", ".join(known[:6]) + ("" if len(known) <= 6 else f" and {len(known) - 6} more")
            raise InterpError(
                f"no captured layer matches {pattern!r}; this run has {listed}{nearest(str(pattern), known)}"
            )
    for grid in grids[1:]:
        if not grid.table.identical(grids[0].table):
            raise InterpError(
                f"the grids {grids[0].name} and {grid.name} hold different tokens: choose layers of one grid"
            )
    return grids


def chosen_steps(captured: np.ndarray, steps: Any) -> np.ndarray:
    """Return the positions in `captured` (step numbers) of the steps asked for: see `open_grids`.

    >>> chosen_steps(np.array([0, 5, 10, 15]), "5:15")
    array([1, 2])
    """
    if isinstance(steps, str):
        start, colon, stop = steps.partition(":")
        try:
            wanted: Any = slice(int(start or 0), int(stop) if stop else None) if colon else int(steps)
        except ValueError:
            raise InterpError(f'steps={steps!r} is not a range: write "start:stop", e.g. "0:10"') from None
        return chosen_steps(captured, wanted)
    if steps is None:
        return np.arange(len(captured))
    if isinstance(steps, slice):
        bounds = [bound for bound in (steps.start, steps.stop) if bound is not None]
        if steps.step not in (None, 1) or any(bound < 0 for bound in bounds):
            raise InterpError(f"steps={steps!r} is not possible: give a half-open range of steps from 0 on")
        first, end = steps.start or 0, np.inf if steps.stop is None else steps.stop
        positions, missing = np.flatnonzero((captured >= first) & (captured < end)), []
    else:
        asked = [int(s) for s in (steps if isinstance(steps, Iterable) else [steps])]
        missing = [s for s in asked if s not in captured]
        positions = np.array([np.flatnonzero(captured == s)[0] for s in asked if s in captured], dtype=int)
    if missing or not len(positions):
        held = ", ".join(map(str, captured[:8])) + (" …" if len(captured) > 8 else "")
        raise InterpError(f"attention was not captured at {missing or steps!r}; this run has steps {held}")
    return positions


def reduce_sample(
    grid: Grid, i: int, of: Callable[[np.ndarray], np.ndarray] = lambda maps: maps
) -> tuple[np.ndarray, np.ndarray]:
    """Return two float64 means of one sample's maps, read in blocks of a few steps.

    First the mean over the steps, (layer, head, token, y, x), of the maps or of what `of` makes of them; steps at which
    the branch was not evaluated (NaN) are left out. Second the mean of the maps over heads and pixels at each step,
    (step, layer, token). Both are NaN where nothing was evaluated.
    """
    shape = grid.probs.isel(sample=i).shape[1:]
    total = np.zeros(shape, dtype=np.float64)
    count = np.zeros(shape, dtype=np.int32)
    mass = []
    for maps in maps_by_step(grid, i):
        mass.append(maps.mean((1, 3, 4)))
        there = np.isfinite(maps)
        total += np.where(there, of(maps), 0)
        count += there
    with np.errstate(invalid="ignore"):
        return total / np.where(count == 0, np.nan, count), np.stack(mass)


def maps_by_step(grid: Grid, i: int) -> Iterator[np.ndarray]:
    """Yield one sample's maps (layer, head, token, y, x), float64, step by step; ten steps are read at a time."""
    one = grid.probs.isel(sample=i)
    for start in range(0, one.sizes["step"], STEPS_AT_ONCE):
        for stored in one.isel(step=slice(start, start + STEPS_AT_ONCE)).values:  # as stored: half precision
            yield stored.astype(np.float64)


def role_mass(mass: np.ndarray, roles: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the mean per token (step, layer, role) of attention (step, layer, token).

    A column may stand for several tokens (`counts`). Roles without a column are NaN.
    """
    member = np.stack([roles == role for role in ROLES])
    held = member @ np.where(counts > 0, counts, 0)
    summed = einsum(np.where(roles == "", 0, mass), member.astype(float), "s l t, r t -> s l r")
    summed[..., ~member.any(1)] = np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return summed, summed / held


def resize_matrix(size: int, to: int) -> np.ndarray:
    """Return the (to, size) matrix of cubic interpolation along one axis, float64; its rows sum to 1.

    Keys' kernel with a = −0.75, pixel centres aligned, edges repeated: the bicubic mode of common
    deep-learning libraries (no smoothing when shrinking). Source: Keys 1981, doi:10.1109/TASSP.1981.1163711.

    >>> resize_matrix(2, 2)
    array([[1., 0.],
           [0., 1.]])
    """
    a = -0.75
    centre = (np.arange(to) + 0.5) * size / to - 0.5
    base = np.floor(centre).astype(np.int64)
    matrix = np.zeros((to, size))
    for offset in (-1, 0, 1, 2):
        d = np.abs(centre - (base + offset))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(matrix, (np.arange(to), np.clip(base + offset, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix


def resize(maps: np.ndarray, height: int, width: int, *, low: float = 0.0) -> np.ndarray:
    """Return maps (…, y, x) resized bicubically to (…, height, width), clamped at `low`: cubics undershoot."""
    rows, columns = resize_matrix(maps.shape[-2], height), resize_matrix(maps.shape[-1], width)
    return np.maximum(rows @ maps @ columns.T, low)


def all_steps(grids: list[Grid]) -> np.ndarray:
    """Return the steps that any of the grids holds."""
    return np.unique(np.concatenate([g.probs["step"].values for g in grids]))


def layer_labels(grids: list[Grid]) -> dict[str, Any]:
    """Return step, timestep, sigma, layer and grid (layer) as coordinates of what is joined over grids."""
    return {
        "step": all_steps(grids),
        **{c: ("step", _merged(grids, c)) for c in ("timestep", "sigma") if c in grids[0].probs.coords},
        "layer": [site for g in grids for site in g.layers],
        "grid": ("layer", [g.name for g in grids for _ in g.layers]),
    }


def on_all_steps(grids: list[Grid], values: list[np.ndarray]) -> list[np.ndarray]:
    """Bring (sample, step, …) of each grid to the union of their steps, NaN where a grid has none."""
    steps, spread = all_steps(grids), []
    for g, value in zip(grids, values, strict=True):
        full = np.full((len(value), len(steps), *value.shape[2:]), np.nan)
        full[:, np.searchsorted(steps, g.probs["step"].values)] = value
        spread.append(full)
    return spread


def _merged(grids: list[Grid], coord: str) -> np.ndarray:
    known = {int(s): v for g in grids for s, v in zip(g.probs["step"].values, g.probs[coord].values, strict=True)}
    return np.array([known[int(s)] for s in all_steps(grids)])


def _slice(positions: Sequence[int] | np.ndarray) -> Any:
    """Consecutive positions as a slice, which is read from disk without detours."""
    where = np.asarray(positions)
    return slice(int(where[0]), int(where[-1]) + 1) if (np.diff(where) == 1).all() else where


def _matches(site: str, layers: str | Sequence[str] | None) -> bool:
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else layers
    return any(fnmatchcase(site, str(pattern)) for pattern in patterns)


def _token_table(dataset: xr.Dataset) -> xr.Dataset:
    """The token table as plain numpy: text, role (str), word, count (int), each (sample, token)."""
    columns = {}
    for name in ("text", "role", "word", "count"):
        values = np.asarray(dataset[f"token_{name}"].transpose("sample", "token").values)
        number = name in ("word", "count")
        columns[name] = (("sample", "token"), values.astype(np.int64) if number else plain_text(values))
    return xr.Dataset(columns)
