"""What the layers of the text encoder know: pictures made from inner layers (Diffusion Lens, arXiv:2403.05846)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.comparing import compare
from interp.probes.comparing_plot import measures, show
from interp.probes.conditions import conditions_with
from interp.probes.needs import held

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

EXAMPLE = '{"baseline": [], "layer 1": [EncoderLayer(1)], "layer 2": [EncoderLayer(2)], …}'


def draw(ds: xr.Dataset, *, pairs: Sequence[int] = (0, 1)) -> Figure:
    """Draw the pictures of some pairs layer by layer, and each measure against the layer with its interval.

    ds: the result of `diffusion_lens`. pairs: positions; those beyond the last are left out.
    """
    from interp.probes.style import BLUE, ORANGE, line, note, strips_and_panels, title

    found = measures(ds)
    rows = [p for p in pairs if p < ds.sizes["pair"]] if "image" in ds else []
    figure, pictures, axes = strips_and_panels(len(rows), ds.sizes["condition"], len(found))
    for k, ax in enumerate(pictures):
        c, p = k % ds.sizes["condition"], rows[k // ds.sizes["condition"]]
        name, prompt = str(ds["condition"].values[c]), str(ds["prompt"].values[p])
        show(ax, ds["image"].isel(condition=c, pair=p), name if p == rows[0] else "", prompt if c == 0 else "")
    known = np.flatnonzero(ds["layer"].values >= 0)
    for ax, (name, text, mean, interval) in zip(axes, found, strict=True):
        color = BLUE if "distance" in name else ORANGE
        line(ax, ds["layer"].values[known], mean[known], interval.transpose("condition", "bound")[known], color, name)
        ax.plot(ds["layer"].values[known], mean[known], "o", color=color, markersize=4)
        ax.axhline(float(mean[0]), color="0.5", linestyle=":")
        ax.set(xlabel="encoder layers that work", ylabel=text)
        ax.set_xticks(ds["layer"].values[known])
        title(ax, name.replace("_", " "))
    note(figure, "Bands: bootstrap 95 % intervals over prompts. Dotted: the whole encoder.")
    return figure


@probe("diffusion_lens", needs={"samples": ["condition"]}, plot=draw)
def diffusion_lens(
    run: Run,
    *,
    reference: str = "baseline",
    conditions: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Distance (1) and scores of pictures made from inner layers of the text encoder, against the whole encoder's.

    Trace an unchanged condition and one with `interp.EncoderLayer(k)` for each layer k that matters, all with the same
    prompts and seeds: the later layers then pass their input on, and the final norm is applied as in the paper.

    Parameters: `reference` names the unchanged condition; `conditions` None (all that cut the encoder) or some of
    them; `metrics` None (all of `/scores`) or some; `resamples` and `seed` belong to the bootstrap over prompts.

    Returns a Dataset over `condition` (the reference first, then by layer) and `pair` (a prompt and seed):
    `image_distance`, `latent_distance`, `score` (condition, pair, metric), `passes`, each with `…_mean` and a 95 %
    interval `…_interval`, as far as the run holds them; and thumbnails, `image` (condition, pair, thumb_y, thumb_x,
    rgb), if pictures were captured. `layer` (condition) is the number of layers that worked, −1 for the reference.

    Raises InterpError when the run has no such conditions. Source: Toker et al., arXiv:2403.05846 (ACL 2024).

    >>> from interp.probes.testing import changed_run
    >>> cut = {f"layer {k}": [{"name": "encoder_layer", "layer": k}] for k in (2, 0)}
    >>> ds = diffusion_lens(changed_run(cut, samples=2))
    >>> ds["condition"].values.tolist(), ds["layer"].values.tolist()
    (['baseline', 'layer 0', 'layer 2'], [-1, 0, 2])
    """
    specs = conditions_with(run, ["encoder_layer"], conditions, asker="diffusion_lens", example=EXAMPLE)
    layer = {name: int(spec["layer"]) for name, spec in sorted(specs.items(), key=lambda item: int(item[1]["layer"]))}
    ds = compare(
        run, reference, list(layer), metrics=metrics, resamples=resamples, seed=seed, asker="diffusion_lens"
    )  # fmt: skip
    if "thumb" in held(run, "images"):
        where = {int(n): k for k, n in enumerate(run.samples.index)}
        thumbs = run.tree["images"].to_dataset()["thumb"].values
        chosen = np.stack([[_thumb(thumbs, where.get(int(n), -1)) for n in row] for row in ds["sample"].values])
        dims = ("condition", "pair", "thumb_y", "thumb_x", "rgb")
        ds["image"] = (dims, chosen, {"units": "1 (of 255)", "long_name": "thumbnail of the image"})
    return ds.assign_coords(layer=("condition", [-1, *layer.values()]))


def _thumb(thumbs: np.ndarray, i: int) -> np.ndarray:
    return thumbs[i] if i >= 0 else np.full_like(thumbs[0], 255)
