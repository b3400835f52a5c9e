"""Where each token and word is attended to, by log-odds or as DAAM has it (arXiv:2210.04885), and what each role gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.attribution_plot import draw_maps, draw_mass
from interp.probes.base import probe
from interp.probes.labels import check_option, sample_labels
from interp.probes.maps import (
    ROLES,
    Grid,
    layer_labels,
    on_all_steps,
    open_grids,
    open_masses,
    reduce_sample,
    resize,
    role_mass,
)
from interp.probes.progress import counted
from interp.probes.rivals import log_odds, logarithm
from interp.probes.walking import walked, walks
from interp.probes.words import Words, chosen_words
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run

RECIPES = {"rival": "rival", "daam": "token"}  # and how each is normalised if nothing else is asked for
WALKS = {"every head": 1, "heads averaged": 2}  # of "rival", along self-attention: chosen on true masks
NORMALIZE = {
    "rival": "nats (log-odds against the pixel's strongest other word)",
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
    recipe: str = "rival",
    normalize: str | None = None,
    spread: int | None = None,
    grid: str = "latent",
) -> xr.Dataset:
    """Heat maps of each token and word of the prompt: by how much it wins a pixel (nats), or its share (1) as in DAAM.

    `recipe` "rival" averages the logarithms of the attention of every layer, head and step, on one grid: a geometric
    mean, in which a head that sees nothing anywhere has no say. From each word's map it takes, at each pixel, that of
    the strongest other word, so that what a pixel gives to every word alike is gone. Measured on true masks it finds
    objects much better than "daam" (docs/attribution.md). A prompt of one word has the other tokens as rivals. Where the
    run holds self-attention (`Capture(attention="all")`), each pixel then gets the mean of the pixels it looks at: a walk
    along self-attention, which finds objects better still, also where heads were averaged.
    "daam" averages the attention itself: the maps of each layer and head over the steps, resized bicubically, clamped at
    0, averaged over heads and layers. Both use the conditional branch; a step where it was not evaluated is left out. A
    word's map is the mean of its sub-tokens' maps (of their logarithms), and so is a span's.

    Parameters: `steps` None (all captured), a step, several, a slice or "start:stop", half-open (late steps find
    objects best); `layers` None (all of all grids) or site names with wildcards; `words` None (all, in the prompt's
    order) or the words wanted, where "red" is the first red and ("red", 1) or "red#1" the second; `grid` "latent" (the
    latents' size; without latents, the finest captured grid) or e.g. "32x32". `spread`: how often maps walk along the
    self-attention of its finest grid; None: if the run has it, those of "rival" once, of averaged heads twice; 0 never.
    `normalize`: None (the recipe's own), "rival" subtracts the logarithm of the strongest other word; "token" divides by
    the sum over all captured tokens at each pixel (DAAM); "words" by that over the word tokens alone (DAAM's option);
    "space" makes each map sum to 1; "max" makes its maximum 1; "none" leaves attention probabilities.

    Returns a Dataset: `token_map` (sample, token, y, x) with token_text, token_role, token_word, token_count
    (sample, token); `word_map` (sample, word, y, x) with word_text and word_occurrence (sample, word), NaN
    where a prompt has no such token or word; `mass` and `mass_per_token` (sample, step, layer, role) as in
    `attention_mass`; and, if captured, `image` (sample, thumb_y, thumb_x, rgb), thumbnails for the plot.

    attrs["spread"] is how often maps walked.

    Raises InterpError for steps, layers, words or self-attention that are not there, and for an unknown `recipe`,
    `normalize` or `grid`. Source: Tang et al., "What the DAAM", arXiv:2210.04885 (whose code leaves out the coarsest grid: use
    `layers`); "rival" is ours: a product of experts of the heads (Hinton 2002), and a margin; walking along
    self-attention is known from segmentation (Wang et al., arXiv:2309.02773).

    >>> from interp.stores import synthetic_run
    >>> ds = token_attribution(synthetic_run(samples=2, steps=6, seed=0), recipe="daam")
    >>> ds["token_map"].dims, ds["word_map"].dims
    (('sample', 'token', 'y', 'x'), ('sample', 'word', 'y', 'x'))
    >>> bool(np.allclose(ds["token_map"].sum("token"), 1))
    True
    """
    check_option("token_attribution", "recipe", recipe, tuple(RECIPES))
    normalize = RECIPES[recipe] if normalize is None else normalize
    check_option("token_attribution", "normalize", normalize, tuple(NORMALIZE))
    grids = open_grids(run, steps=steps, layers=layers)
    height, width = grid_size(run, grids, grid)
    table = grids[0].table
    vocabulary, everyone = chosen_words(table, words), chosen_words(table, None)
    logs = recipe == "rival"
    averaged = all(g.probs.sizes["head"] == 1 for g in grids)
    usual = WALKS["heads averaged" if averaged else "every head"] if logs else 0
    times, along = walks(run, spread, usual, steps=steps)
    samples, tokens = table.sizes["sample"], table.sizes["token"]
    token_map = np.full((samples, tokens, height, width), np.nan)
    word_map = np.full((samples, vocabulary.text.shape[1], height, width), np.nan)
    masses: list[list[np.ndarray]] = [[] for _ in grids]
    for i in counted(range(samples)):
        total, layers_seen = np.zeros((tokens, height, width)), 0
        for g, one in enumerate(grids):
            maps, mass = reduce_sample(one, i, logarithm) if logs else reduce_sample(one, i)
            for layer in maps:  # one at a time: a layer of all heads on the latent grid is large enough
                total += resize(layer, height, width, low=-np.inf if logs else 0.0).mean(0)
                layers_seen += 1
            masses[g].append(mass)
        roles = table["role"].values[i]
        total /= layers_seen
        total[roles == ""] = np.nan
        worded = vocabulary.of(total, i)
        if normalize == "rival":
            both = (total, worded) if logs else (logarithm(total), logarithm(worded))
            both = _against_rivals(both[0], both[1], vocabulary, everyone, i)
        else:
            both = (np.exp(total), np.exp(worded)) if logs else (total, worded)
        if along is not None and times:
            chances = along.of(i)
            both = walked(both[0], along, chances, times), walked(both[1], along, chances, times)
        token_map[i], word_map[i] = both if normalize == "rival" else _normalised(both[0], both[1], roles, normalize)
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
        {"recipe": recipe, "normalize": normalize, "spread": times, "grid": f"{height}x{width}"},
    )
    if "images" in run.tree.children and "thumb" in run.tree["images"].dataset:
        thumb = run.tree["images"].to_dataset()["thumb"].reset_coords(drop=True)
        result["image"] = thumb.assign_attrs(units="1 (of 255)", long_name="thumbnail of the image")
    return result


@probe("attention_mass", plot=draw_mass)
def attention_mass(
    run: Run,
    *,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Attention that bos, words, eos and padding receive at each step and layer (1: shares of all attention).

    The attention of an image to the tokens of a role, averaged over pixels and heads, in the conditional
    branch: of captured maps, or as `Capture(reduce=["token_mass"])` kept it. The paper's "[EOS]" is eos and pad together.

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
    grids = open_masses(run, steps=steps, layers=layers, asker="attention_mass")
    masses = [[reduce_sample(g, i)[1] for i in counted(range(g.table.sizes["sample"]))] for g in grids]
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


def _against_rivals(
    tokens: np.ndarray, words: np.ndarray, vocabulary: Words, everyone: Words, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-odds of token maps (token, y, x) and word maps (word, y, x), given as logarithms, of one sample."""
    there = everyone.member[i].any(1)
    member, rivals = everyone.member[i][there], everyone.of(tokens, i)[there]
    others = np.flatnonzero(
        ~member.any(0) & np.isfinite(tokens).any((1, 2))
    )  # no words: rivals where there is no other
    found = []
    for maps, mine in ((tokens, np.eye(len(tokens), dtype=bool)), (words, vocabulary.member[i])):
        # A token's own word is no rival of it, nor are the words of a span.
        whole = (mine @ (member.T @ member)) | mine
        odds = log_odds(maps, rivals, whole @ member.T)
        alone = np.isnan(odds) & np.isfinite(maps)
        found.append(np.where(alone, log_odds(maps, tokens[others], mine[:, others]), odds))
    return found[0], found[1]


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
