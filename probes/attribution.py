"""Where each token and word is attended to (DAAM, arXiv:2210.04885), and how much each role gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.attribution_plot import draw_maps, draw_mass
from interp.probes.base import probe
from interp.probes.labels import check_option, sample_labels
from interp.probes.maps import ROLES, Grid, layer_labels, on_all_steps, open_grids, reduce_sample, resize, role_mass
from interp.probes.words import chosen_words
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run

NORMALIZE = {
    "token": "1 (share of the pixel's attention to all captured tokens)",
    "words": "1 (share of the pixel's attention to the prompt's words)",
    "space": "1 (share of the map's sum)",
    "max": "1 (share of the map's maximum)",
    "none": "1 (attention probability)",
}


@probe("token_attribution", needs={"attention": True}, plot=draw_maps)
def token_attribution(
    run: Run,
    *,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    words: Sequence[str | tuple[str, int]] | str | None = None,
    normalize: str = "token",
    grid: str = "latent",
) -> xr.Dataset:
    """Heat maps of each token and word of the prompt: its share of the image's attention (1), as DAAM does.

    The maps of each layer and head are averaged over the steps, resized bicubically to one grid, clamped at
    0, and averaged over heads and layers (conditional branch; a step where that branch was not evaluated is
    left out). A word's map is the mean of its sub-tokens' maps, and so is a span's.

    Parameters: `steps` None (all captured), a step, several, a slice or "start:stop", half-open; `layers`
    None (all of all grids) or site names with wildcards; `words` None (all, in the prompt's order) or the
    words wanted, where "red" is the first red and ("red", 1) or "red#1" the second; `grid` "latent" (the
    latents' size; without latents, the finest captured grid) or e.g. "32x32". `normalize`: "token" divides by
    the sum over all captured tokens at each pixel; "words" by that over the word tokens alone (DAAM's
    option); "space" makes each map sum to 1; "max" makes its maximum 1; "none" leaves attention
    probabilities.

    Returns a Dataset: `token_map` (sample, token, y, x) with token_text, token_role, token_word, token_count
    (sample, token); `word_map` (sample, word, y, x) with word_text and word_occurrence (sample, word), NaN
    where a prompt has no such token or word; `mass` and `mass_per_token` (sample, step, layer, role) as in
    `attention_mass`; and, if captured, `image` (sample, thumb_y, thumb_x, rgb), thumbnails for the plot.

    Raises InterpError for steps, layers or words that are not there, and for an unknown `normalize` or
    `grid`. Source: Tang et al., "What the DAAM", arXiv:2210.04885 (which leaves out the coarsest grid: use
    `layers`).

    >>> from interp.stores import synthetic_run
    >>> ds = token_attribution(synthetic_run(samples=2, steps=6, seed=0))
    >>> ds["token_map"].dims, ds["word_map"].dims
    (('sample', 'token', 'y', 'x'), ('sample', 'word', 'y', 'x'))
    >>> bool(np.allclose(ds["token_map"].sum("token"), 1))
    True
    """
    check_option("token_attribution", "normalize", normalize, tuple(NORMALIZE))
    grids = open_grids(run, steps=steps, layers=layers)
    height, width = grid_size(run, grids, grid)
    table = grids[0].table
    vocabulary = chosen_words(table, words)
    samples, tokens = table.sizes["sample"], table.sizes["token"]
    token_map = np.full((samples, tokens, height, width), np.nan)
    word_map = np.full((samples, vocabulary.text.shape[1], height, width), np.nan)
    masses: list[list[np.ndarray]] = [[] for _ in grids]
    for i in range(samples):
        total, layers_seen = np.zeros((tokens, height, width)), 0
        for g, one in enumerate(grids):
            maps, mass = reduce_sample(one, i)
            for layer in maps:  # one at a time: a layer of all heads on the latent grid is large enough
                total += resize(layer, height, width).mean(0)
                layers_seen += 1
            masses[g].append(mass)
        roles = table["role"].values[i]
        total /= layers_seen
        total[roles == ""] = np.nan
        token_map[i], word_map[i] = _normalised(total, vocabulary.of(total, i), roles, normalize)
    units = NORMALIZE[normalize]
    result = xr.Dataset(
        {
            "token_map": (
                ("sample", "token", "y", "x"),
                token_map,
                {"units": units, "long_name": "heat map"},
            ),
            "word_map": (("sample", "word", "y", "x"), word_map, {"units": units, "long_name": "heat map"}),
            **_mass_variables(grids, masses),
        },
        {**sample_labels(run), **_token_coords(table), **_mass_coords(grids), **vocabulary.coords()},
        {"normalize": normalize, "grid": f"{height}x{width}"},
    )
    if "images" in run.tree.children and "thumb" in run.tree["images"].dataset:
        thumb = run.tree["images"].to_dataset()["thumb"].reset_coords(drop=True)
        result["image"] = thumb.assign_attrs(units="1 (of 255)", long_name="thumbnail of the image")
    return result


@probe("attention_mass", needs={"attention": True}, plot=draw_mass)
def attention_mass(
    run: Run,
    *,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Attention that bos, words, eos and padding receive at each step and layer (1: shares of all attention).

    The attention of an image to the tokens of a role, averaged over pixels and heads, in the conditional
    branch. The paper's "[EOS]" is eos and pad together.

    Parameters: `steps` and `layers` choose as in `token_attribution`.

    Returns a Dataset, float64 (sample, step, layer, role): `mass`, the sum over the role's tokens (over the
    roles it adds up to 1 if every token was captured), and `mass_per_token`, the mean over them, as in the
    paper's Figure 3. A role without tokens is NaN, and so is a step at which the branch was not evaluated.
    `layer` holds site names, those of the finest grid first, `grid` (layer) the grid of each.

    Raises InterpError for steps or layers that were not captured. Source: Yi et al., arXiv:2405.15330,
    section 5.1.

    >>> from interp.stores import synthetic_run
    >>> ds = attention_mass(synthetic_run(samples=2, steps=6, seed=0))
    >>> bool(np.allclose(ds["mass"].sum("role"), 1, atol=1e-2))
    True
    """
    grids = open_grids(run, steps=steps, layers=layers)
    masses = [[reduce_sample(g, i)[1] for i in range(g.table.sizes["sample"])] for g in grids]
    return xr.Dataset(_mass_variables(grids, masses), {**sample_labels(run), **_mass_coords(grids)})


def _normalised(maps: np.ndarray, words: np.ndarray, roles: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Normalise token maps (token, y, x) and word maps (word, y, x) of one sample; 0/0 is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if how in ("token", "words"):
            used = roles == "word" if how == "words" else roles != ""
            total = maps[used].sum(0)
            return maps / total, words / total
        if how in ("space", "max"):
            size = np.sum if how == "space" else np.max
            return tuple(m / size(m, axis=(1, 2), keepdims=True) for m in (maps, words))
        return maps, words


def _mass_variables(grids: list[Grid], masses: list[list[np.ndarray]]) -> dict[str, Any]:
    table = grids[0].table
    roles, counts = table["role"].values, table["count"].values
    parts = [[role_mass(mass, roles[i], counts[i]) for i, mass in enumerate(per_sample)] for per_sample in masses]
    dims, result = ("sample", "step", "layer", "role"), {}
    names = {
        "mass": "attention to all tokens of the role",
        "mass_per_token": "attention to a token of the role",
    }
    for k, (name, text) in enumerate(names.items()):
        stacked = [np.stack([both[k] for both in part]) for part in parts]
        values = np.concatenate(on_all_steps(grids, stacked), axis=2)
        result[name] = (dims, values, {"units": "1 (share of attention)", "long_name": text})
    return result


def _mass_coords(grids: list[Grid]) -> dict[str, Any]:
    return {**layer_labels(grids), "role": list(ROLES)}


def _token_coords(table: xr.Dataset) -> dict[str, Any]:
    return {f"token_{name}": (("sample", "token"), values.values) for name, values in table.data_vars.items()}


def grid_size(run: Run, grids: list[Grid], grid: str) -> tuple[int, int]:
    """Return the height and width that `grid` means: "latent" (failing latents, the finest grid) or "32x32"."""
    if grid != "latent":
        height, cross, width = str(grid).partition("x")
        if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
            raise InterpError(f"grid={grid!r} is not possible: it is 'latent' or a size such as '32x32'")
        return int(height), int(width)
    if "trajectory" in run.tree.children:
        sizes = run.tree["trajectory"].dataset.sizes
        if "y" in sizes and "x" in sizes:
            return sizes["y"], sizes["x"]
    return max((g.probs.sizes["query_y"], g.probs.sizes["query_x"]) for g in grids)
