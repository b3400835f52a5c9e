"""Drawing a sweep: one dimension as dots with intervals, two as a map of numbers, a panel a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp.stores.errors import InterpError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOTES = {
    1: "Dots: means over {pairs} pairs. Bars: bootstrap 95 % intervals over prompts.",
    2: "Means over {pairs} pairs. Bold: the bootstrap 95 % interval over prompts excludes 0.",
}


def draw(ds: xr.Dataset, *, metric: str | None = None) -> Figure:
    """Draw the effect of each point, or what it recovered where something was corrupted first.

    ds: the result of `sweep`; metric: one of its metrics, default all, a panel each. Raises InterpError for more than two
    dimensions: select some first (`ds.isel(seed=0)`).
    """
    from interp.probes.style import new_figure, note, title

    name = "recovered" if "recovered" in ds else "effect"
    mean = ds["recovered"] if name == "recovered" else ds["effect_mean"]
    dims = [str(d) for d in mean.dims if d != "metric"]
    metrics = [str(m) for m in ds["metric"].values] if metric is None else [metric]
    if not 1 <= len(dims) <= 2:
        raise InterpError(f"a sweep over {len(dims)} dimensions cannot be drawn; select one or two: {', '.join(dims)}")
    rows = ds.sizes[dims[0]]
    labels = {d: short(ds[d].values) for d in dims}
    room = 0.055 * max(len(t) for t in labels[dims[0]])
    width = max(3.0 + room, 5.4 / len(metrics))  # the note below must fit
    paint = _map if len(dims) == 2 else _curve if ds[dims[0]].dtype.kind in "fi" else _dots
    height = 3.2 if paint is _curve else max(2.4, 1.2 + 0.22 * rows)
    figure, axes = new_figure(len(metrics), width=width, height=height)
    for ax, one in zip(axes, metrics, strict=True):
        values, interval = (ds[n].sel(metric=one).transpose(*dims, ...) for n in (mean.name, f"{name}_interval"))
        paint(ax, values, interval.values, labels, name)
        title(ax, one if name == "effect" else f"{one}, recovered")
    note(figure, NOTES[len(dims)].format(pairs=ds.attrs["pairs"]))
    return figure


def short(labels: np.ndarray) -> list[str]:
    """Return labels without the parts that all of them share, at dots and colons.

    >>> short(np.array(["unet.mid_block.attn2:out", "unet.up_blocks.0.attn2:out"]))
    ['mid_block', 'up_blocks.0']
    """
    texts = [f"{v:g}" if isinstance(v, (float, np.floating)) else str(v) for v in labels.tolist()]
    if len(texts) < 2 or not all("." in t for t in texts) or any(t[0].isdigit() for t in texts):
        return texts
    parts = [t.replace(":", ".:").split(".") for t in texts]
    head = next((i for i, p in enumerate(zip(*parts, strict=False)) if len({*p}) > 1), 0)
    back = [p[::-1] for p in parts]
    tail = next((i for i, p in enumerate(zip(*back, strict=False)) if len({*p}) > 1), 0)
    return [".".join(p[head : max(len(p) - tail, head + 1)]).replace(".:", ":") for p in parts]


def _dots(ax: Axes, mean: xr.DataArray, interval: np.ndarray, labels: dict[str, list[str]], name: str) -> None:
    from interp.probes.style import BLUE

    (dim,) = mean.dims
    rows = np.arange(mean.size)[::-1]
    bars = np.nan_to_num([mean.values - interval[:, 0], interval[:, 1] - mean.values]).clip(0)
    ax.errorbar(mean.values, rows, xerr=bars, fmt="o", color=BLUE, capsize=2, markersize=4)
    _ends(ax.axvline, name)
    ax.set_yticks(rows, labels[str(dim)], fontsize=7)
    ax.set(xlabel=_axis(name), ylabel=str(dim))


def _curve(ax: Axes, mean: xr.DataArray, interval: np.ndarray, labels: dict[str, list[str]], name: str) -> None:
    from interp.probes.style import BLUE, dots

    (dim,) = mean.dims
    dots(ax, mean[dim], mean.values, interval, BLUE, "")
    ax.plot(mean[dim], mean.values, color=BLUE, linewidth=1)
    _ends(ax.axhline, name)
    ax.set(xlabel=str(dim), ylabel=_axis(name))


def _map(ax: Axes, mean: xr.DataArray, interval: np.ndarray, labels: dict[str, list[str]], name: str) -> None:
    down, across = (str(d) for d in mean.dims)
    size = np.nanmax(np.abs(mean.values), initial=1e-12)
    ax.imshow(mean.values, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    for (i, j), value in np.ndenumerate(mean.values):
        if np.isfinite(value):
            sure = interval[i, j, 0] > 0 or interval[i, j, 1] < 0
            weight, color = ("bold" if sure else "normal"), ("white" if abs(value) > 0.6 * size else "black")
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, weight=weight, color=color)
    ax.set_yticks(range(len(labels[down])), labels[down], fontsize=7)
    ax.set_xticks(range(len(labels[across])), labels[across], fontsize=7)
    ax.set(xlabel=across, ylabel=down)


def _ends(line: Any, name: str) -> None:
    for end in (0, 1) if name == "recovered" else (0,):
        line(end, color="0.5", linestyle=":")


def _axis(name: str) -> str:
    return "recovered (1): 0 as corrupted, 1 as clean" if name == "recovered" else "effect, in the metric's own unit"
