"""The picture that the model expects at each step: x̂0 decoded, as a film-strip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import units_of
from interp.probes.comparing import pixel_distance
from interp.probes.labels import sample_labels, step_labels
from interp.probes.needs import held
from interp.probes.progress import counted
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run


def draw(ds: xr.Dataset) -> Figure:
    """Draw the film-strips, and below them how far x̂0 is from the end and how much it changes.

    ds: the result of `x0_film`. Curves are means over all samples with bootstrap 95 % intervals.
    """
    from interp.probes.comparing_plot import show
    from interp.probes.style import BLUE, ORANGE, curve, legend, note, step_axis, strips_and_panels

    strips, frames = ds.sizes["strip"], ds.sizes["frame"]
    figure, pictures, (ax,) = strips_and_panels(strips, frames, 1)
    for k, spot in enumerate(pictures):
        picture = ds["image"].isel(strip=k // frames, frame=k % frames)
        text = f"step {int(ds['frame_step'][k % frames])}" if k < frames else ""
        show(spot, picture, text, prompt_of(ds, k // frames) if k % frames == 0 else "")
    curve(ax, ds.step, ds.distance, color=BLUE, label=f"from {ds.attrs['end']}", units=units_of(ds))
    curve(ax, ds.step, ds.change, color=ORANGE, label="from the step before", units=units_of(ds))
    ax.set(ylabel="L1 distance (1)", ylim=(0, None))
    step_axis(ax)
    legend(ax)
    note(figure)
    return figure


def prompt_of(ds: xr.Dataset, strip: int) -> str:
    """Return the prompt of a strip, if it is known."""
    at = np.flatnonzero(ds["sample"].values == ds["strip_sample"].values[strip])
    return str(ds["prompt"].values[at[0]]) if "prompt" in ds.coords and len(at) else ""


@probe("x0_film", needs={"x0": True}, plot=draw)
def x0_film(run: Run, *, samples: Sequence[int] = (0, 1), frames: int = 8) -> xr.Dataset:
    """Film-strips of x̂0, the picture that the model expects at each step, and its distance from the end (1).

    Decode x̂0 into the run first: `interp score RUN --metric x0`.

    Parameters: `samples` are the positions of the samples that get a strip; `frames` how many of the decoded steps it
    shows, evenly spread from the first to the last.

    Returns a Dataset: `image` uint8 (strip, frame, height, width, rgb) with strip_sample (strip) and frame_step
    (frame); float64 (sample, step), for all samples: `distance`, the mean |difference| of the pixels of x̂0 and of the
    final image as a share of 255 (attrs["end"] says "the image", or "the last x̂0" if no image was captured), and
    `change`, the same from the step before, NaN at the first. Unfinished samples are NaN. Samples are read one by one.

    Raises InterpError when x̂0 was not decoded, and for samples or frames that are not there. Source: x̂0 as in Ho et
    al., arXiv:2006.11239, equation 15.

    >>> from interp.probes.testing import film_run
    >>> ds = x0_film(film_run(samples=2, steps=6), frames=3)
    >>> ds["image"].dims, ds["frame_step"].values.tolist()
    (('strip', 'frame', 'height', 'width', 'rgb'), [0, 2, 5])
    """
    node = run.tree["x0"].to_dataset()
    film, number = node["image"], node.sizes["step"]
    chosen = [samples] if isinstance(samples, int) else list(samples)[: max(len(run), 1)]
    for s in chosen:
        if not 0 <= s < len(run):
            raise InterpError(f"x0_film: sample {s} is not there: this run has {len(run)}, counted from 0")
    if frames < 1:
        raise InterpError(f"x0_film: frames={frames!r} is not possible; it is 1 or more")
    at = np.unique(np.linspace(0, number - 1, min(frames, number)).astype(int))
    done = run.samples["status"].to_numpy() == 1 if "status" in run.samples else np.ones(len(run), dtype=bool)
    images = run.tree["images"].to_dataset()["image"] if "image" in held(run, "images") else None
    fits = images is not None and images.shape[1:] == film.shape[2:]
    numbers = np.full((2, len(run), number), np.nan)
    strips: dict[int, np.ndarray] = {}
    for i in counted([*map(int, np.flatnonzero(done | np.isin(np.arange(len(run)), chosen)))]):
        shots = film.isel(sample=i).values
        if i in chosen:
            strips[i] = shots[at]
        if done[i]:
            end = images.isel(sample=i).values if images is not None and fits else shots[-1]
            last, before = end.astype(np.float64), None
            for s, shot in enumerate(shots):
                now = shot.astype(np.float64)
                numbers[0, i, s] = pixel_distance(now, last)
                if before is not None:
                    numbers[1, i, s] = pixel_distance(now, before)
                before = now
    dims = ("sample", "step")
    share = "1 (of the full pixel range)"
    variables: dict[str, Any] = {
        "image": (
            ("strip", "frame", "height", "width", "rgb"),
            np.stack([strips[i] for i in chosen]),
            {"units": "1 (of 255)", "long_name": "x̂0 decoded"},
        ),
        "distance": (dims, numbers[0], {"units": share, "long_name": "L1 distance of x̂0 from the end"}),
        "change": (dims, numbers[1], {"units": share, "long_name": "L1 distance of x̂0 from the step before"}),
    }
    labels = {
        **sample_labels(run),
        **step_labels(node),
        "frame_step": ("frame", node["step"].values[at]),
        "strip_sample": ("strip", run.samples.index.to_numpy()[chosen]),
    }
    return xr.Dataset(variables, labels, {"end": "the image" if fits else "the last x̂0"})
