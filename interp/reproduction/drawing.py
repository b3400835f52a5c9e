"""Figures that live inside the page: SVG whose ink follows the page's, and grids of small inline pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from interp.probes.style import legend, line, new_figure
from interp.reproduction.measures import Estimate

INK = {"#000000": "currentColor", "black": "currentColor", "#262626": "currentColor", "#e5e5e5": "var(--rule)"}
LABEL = "label t"
"""Of an axis of the paper's step labels, which fall during sampling."""
NOTE = "Bands and bars: bootstrap 95 % intervals."


def svg(figure: Any, label: str) -> str:
    """Return a matplotlib Figure as SVG text without a background; black is drawn in the page's color of text."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "interp"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
    text = re.sub(r"(stroke|fill): (#000000|#262626|#e5e5e5|black)\b", lambda m: f"{m[1]}: {INK[m[2]]}", text)
    text = re.sub(r"<text(?![^>]*fill)", '<text fill="currentColor"', text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', _opening(label), text, count=1, flags=re.S)
    return re.sub(r"\n\s*", "\n", text).replace('id="patch_1"', 'class="ground"', 1)


def _opening(label: str) -> Any:
    def opening(match: re.Match[str]) -> str:
        width = float(match[1].split()[2])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{match[1]}" '
            f'role="img" aria-label="{escape(label)}" style="width: min(100%, {width * 1.15:.0f}px); height: auto">'
        )

    return opening


def lines(
    panels: Sequence[tuple[str, str, str, Sequence[tuple[str, Sequence[float], Sequence[Estimate], str, str]]]],
    label: str,
    *,
    limits: Sequence[tuple[float | None, float | None]] | None = None,
    log: Sequence[bool] = (),
) -> str:
    """Draw panels of curves with bands: (title, x label, y label, [(name, x, estimates, color, style)…]) each.

    limits: of each panel's y; log: whether a panel's y axis is logarithmic.
    """
    from matplotlib.ticker import MaxNLocator

    beside = any(len(curves) > 2 for *_, curves in panels)  # a legend of many lines has no room among the curves
    figure, axes = new_figure(len(panels), width=4.9 if beside else 4.0, height=3.0)
    for k, (ax, (title, x_label, y_label, curves)) in enumerate(zip(axes, panels, strict=True)):
        for name, x, found, color, style in curves:
            mean = [e.value for e in found]
            line(ax, x, mean, [(e.low, e.high) for e in found], color, name, style)
            if len(mean) <= 12:
                ax.plot(x, mean, "o", color=color, markersize=3)
        ax.set_title(title, fontsize=10)
        ax.set(xlabel=x_label, ylabel=y_label)
        if k < len(log) and log[k]:
            ax.set_yscale("log")
        if limits is not None and limits[k] != (None, None):
            ax.set_ylim(*limits[k])
        ax.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if x_label == LABEL:
            ax.invert_xaxis()  # time flows to the right
        if any(name for name, *_ in curves) and len(curves) > 1:
            legend(ax, beside=beside)
    return svg(figure, label)


def bars(
    panels: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[Estimate], str]]]], names: Sequence[str], label: str
) -> str:
    """Draw panels of dots with intervals, a row for each of `names`: (title, x label, [(series, estimates, color)…])."""
    figure, axes = new_figure(len(panels), width=3.6, height=0.95 + 0.36 * len(names))
    at = np.arange(len(names))[::-1].astype(float)
    for k, (ax, (title, x_label, series)) in enumerate(zip(axes, panels, strict=True)):
        for s, (name, found, color) in enumerate(series):
            shift = 0.16 * ((len(series) - 1) / 2 - s)
            mean = np.array([e.value for e in found])
            spread = np.nan_to_num([mean - [e.low for e in found], [e.high for e in found] - mean]).clip(0)
            ax.errorbar(mean, at + shift, xerr=spread, fmt="o", color=color, capsize=2.5, markersize=4.5, label=name)
        ax.set_yticks(at, names if k == 0 else [""] * len(names))
        ax.set(ylim=(-0.6, len(names) - 0.4), xlabel=x_label)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7.5, frameon=False)
    return svg(figure, label)


def inline(picture: np.ndarray, alt: str, *, width: int = 112) -> str:
    """Return an <img> of a picture uint8 (height, width, rgb), its pixels inside the page; `width` pixels wide."""
    from PIL import Image

    image = Image.fromarray(np.asarray(picture, dtype=np.uint8))
    if image.width != width:
        how = Image.Resampling.LANCZOS if image.width > width else Image.Resampling.BICUBIC
        image = image.resize((width, round(image.height * width / image.width)), how)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" width="{image.width}" height="{image.height}">'
    )


def heat(field: np.ndarray, alt: str) -> str:
    """Return an <img> of a map (y, x), scaled to its own range, in colors."""
    from matplotlib import colormaps

    low, high = float(np.nanmin(field)), float(np.nanmax(field))
    scaled = (field - low) / (high - low) if high > low else np.zeros_like(field)
    return inline((colormaps["inferno"](scaled)[..., :3] * 255).round(), alt)


def grid(rows: Sequence[tuple[str, Sequence[str]]], heads: Sequence[str] = ()) -> str:
    """Return a table of inline pictures: (label, pictures) a row, `heads` above the columns."""
    top = "".join(f"<th>{escape(h)}</th>" for h in heads)
    head = f"<thead><tr><th></th>{top}</tr></thead>" if heads else ""
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for label, cells in rows
    )
    return f'<div class="wide"><table class="pictures">{head}<tbody>{body}</tbody></table></div>'
