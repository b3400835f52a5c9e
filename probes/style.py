"""The one look of all plots: colours for colour-blind eyes too (Okabe & Ito 2008), no pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp.probes.bootstrap import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK = PALETTE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)
ROLE_COLOUR = {"bos": BLACK, "word": BLUE, "eos": ORANGE, "pad": GREEN}
HEAT = "inferno"


def new_figure(columns: int, rows: int = 1, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a Figure and its rows·columns axes, row by row; sizes in inches per panel."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(width * columns, height * rows), layout=layout, dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=8)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, list(grid.flat)


def panels(number: int, *, across: int = 3, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a Figure with that many panels, at most `across` in a row; sizes in inches per panel."""
    columns = min(across, max(number, 1))
    figure, axes = new_figure(columns, -(-number // columns), width=width, height=height)
    for ax in axes[number:]:
        ax.remove()
    return figure, axes[:number]


def strips_and_panels(
    rows: int, columns: int, number: int, *, across: int = 4, size: float = 1.15, height: float = 2.9
) -> tuple[Figure, list[Axes], list[Axes]]:
    """Return a Figure with rows·columns pictures above and `number` panels below, at most `across` in a row.

    size: of a picture, height: of a panel, in inches.
    """
    from matplotlib.figure import Figure

    lines, across = -(-number // across), min(number, across)
    width, height = max(columns * size, 2.6 * across, 6.0), height * lines
    picture = min(width / max(columns, 1), 1.6) + 0.15
    figure = Figure(figsize=(width, rows * picture + height), layout="constrained", dpi=120)
    share = [rows * picture, height] if rows else [1e-3, height]
    parts: Any = figure.subfigures(2, 1, height_ratios=share)
    above, below = parts
    pictures = list(above.subplots(rows, columns, squeeze=False).flat) if rows else []
    axes = list(below.subplots(lines, across, squeeze=False).flat)
    for ax in axes[number:]:
        ax.remove()
    for ax in axes[:number]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=8)
        ax.xaxis.label.set_size(9)
        ax.yaxis.label.set_size(9)
    return figure, pictures, axes[:number]


def title(ax: Axes, text: str) -> None:
    """Set the panel's title."""
    ax.set_title(text, fontsize=10)


def step_axis(ax: Axes) -> None:
    """Label the horizontal axis as sampling steps, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step (0 = noisiest)")
    ax.ticklabel_format(axis="x", useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", color="0.9", linewidth=0.6)


def curve(
    ax: Axes,
    x: Any,
    values: Any,
    *,
    color: str,
    label: str,
    units: np.ndarray | None = None,
    dashed: bool | str = False,
) -> None:
    """Draw the mean over samples (axis 0 of `values`) with its bootstrap 95 % interval as a band.

    units: (sample,) what the bootstrap draws anew (`interp.probes.bootstrap.units_of`); None: the samples. NaN is
    left out. The interval is that of 2,000 resamples and seed 0.
    """
    array = np.asarray(values, dtype=float)
    line(ax, x, *mean_interval(array, np.arange(len(array)) if units is None else units), color, label, dashed)


def line(ax: Axes, x: Any, mean: Any, interval: Any, color: str, label: str, dashed: bool | str = False) -> None:
    """Draw a mean (point,) with its interval (point, bound) as a band."""
    style = dashed if isinstance(dashed, str) else "--" if dashed else "-"
    ax.plot(x, mean, color=color, label=label, linestyle=style, linewidth=1.6)
    low, high = np.asarray(interval).T
    if np.isfinite(low).any():
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def dots(ax: Axes, x: Any, mean: Any, interval: Any, color: str, label: str, marker: str = "o") -> None:
    """Draw means (point,) as dots with their intervals (point, bound) as bars."""
    low, high = np.asarray(interval).T
    bars = np.nan_to_num([np.asarray(mean) - low, high - np.asarray(mean)]).clip(0)
    ax.errorbar(x, mean, yerr=bars, fmt=marker, color=color, capsize=3, markersize=5, label=label, clip_on=False)


def legend(ax: Axes, *, beside: bool = False) -> None:
    """Put a small legend without a frame, where it covers least, or beside the panel."""
    where = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if beside else {}
    ax.legend(fontsize=7, frameon=False, **where)


def shades(number: int) -> list[Any]:
    """Return that many colours of one scale, for what is ordered: layers, windows."""
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0, 0.9, max(number, 1))][:number]


def note(figure: Figure, text: str = "Bands and bars: bootstrap 95 % interval of the mean.") -> None:
    """Say in small letters below the panels how uncertainty is shown."""
    figure.supxlabel(text, fontsize=7, color="0.35")
