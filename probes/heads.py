"""Which heads look at which concept: head relevance vectors (arXiv:2412.02237) from captured attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import mean_interval, units_of
from interp.probes.labels import sample_labels
from interp.probes.maps import Grid, layer_labels, maps_by_step, open_masses
from interp.probes.progress import counted
from interp.probes.words import prompt_words
from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

Columns = list[np.ndarray | None]


def draw(ds: xr.Dataset) -> Figure:
    """Draw each concept's share of every head, and the most relevant heads of each concept with their intervals.

    ds: the result of `head_relevance`.
    """
    from interp.probes.style import HEAT, PALETTE, legend, new_figure, note, title

    concepts = [str(c) for c in ds["concept"].values]
    flat = ds["relevance"].values.reshape(-1, len(concepts))
    spread = ds["relevance_interval"].values.reshape(-1, len(concepts), 2)
    figure, (table, best) = new_figure(2, width=5.0, height=max(2.6, 1.2 + 0.28 * len(concepts)))
    shown = table.imshow(flat.T, aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    table.set_yticks(range(len(concepts)), concepts)
    table.set(xlabel=f"head (layer by layer, {ds.sizes['head']} each)")
    title(table, "Share of steps in which the concept wins")
    figure.colorbar(shown, ax=table).set_label("share (1)", fontsize=8)
    strongest = np.argsort(-np.nan_to_num(flat, nan=-1).max(0))[:5]
    for k, c in enumerate(sorted(strongest)):
        order = np.argsort(-np.nan_to_num(flat[:, c], nan=-1))[:10]
        mean, (low, high) = flat[order, c], spread[order, c].T
        bars = np.nan_to_num([mean - low, high - mean]).clip(0)
        at = np.arange(len(order)) + 0.12 * (k - 2)
        best.errorbar(at, mean, yerr=bars, fmt="o", capsize=2, markersize=3, color=PALETTE[k], label=concepts[c])
    best.set(xlabel="rank of the head, for each concept", ylabel="share (1)", ylim=(0, 1.05))
    title(best, "The ten most relevant heads")
    legend(best)
    note(figure, "Bars: bootstrap 95 % intervals over prompts.")
    return figure


@probe("head_relevance", plot=draw)
def head_relevance(
    run: Run,
    *,
    concepts: Mapping[str, Sequence[str]] | None = None,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Share of steps in which a head attends more to a concept's words than to those of any other concept (1).

    At each step every head (conditional branch) gives its vote to one concept of the prompt: the one whose words get
    the most attention, mean over pixels and over the concept's tokens. Trace prompts that name words of several concepts
    ("a large striped red circle"), with `Capture(reduce=["token_mass"])`, which forms these means while tracing and keeps
    them alone, or with `Capture(heads="all")`; of maps averaged over heads there is one vote a layer.

    Parameters: `concepts` maps names to words, e.g. {"colour": ["red", "blue"], "shape": ["circle"]} (None: each word
    is its own concept); `steps` and `layers` choose as in `token_attribution`; `resamples` and `seed` belong to the
    bootstrap over prompts.

    Returns a Dataset, float64: `votes` (sample, layer, head, concept), the share of a sample's steps won, NaN for a
    concept that the prompt does not name or that has no rival there; `relevance` (layer, head, concept), their mean over
    the samples, with `relevance_interval` (…, bound) at 95 %; and `vector` (layer, head, concept), the concept's
    relevances scaled to sum to the number of heads: the head relevance vector. `grid` (layer) is the grid of each.

    The paper puts the concepts' keys beside the prompt's own, which needs the model; among words of the prompt the
    order of the concepts is the same, for leaving out keys scales all others alike, but the words' states know their
    prompt. Raises InterpError when no prompt names two concepts. Source: arXiv:2412.02237.

    >>> from interp.stores import synthetic_run
    >>> groups = {"colour": ["red", "green", "purple", "navy"], "shape": ["circle", "hexagon", "star"]}
    >>> ds = head_relevance(synthetic_run(samples=3, heads=2), concepts=groups)
    >>> bool(np.allclose(ds["votes"].isel(sample=0).sum("concept"), 1))
    True
    """
    grids = open_masses(run, steps=steps, layers=layers, asker="head_relevance")
    names, members = _members(grids[0].table, concepts)
    heads = list(dict.fromkeys(str(h) for g in grids for h in g.probs["head"].values))
    shape = len(run), sum(len(g.layers) for g in grids), len(heads), len(names)
    votes = np.full(shape, np.nan)
    for i, columns in enumerate(counted(members)):
        rivals = [c for c, tokens in enumerate(columns) if tokens is not None]
        first = 0
        for grid in grids if len(rivals) > 1 else []:
            where = [heads.index(str(h)) for h in grid.probs["head"].values]
            layers_here = slice(first, first + len(grid.layers))
            votes[i, layers_here][:, where] = _votes(grid, i, columns)
            first += len(grid.layers)
    if np.isnan(votes).all() and not any(sum(t is not None for t in columns) > 1 for columns in members):
        raise InterpError(
            f"head_relevance: no prompt of this run names words of two concepts; the concepts are {', '.join(names)}"
        )
    labels = {**layer_labels(grids), **sample_labels(run), "head": heads, "concept": names, "bound": ["low", "high"]}
    dims = ("sample", "layer", "head", "concept")
    result = xr.Dataset({"votes": (dims, votes, _attrs("share of the steps won"))}, labels)
    mean, interval = mean_interval(votes, units_of(result), resamples=resamples, seed=seed)
    number = np.isfinite(mean).any(-1).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        vector = mean * number / np.nansum(mean, axis=(0, 1), keepdims=True)
    result["relevance"] = (dims[1:], mean, _attrs("mean share of the steps won"))
    result["relevance_interval"] = ((*dims[1:], "bound"), interval, _attrs("95 % interval of the mean"))
    result["vector"] = (dims[1:], vector, _attrs("relevance, scaled to sum to the number of heads"))
    return result


