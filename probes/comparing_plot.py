"""Drawing comparisons of conditions: one panel a measure, means with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = {
    "image_distance": "L1 distance of pictures (1)",
    "latent_distance": "‖x₀ − x₀,ref‖ / ‖x₀,ref‖ (1)",
}
MAX_SCORES = 6


def draw_bars(ds: xr.Dataset, *, conditions: Sequence[str] | None = None) -> Figure:
    """Draw each measure of a comparison with its interval, one dot a condition.

    ds: the result of a probe that compares conditions. conditions: those drawn, in this order; default all.
    """
    from interp.probes.style import BLUE, ORANGE, note, panels, title

    chosen = [str(c) for c in (ds["condition"].values if conditions is None else conditions)]
    found = measures(ds)
    figure, axes = panels(len(found), width=3.8, height=1.0 + 0.32 * len(chosen))
    rows = np.arange(len(chosen))[::-1]
    for k, (ax, (name, text, mean, interval)) in enumerate(zip(axes, found, strict=True)):
        m, i = mean.sel(condition=chosen), interval.sel(condition=chosen)
        color = BLUE if "distance" in name else ORANGE
        low, high = i.sel(bound="low").values, i.sel(bound="high").values
        bars = np.nan_to_num([m.values - low, high - m.values]).clip(0)
        ax.errorbar(m.values, rows, xerr=bars, fmt="o", capsize=3, markersize=5, color=color, clip_on=False)
        ax.set_yticks(rows, chosen if k % 3 == 0 else [""] * len(chosen))
        ax.set(ylim=(-0.6, len(chosen) - 0.4), xlabel=text)
        if "distance" in name:
            ax.set_xlim(left=0)
        ax.grid(axis="x", color="0.9", linewidth=0.6)
        title(ax, name.replace("_", " "))
    note(figure, f"Dots: means over {ds.attrs['pairs']} pairs. Bars: bootstrap 95 % intervals over prompts.")
    return figure


def draw_along(ds: xr.Dataset, x: str, label: str, *, by: str | None = None) -> Figure:
    """Draw each measure of a comparison against a coordinate `x` of the conditions, with its interval.

    by: a coordinate of the conditions that gives each of its values a line of its own.
    """
    from matplotlib.ticker import MaxNLocator

    from interp.probes.style import BLUE, GREEN, ORANGE, legend, line, note, panels, title

    found = measures(ds)
    figure, axes = panels(len(found))
    kinds = [""] if by is None else list(dict.fromkeys(str(v) for v in ds[by].values if str(v)))
    for ax, (name, text, mean, interval) in zip(axes, found, strict=True):
        for kind, color, style in zip(kinds, (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
            of = np.ones(ds.sizes["condition"], bool) if by is None else np.isin(ds[by].values, [kind, ""])
            order = np.flatnonzero(of)[np.argsort(ds[x].values[of], kind="stable")]
            at, low_high = ds[x].values[order], interval.isel(condition=order).transpose(..., "bound")
            line(ax, at, mean.isel(condition=order), low_high, color, kind.replace("_", " "), style)
            ax.plot(at, mean.isel(condition=order), "o", color=color, markersize=4)
        ax.set(xlabel=label, ylabel=text)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "distance" in name:
            ax.set_ylim(bottom=0)
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        title(ax, name.replace("_", " "))
        if by is not None:
            legend(ax)
    note(figure, f"Lines: means over {ds.attrs['pairs']} pairs. Bands: bootstrap 95 % intervals over prompts.")
    return figure


def measures(ds: xr.Dataset) -> list[tuple[str, str, xr.DataArray, xr.DataArray]]:
    """Return name, axis label, mean (condition,) and interval (condition, bound) of each measure in a comparison."""
    found = [
        (name, text, ds[f"{name}_mean"], ds[f"{name}_interval"]) for name, text in LABEL.items() if f"{name}_mean" in ds
    ]
    if "passes_saved" in ds:
        exact = ds["passes_saved"].expand_dims(bound=["low", "high"], axis=-1)
        found.append(("passes_saved", "share of forward passes saved (1)", ds["passes_saved"], exact))
    for metric in list(ds["metric"].values)[:MAX_SCORES] if "score_mean" in ds else []:
        mean, interval = (ds[f"score_{part}"].sel(metric=metric) for part in ("mean", "interval"))
        found.append((str(metric), "score (the metric's own unit)", mean, interval))
    return found


def show(ax: Axes, picture: Any, text: str = "", row: str = "") -> None:
    """Show a picture (height, width, rgb) without axes, with texts above it and, for the first of a row, beside it."""
    ax.imshow(np.asarray(picture), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(text, fontsize=8)
    ax.set_ylabel(fill(row, 18), fontsize=7, rotation=0, ha="right", va="center")
