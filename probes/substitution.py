"""Through keys or through values: where exchanged text states take effect (arXiv:2405.15330, appendix G)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.comparing import (
    compare,
    distances,
    latents,
    pictures,
    pixel_distance,
    relative_distance,
    resampled,
    summarise,
)
from interp.probes.conditions import Pairs, check_condition, conditions_with
from interp.probes.maps import Grid, all_steps, maps_by_step, open_grids
from interp.probes.progress import counted
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from interp.stores import Run

SIDES = {"k": "key", "v": "value", "kv": "both"}
CHANGES = ("replace_eos", "replace_tokens", "replace_prompt")
EXAMPLE = (
    '{"baseline": [], "keys": [ReplaceEOS("{target}", side="k")], "values": [ReplaceEOS("{target}", side="v")], '
    '"both": [ReplaceEOS("{target}")]}'
)
SMALLEST = 2.0**-24  # the smallest half-precision number: what is stored as 0 lies below it
REST = 0.01  # see entropy.py


def draw(ds: xr.Dataset) -> Figure:
    """Draw distances to the original and to both, scores, and the KL divergence of attention over the steps.

    ds: the result of `key_value_substitution`. Means over the pairs with bootstrap 95 % intervals.
    """
    from interp.probes.comparing_plot import measures
    from interp.probes.style import BLACK, BLUE, GREEN, ORANGE, dots, legend, line, note, panels, step_axis, title

    names = [str(c) for c in ds["condition"].values]
    at = np.arange(len(names))
    found = measures(ds)
    figure, axes = panels(len(found) + ("divergence" in ds))
    for ax, (name, text, mean, interval) in zip(axes, found, strict=False):
        dots(ax, at, mean, interval.transpose("condition", "bound"), BLUE, "to the original")
        if f"{name}_to_both_mean" in ds:
            parts = ds[f"{name}_to_both_mean"], ds[f"{name}_to_both_interval"]
            dots(ax, at + 0.15, *parts, ORANGE, "to both exchanged", marker="s")
            legend(ax)
            ax.set_ylim(bottom=0)
        ax.set_xticks(at, names, rotation=20)
        ax.set(ylabel=text, xlim=(-0.5, len(names) - 0.4))
        title(ax, name.replace("_", " "))
    if "divergence" in ds:
        ax = axes[-1]
        for c, color in zip(names[1:], (BLUE, ORANGE, GREEN), strict=False):
            one = ds.sel(condition=c)
            line(ax, ds["step"], one["divergence_mean"], one["divergence_interval"], color, c)
        line(ax, ds["step"], ds["divergence_uniform_mean"], ds["divergence_uniform_interval"], BLACK, "uniform", True)
        ax.set(ylabel="KL divergence from the original (nats)", yscale="log")
        ax.margins(y=0.3)  # room for the legend
        title(ax, "Attention over the tokens")
        step_axis(ax)
        ax.legend(fontsize=7, frameon=False, ncols=2, loc="upper right")
    note(figure, f"Means over {ds.attrs['pairs']} pairs; bars and bands: bootstrap 95 % intervals over prompts.")
    return figure


@probe("key_value_substitution", needs={"samples": ["condition"]}, plot=draw)
def key_value_substitution(
    run: Run,
    *,
    reference: str = "baseline",
    key: str | None = None,
    value: str | None = None,
    both: str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Effect of text states exchanged for keys alone, values alone and both (1, scores), and KL of attention (nats).

    Trace four conditions with the same prompts and seeds: an unchanged one and one exchange, e.g.
    `interp.ReplaceEOS("{target}")`, with `side="k"`, `side="v"` and `side="kv"`, the default. For the KL test capture
    cross-attention too.

    Parameters: `reference` names the unchanged condition; `key`, `value` and `both` name those of each side (None: the
    one whose interventions say so; without one for both sides there are no distances to it); `metrics` None (all of
    `/scores`, among them "<metric>:target" if there is that column) or some; `resamples` and `seed` belong to the
    bootstrap over prompts.

    Returns a Dataset over `condition` (reference, key, value, both: `side` "", "k", "v", "kv") and `pair` (a prompt and
    seed): `image_distance`, `latent_distance` to the reference and `image_distance_to_both`, `latent_distance_to_both`
    (1), `score` (condition, pair, metric), `passes`, as far as the run holds them; with attention, `divergence`
    (condition, pair, step) = KL(p ‖ p_ref) of the attention over the tokens, per pixel and head, averaged over pixels,
    heads and layers, and `divergence_uniform` (pair, step) = KL(p_ref ‖ uniform), the paper's yardstick (nats). Each
    has `…_mean` over the pairs and a 95 % interval `…_interval`.

    Past the first exchanged layer of the first exchanged step the queries differ too, for the pictures drift apart:
    `divergence` is the sum of both effects, and exchanged values alone move it. Where padding is summed into one column,
    or other tokens were not captured, the divergences are those of the summed columns, a lower bound.

    Raises InterpError when a side has no condition, or several and none named. Source: Yi et al., arXiv:2405.15330,
    appendix G, Table 4, Figures 15 and 16.

    >>> from interp.probes.testing import changed_run
    >>> swaps = {s: [{"name": "replace_eos", "prompt": "{target}", "side": s}] for s in ("k", "v", "kv")}
    >>> ds = key_value_substitution(changed_run(swaps, samples=2, steps=6))
    >>> ds["side"].values.tolist(), ds["divergence"].dims
    (['', 'k', 'v', 'kv'], ('condition', 'pair', 'step'))
    """
    sides = _sides(run, {"k": key, "v": value, "kv": both})
    names = list(sides.values())
    ds = compare(
        run, reference, names, metrics=metrics, resamples=resamples, seed=seed, asker="key_value_substitution"
    )  # fmt: skip
    ds = ds.assign_coords(side=("condition", ["", *sides]))
    where = {int(number): k for k, number in enumerate(run.samples.index)}
    pairs = Pairs([reference, *names], np.vectorize(lambda number: where.get(int(number), -1))(ds["sample"].values))
    units = resampled(ds["prompt_id"].values)
    data: dict[str, Any] = {}
    if "kv" in sides:
        for name, read, distance in (
            ("image_distance", pictures, pixel_distance),
            ("latent_distance", latents, relative_distance),
        ):
            if name in ds:
                found = distances(pairs, names.index(sides["kv"]) + 1, read(run), distance)
                text = f"{ds[name].attrs['long_name'].split(' from ')[0]}, to both exchanged"
                dims = ("condition", "pair")
                summarise(
                    data, f"{name}_to_both", dims, found, units, ds[name].units, text, resamples=resamples, seed=seed
                )
    if "attention" in run.tree.children:
        grids = open_grids(run)
        divergence, uniform = _divergences(grids, pairs)
        more = {"resamples": resamples, "seed": seed}
        text = "KL divergence of attention over the tokens"
        summarise(
            data,
            "divergence",
            ("condition", "pair", "step"),
            divergence,
            units,
            "nats",
            f"{text} from the reference's",
            **more,
        )
        summarise(data, "divergence_uniform", ("pair", "step"), uniform, units, "nats", f"{text} from uniform", **more)
        ds = ds.assign_coords(step=all_steps(grids))
    return ds.assign(data)


