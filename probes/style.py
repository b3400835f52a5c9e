"""The one look of all plots: colours for colour-blind eyes too (Okabe & Ito 2008), no pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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


def mean_and_spread(values: Any, axis: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, 10th and 90th percentile over `axis`, ignoring NaN; all-NaN stays NaN silently."""
    array = np.moveaxis(np.asarray(values, dtype=float), axis, 0)
    if not np.isfinite(array).any():
        empty = np.full(array.shape[1:], np.nan)
        return empty, empty, empty
    masked = np.ma.masked_invalid(array)
    mean = masked.mean(0).filled(np.nan)
    rows = array[np.isfinite(array).reshape(len(array), -1).any(1)]
    low, high = np.nanpercentile(np.where(np.isfinite(rows), rows, mean), [10, 90], axis=0)
    return mean, low, high


def curve(ax: Axes, x: Any, values: Any, *, color: str, label: str, dashed: bool = False) -> None:
    """Draw the mean over samples (axis 0 of `values`) with a band from the 10th to the 90th percentile."""
    mean, low, high = mean_and_spread(values)
    ax.plot(x, mean, color=color, label=label, linestyle="--" if dashed else "-", linewidth=1.6)
    if len(values) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
