"""Drawing token_attribution as heat maps over the image, and attention_mass as curves over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.bootstrap import units_of
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run


def draw_maps(
    ds: xr.Dataset,
    *,
    samples: Sequence[int] = (0,),
    what: str = "word",
    run: Run | None = None,
    columns: int = 8,
    alpha: float = 0.6,
) -> Figure:
    """Draw the word (or token) heat maps of some samples over their images, each map on its own scale.

    ds: the result of `token_attribution`. samples: positions, one block of panels each. what: "word" or
    "token". run: its full-size images are used instead of the thumbnails in `ds`. columns: panels in a row.
    Raises InterpError for a sample that is not there.
    """
    from interp.probes.style import HEAT, new_figure

    if what not in ("word", "token"):
        raise InterpError(f"what={what!r} is not possible: it is 'word' or 'token'")
    panels: list[tuple[str, np.ndarray | None, np.ndarray | None]] = []
    rows_of: list[int] = []
    for sample in samples:
        if not -ds.sizes["sample"] <= sample < ds.sizes["sample"]:
            raise InterpError(f"sample {sample} is not there: this result has {ds.sizes['sample']} samples")
        image, one = _image(ds, sample, run), ds.isel(sample=sample)
        cells: list[tuple[str, np.ndarray | None, np.ndarray | None]] = (
            [("image", image, None)] if image is not None else []
        )
        cells += [(label, image, heat) for label, heat in _maps(one, what)]
        cells += [("", None, None)] * (-len(cells) % min(columns, max(len(cells), 1)))
        panels += cells
        rows_of.append(len(cells))
    across = min(columns, max(rows_of))
    filled = panels + [("", None, None)] * (-len(panels) % across)
    figure, axes = new_figure(across, len(filled) // across, width=1.5, height=1.65)
    for ax, (label, image, heat) in zip(axes, filled, strict=True):
        ax.set_axis_off()
        ax.set_title(label, fontsize=9)
        box = (0, 1, 1, 0)  # image and map cover the same square, whatever their grids
        shape = next((a.shape for a in (image, heat) if a is not None), (1, 1))
        if image is not None:
            shown = image if heat is None else np.repeat(image.mean(-1, keepdims=True).astype(image.dtype), 3, -1)
            ax.imshow(shown, extent=box, interpolation="bilinear")
        if heat is not None:
            low, top = (np.nanmin(heat), np.nanmax(heat)) if np.isfinite(heat).any() else (0.0, 1.0)
            ax.imshow(
                heat,
                extent=box,
                cmap=HEAT,
                vmin=low,
                vmax=top,
                alpha=1 if image is None else alpha,
                interpolation="bilinear",
            )
        ax.set_aspect(shape[0] / shape[1])
    prompts = [str(ds["prompt"].values[s]) for s in samples] if "prompt" in ds.coords else []
    figure.suptitle(fill(" · ".join(prompts), 22 * across), fontsize=10)
    scale = f"brightness: {ds.word_map.attrs['units']}, each map from its minimum to its maximum"
    figure.supxlabel(fill(scale, 30 * across), fontsize=7)
    return figure


def draw_mass(ds: xr.Dataset, *, variable: str = "mass_per_token") -> Figure:
    """Draw the attention of each role over the steps, mean over layers, and of each layer, mean over steps.

    ds: the result of `attention_mass`. variable: "mass" (sum over the role's tokens) or "mass_per_token".
    Bands are bootstrap 95 % intervals of the means over the samples.
    """
    from interp.probes.style import ROLE_COLOUR, legend, new_figure, note, step_axis, title
    from interp.probes.style import curve as drawn

    curve = partial(drawn, units=units_of(ds))

    if variable not in ds:
        raise InterpError(f"variable={variable!r} is not possible: it is 'mass' or 'mass_per_token'")
    figure, (over_steps, over_layers) = new_figure(2)
    values = ds[variable]
    for role in map(str, ds["role"].values):
        one = values.sel(role=role)
        label = f"{role}" if variable == "mass" else f"{role}, mean per token"
        colour = ROLE_COLOUR[role]
        curve(over_steps, ds["step"], one.mean("layer").values, color=colour, label=label)
        curve(over_layers, range(ds.sizes["layer"]), one.mean("step").values, color=colour, label=label)
        over_layers.plot(range(ds.sizes["layer"]), one.mean(["sample", "step"]), ".", color=colour)
    step_axis(over_steps)
    over_layers.set(xlabel="layer (index)")
    over_layers.set_xticks(range(ds.sizes["layer"]))
    for ax, text in ((over_steps, "Mean over layers"), (over_layers, "Mean over steps")):
        ax.set(ylabel="share of attention (1)", ylim=(0, None))
        title(ax, text)
    legend(over_layers, beside=True)
    note(figure)
    return figure


def _maps(one: xr.Dataset, what: str) -> list[tuple[str, np.ndarray]]:
    """The labelled maps of one sample that hold anything."""
    maps, texts = one[f"{what}_map"].values, one[f"{what}_text"].values
    labels = [str(text) for text in texts]
    if what == "word":
        repeated = one["word_occurrence"].values
        labels = [f"{text} #{n}" if n > 0 else text for text, n in zip(labels, repeated, strict=True)]
    else:
        roles = [str(role) for role in one["token_role"].values]
        labels = [text if role == "word" else role for text, role in zip(labels, roles, strict=True)]
    return [(label, heat) for label, heat in zip(labels, maps, strict=True) if label]


def _image(ds: xr.Dataset, sample: int, run: Run | None) -> np.ndarray | None:
    if run is not None and "images" in run.tree.children:
        image: np.ndarray = run.tree["images"].to_dataset()["image"].isel(sample=sample).values
        return image
    return np.asarray(ds["image"].isel(sample=sample).values) if "image" in ds else None