def _members(table: xr.Dataset, concepts: Mapping[str, Sequence[str]] | None) -> tuple[list[str], list[Columns]]:
    """Names of the concepts, and for each sample the token columns of each (None if the prompt does not name it)."""
    prompts = [
        prompt_words(*(table[c].values[i].tolist() for c in ("text", "role", "word")))
        for i in range(table.sizes["sample"])
    ]
    known = list(dict.fromkeys(text.casefold() for prompt in prompts for text, _, _ in prompt))
    if concepts is None:
        concepts = {word: [word] for word in known}
    groups = {str(n): {w.casefold() for w in ([ws] if isinstance(ws, str) else ws)} for n, ws in concepts.items()}
    for name, words in groups.items():
        if not words & set(known):
            hint = nearest(next(iter(words), name), known)
            raise InterpError(f"head_relevance: no prompt of this run has a word of the concept {name!r}{hint}")
    found: list[Columns] = []
    for prompt in prompts:
        tokens = [[columns for text, _, columns in prompt if text.casefold() in words] for words in groups.values()]
        found.append([np.concatenate(part) if part else None for part in tokens])
    return list(groups), found


def _votes(grid: Grid, i: int, columns: Columns) -> np.ndarray:
    """Shares of the steps that each concept wins, (layer, head, concept) of one sample and grid; a tie is shared."""
    won, steps = 0.0, 0
    shape = len(grid.layers), grid.probs.sizes["head"], len(columns)
    for maps in maps_by_step(grid, i):
        mass = maps.mean((-1, -2))
        per = np.stack([np.full(shape[:2], -np.inf) if t is None else mass[:, :, t].mean(-1) for t in columns], axis=-1)
        if np.isnan(per).any():
            continue  # the branch was not evaluated
        best = per == per.max(-1, keepdims=True)
        won, steps = won + best / best.sum(-1, keepdims=True), steps + 1
    share = np.full(shape, np.nan) if not steps else np.asarray(won) / steps
    share[..., [t is None for t in columns]] = np.nan
    return share


def _attrs(text: str) -> dict[str, str]:
    return {"units": "1", "long_name": text}