def _sides(run: Run, given: dict[str, str | None]) -> dict[str, str]:
    """Which condition exchanges keys, values, both: side → condition."""
    specs = conditions_with(run, CHANGES, None, asker="key_value_substitution", example=EXAMPLE)
    found = {}
    for side, name in given.items():
        fitting = [c for c, spec in specs.items() if (spec.get("side") or "kv") == side]
        if name is not None:
            check_condition(run, name)
            found[side] = name
        elif len(fitting) == 1:
            found[side] = fitting[0]
        elif fitting or side != "kv":
            there = f"several: {', '.join(fitting)}" if fitting else "none"
            raise InterpError(
                f'key_value_substitution needs one condition that exchanges side="{side}", and this run has {there}; '
                f"name it by {SIDES[side]}=…, or trace the run with conditions={EXAMPLE}"
            )
    return found


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p ‖ q) over the tokens, averaged over heads and pixels and summed over layers: (layer, head, token, y, x).

    q is not taken below the smallest half-precision number, in which maps are stored.

    >>> half = np.full((1, 1, 2, 1, 1), 0.5)
    >>> float(divergence(half, half)), round(float(divergence(np.array([1.0, 0.0]).reshape(half.shape), half)), 4)
    (0.0, 0.6931)
    """
    gain = p * (np.log(np.where(p > 0, p, 1)) - np.log(np.maximum(q, SMALLEST)))
    found: np.ndarray = gain.sum(2).mean((1, 2, 3)).sum()
    return found


def _divergences(grids: list[Grid], pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Means over pixels, heads and layers: (condition, pair, step) from the reference, (pair, step) from uniform."""
    numbers = np.zeros((*pairs.positions.shape, len(all_steps(grids))))
    uniform = np.zeros(numbers.shape[1:])
    for p, row in enumerate(counted(pairs.positions.T)):
        for g in grids:
            ref = int(row[0])
            used = g.table["role"].values[ref] != ""
            counts = g.table["count"].values[ref][used]
            even = (counts / counts.sum())[None, None, :, None, None]
            uniform[p] += _placed([_from_even(m[:, :, used], even) for m in maps_by_step(g, ref)], g, grids)
            for c, i in enumerate(row):
                if i < 0:
                    numbers[c, p] = np.nan
                    continue
                both = zip(maps_by_step(g, int(i)), maps_by_step(g, ref), strict=True)
                found = [divergence(_complete(m[:, :, used]), _complete(r[:, :, used])) for m, r in both]
                numbers[c, p] += _placed(found, g, grids)
    layers = sum(len(g.layers) for g in grids)
    return numbers / layers, uniform / layers


def _complete(maps: np.ndarray) -> np.ndarray:
    """Maps with one more column: attention to tokens that were not captured."""
    rest = 1 - maps.sum(2, keepdims=True)
    return np.concatenate([maps, np.where(np.isnan(rest) | (rest > REST), rest, 0)], axis=2)


def _from_even(maps: np.ndarray, even: np.ndarray) -> np.ndarray:
    """KL from the uniform distribution; NaN where tokens were not captured, whose number is not known."""
    whole = np.isfinite(maps).all() and np.abs(1 - maps.sum(2)).max() <= REST
    return divergence(maps, np.broadcast_to(even, maps.shape)) if whole else np.array(np.nan)


def _placed(values: Sequence[np.ndarray], grid: Grid, grids: list[Grid]) -> np.ndarray:
    """Values at a grid's steps (step,) among the steps of all grids, NaN elsewhere."""
    full = np.full(len(all_steps(grids)), np.nan)
    full[np.searchsorted(all_steps(grids), grid.probs["step"].values)] = np.array(values, dtype=float)
    return full
