"""How concentrated attention is: over the tokens at each pixel, and over the image for each role."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import units_of
from interp.probes.labels import sample_labels
from interp.probes.maps import ROLES, Grid, layer_labels, maps_by_step, on_all_steps, open_grids
from interp.probes.progress import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

REST = 0.01  # what half precision may lose of a sum of 1; a larger remainder is attention to tokens not captured


def draw(ds: xr.Dataset) -> Figure:
    """Draw the entropy over tokens by layer and the spread of the roles' maps, over the steps.

    ds: the result of `attention_entropy`. Lines are means over samples and heads, bands bootstrap 95 % intervals.
    """
    from interp.probes.style import ROLE_COLOUR, curve, legend, new_figure, note, shades, step_axis, title

    drawn = partial(curve, units=units_of(ds))
    figure, (tokens, spread) = new_figure(2, width=4.8)
    mean = ds["entropy"].mean("head")
    every = -(-ds.sizes["layer"] // 6)  # a few layers name the scale of colours
    for k, color in enumerate(shades(ds.sizes["layer"])):
        label = f"{k}: {ds.grid.values[k]}" if k % every == 0 else "_"
        drawn(tokens, ds.step, mean.isel(layer=k), color=color, label=label)
    tokens.set(ylabel="entropy over tokens (nats)", ylim=(0, None))
    title(tokens, "Between tokens, by layer")
    for role in map(str, ds["role"].values):
        one = ds["spread"].sel(role=role).mean(["head", "layer"])
        drawn(spread, ds.step, one, color=ROLE_COLOUR[role], label=role)
    spread.set(ylabel="entropy over pixels / log(pixels) (1)")
    title(spread, "Over the image, by role (1: even)")
    for ax in (tokens, spread):
        step_axis(ax)
        legend(ax, beside=True)
    note(figure)
    return figure


@probe("attention_entropy", needs={"attention": True}, plot=draw)
def attention_entropy(
    run: Run,
    *,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    branch: str = "cond",
) -> xr.Dataset:
    """Entropy of attention over the tokens (nats) and spread of each role's maps over the image (1), by step and layer.

    Over the tokens: H = −Σ p·log p at each pixel, averaged over the pixels. A column that sums the padding counts as
    one token, so H is then a lower bound; attention to tokens that were not captured counts as one more column.
    Over the image: a token's map divided by its sum is a distribution over the pixels; its entropy divided by
    log(number of pixels) is 1 for an even map and 0 for a single pixel; averaged over the columns of a role.

    Parameters: `steps` and `layers` choose as in `token_attribution`; `branch` is "cond" or "uncond".

    Returns a Dataset, float64: `entropy` (sample, step, layer, head) and `spread` (sample, step, layer, head, role);
    NaN where the branch was not evaluated, a role has no tokens, or a grid has no such head. `layer` holds site
    names, `grid` (layer) the grid of each. Samples are read one by one, ten steps at a time.

    Raises InterpError for steps, layers or a branch that were not captured. Source: entropy as in
    Shannon 1948; the first token that draws most attention, which lowers it: arXiv:2405.15330, section 5.1.

    >>> from interp.stores import synthetic_run
    >>> ds = attention_entropy(synthetic_run(samples=2, steps=6, heads=2, seed=0))
    >>> ds["entropy"].dims, ds["spread"].dims
    (('sample', 'step', 'layer', 'head'), ('sample', 'step', 'layer', 'head', 'role'))
    """
    grids = open_grids(run, steps=steps, layers=layers, branch=branch)
    heads = list(dict.fromkeys(str(h) for g in grids for h in g.probs["head"].values))
    entropy: list[np.ndarray] = []
    spread: list[np.ndarray] = []
    for grid in grids:
        both = [_of_sample(grid, i) for i in counted(range(grid.table.sizes["sample"]))]
        where = [heads.index(str(h)) for h in grid.probs["head"].values]
        for found, k in ((entropy, 0), (spread, 1)):
            values = np.stack([one[k] for one in both])
            full = np.full((*values.shape[:3], len(heads), *values.shape[4:]), np.nan)
            full[:, :, :, where] = values
            found.append(full)
    dims = ("sample", "step", "layer", "head")
    variables: dict[str, Any] = {
        "entropy": (dims, _joined(grids, entropy), {"units": "nats", "long_name": "entropy of attention over tokens"}),
        "spread": (
            (*dims, "role"),
            _joined(grids, spread),
            {"units": "1 (of log(pixels))", "long_name": "entropy of the role's maps over the pixels"},
        ),
    }
    coords = {**layer_labels(grids), **sample_labels(run), "head": heads, "role": list(ROLES)}
    return xr.Dataset(variables, coords, {"branch": branch})


def _joined(grids: list[Grid], values: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(on_all_steps(grids, values), axis=2)


def _of_sample(grid: Grid, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Entropy (step, layer, head) and spread (step, layer, head, role) of one sample."""
    roles = grid.table["role"].values[i]
    used = roles != ""
    member = np.stack([roles[used] == role for role in ROLES])
    entropy, spread = [], []
    for maps in maps_by_step(grid, i):
        p = maps[:, :, used]
        rest = 1 - p.sum(2, keepdims=True)
        everything = np.concatenate([p, np.where(rest > REST, rest, 0)], axis=2)
        entropy.append(_information(everything).sum(2).mean((-1, -2)))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = p / p.sum((-1, -2), keepdims=True)
            even = _information(shares).sum((-1, -2)) / np.log(p.shape[-1] * p.shape[-2])
            spread.append(np.stack([even[..., m].mean(-1) if m.any() else even[..., 0] * np.nan for m in member], -1))
    return np.stack(entropy), np.stack(spread)


def _information(p: np.ndarray) -> np.ndarray:
    """−p·log p, 0 at 0; NaN stays."""
    return -p * np.log(np.where(p > 0, p, 1)) + 0 * p
