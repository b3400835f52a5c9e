"""Drawing eos_replacement: alignments with intervals, and how far the swap is from both baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"steps_exchanged": "steps with B's EOS", "tokens_repeated": "EOS tokens replaced by repeated words"}


def draw(ds: xr.Dataset) -> Figure:
    """Draw mean alignments with their intervals, and the swap's latent distances to both baselines, if there are any.

    ds: the result of `eos_replacement`. One panel a metric (each has its own unit), one for the distances; for several
    swaps a panel a metric, over the steps exchanged, the tokens repeated, or the swaps' names.
    """
    if "swap" in ds.dims:
        return _draw_swept(ds)
    from interp.probes.style import BLUE, ORANGE, new_figure, note, title

    colour = {"source": BLUE, "target": ORANGE}
    metrics = [str(m) for m in ds["metric"].values]
    traced = "latent_distance_mean" in ds
    figure, axes = new_figure(len(metrics) + traced)
    panels = axes[: len(metrics)]
    labels = {"swap": "words A,\nEOS of B", "source": "prompt A", "target": "prompt B"}
    there = (
        ds["alignment_mean"].notnull().any(["metric", "text"]).values
    )  # without a run of prompt B it has no pictures
    images = [str(i) for i in ds["image"].values[there]]
    for ax, metric in zip(panels, metrics, strict=True):
        for k, text in enumerate(("source", "target")):
            mean = ds["alignment_mean"].sel(metric=metric, text=text, image=images).values
            interval = ds["alignment_interval"].sel(metric=metric, text=text, image=images)
            bars = [mean - interval.sel(bound="low").values, interval.sel(bound="high").values - mean]
            letter = {"source": "A", "target": "B"}[text]
            at = [i + (k - 0.5) * 0.16 for i in range(len(images))]
            ax.errorbar(
                at,
                mean,
                yerr=bars,
                fmt="os"[k],
                color=colour[text],
                capsize=3,
                label=f"with the {text} {letter}",
            )
        ax.set_xticks(range(len(images)), [labels[i] for i in images])
        ax.set(
            xlim=(-0.5, len(images) - 0.5),
            xlabel="image made from",
            ylabel=f"{metric} alignment (the metric's own unit)",
        )
        wins, (low, high) = (
            float(ds["target_wins"].sel(metric=metric)),
            ds["target_wins_interval"].sel(metric=metric),
        )
        title(
            ax,
            f"{metric}: target wins {wins:.0%} [{float(low):.0%}, {float(high):.0%}] of {ds.attrs['pairs']}",
        )
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.legend(fontsize=7, frameon=False)
    if traced:
        _draw_distance(axes[-1], ds, colour)
    note(
        figure,
        f"Means over {ds.attrs['pairs']} pairs; bars and bands: bootstrap 95 % intervals over {ds.attrs['resampled']}s.",
    )
    return figure


def _draw_distance(distance: Axes, ds: xr.Dataset, colour: dict[str, str]) -> None:
    """Distances of the swap's latents to those of both baselines, with bands."""
    from interp.probes.style import step_axis, title

    for side in ("source", "target"):
        gap = ds["latent_distance_mean"].sel(reference=side)
        if gap.isnull().all():
            continue
        low, high = (ds["latent_distance_interval"].sel(reference=side, bound=b) for b in ("low", "high"))
        name = {"source": "to prompt A's (source)", "target": "to prompt B's (target)"}[side]
        distance.plot(ds["step"], gap, color=colour[side], label=name, linewidth=1.6)
        distance.fill_between(ds["step"], low, high, color=colour[side], alpha=0.15, linewidth=0)
    distance.set(ylabel="‖x_swap − x_ref‖ / ‖x_ref‖ (1)", ylim=(0, None))
    title(distance, "Distance of the swap's latents")
    step_axis(distance)
    distance.legend(fontsize=7, frameon=False)


def _draw_swept(ds: xr.Dataset) -> Figure:
    """Mean alignment of the swapped images with source and target, one point a swap."""
    from interp.probes.style import BLUE, ORANGE, legend, line, note, panels, title

    x, label = next(
        ((ds[c].values, text) for c, text in AXES.items() if len(set(ds[c].values.tolist())) == ds.sizes["swap"]),
        (None, "condition"),
    )
    at = range(ds.sizes["swap"]) if x is None else x
    order = sorted(range(len(at)), key=lambda k: at[k])
    figure, axes = panels(ds.sizes["metric"])
    for ax, metric in zip(axes, map(str, ds["metric"].values), strict=True):
        for text, color in (("source", BLUE), ("target", ORANGE)):
            one = ds.sel(metric=metric, text=text, image="swap").isel(swap=order)
            points = [at[k] for k in order]
            interval = one["alignment_interval"].transpose("swap", "bound")
            line(ax, points, one["alignment_mean"], interval, color, f"with the {text}")
            ax.plot(points, one["alignment_mean"], "o", color=color, markersize=4)
        if x is None:
            ax.set_xticks(list(at), [str(s) for s in ds["swap"].values], rotation=20)
        ax.set(xlabel=label, ylabel=f"{metric} alignment (the metric's own unit)")
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        title(ax, metric)
        legend(ax)
    note(figure, f"Means; bands: bootstrap 95 % intervals over {ds.attrs['resampled']}s.")
    return figure
