"""When the shape of attention is that of the picture: edges of maps against edges of the final image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.attribution import grid_size
from interp.probes.base import probe
from interp.probes.bootstrap import mean_interval, units_of
from interp.probes.labels import sample_labels
from interp.probes.maps import Grid, layer_labels, maps_by_step, open_grids, resize
from interp.probes.progress import counted
from interp.probes.words import Words, chosen_words
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709


def draw(ds: xr.Dataset) -> Figure:
    """Draw the edge-F1 of the maps and its ratio to the last step's.

    ds: the result of `attention_convergence`. Lines are means over words and samples, bands bootstrap 95 % intervals.
    """
    from interp.probes.style import BLUE, ORANGE, curve, line, new_figure, note, step_axis, title

    figure, (absolute, relative) = new_figure(2)
    drawn = partial(curve, units=units_of(ds))
    drawn(absolute, ds.step, ds.f1.mean("word"), color=BLUE, label="edge-F1")
    absolute.set(ylabel="F1 of edges (1)", ylim=(0, None))
    title(absolute, "Edges of word maps against the image")
    line(relative, ds.step, ds.relative, ds.relative_interval, ORANGE, "relative")
    relative.axhline(1, color="0.5", linestyle=":")
    relative.set(ylabel="mean F1 / that of the last step (1)", ylim=(0, None))
    title(relative, "Relative to the last step")
    for ax in (absolute, relative):
        step_axis(ax)
    note(figure)
    return figure


@probe("attention_convergence", needs={"attention": True, "images": ["image"]}, plot=draw)
def attention_convergence(
    run: Run,
    *,
    steps: int | str | slice | Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    words: Sequence[str | tuple[str, int]] | str | None = None,
    grid: str = "latent",
    sigma: float = 1.0,
    low: float = 0.1,
    high: float = 0.2,
    tolerance: int = 0,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """F1 of the edges of each word's attention map with the edges of the final image, at each step (1).

    A word's map at a step is the mean over layers and heads of its sub-tokens' maps in the conditional branch, resized
    bicubically to `grid`; the image's luminance is resized to the same grid, smoothed before it is made smaller. Both
    are scaled to 0…1 and turned into edges by Canny's detector. F1 = 2·P·R/(P + R), with P the share of the map's
    edge pixels that are edges of the image and R the share of the image's edge pixels that are edges of the map.

    Parameters: `steps`, `layers`, `words` and `grid` choose as in `token_attribution`; `sigma` (pixels of the grid),
    `low` and `high` (thresholds of the gradient, of maps scaled to 1) are Canny's, which the paper does not give;
    `tolerance` (pixels) is how far apart two edges may be and still agree; `resamples` and `seed` belong to the
    bootstrap over prompts.

    Returns a Dataset, float64: `f1` (sample, step, word), 0 where one of the two has no edges, NaN where neither has
    any, the branch was not evaluated or the sample is not finished; `relative` (step) = the mean over words and
    samples divided by that of the last step, as in the paper, with its 95 % interval in `relative_interval`
    (step, bound). word_text and word_occurrence (sample, word) name the words. Samples are read one by one.

    Raises InterpError for steps, layers or words that are not there, and for thresholds or a tolerance that cannot be.
    Source: Yi et al., arXiv:2405.15330, section 4.1, Figure 1 (there over all layers and all tokens).

    >>> from interp.stores import synthetic_run
    >>> ds = attention_convergence(synthetic_run(samples=2, steps=6, seed=0), words=["circle", "triangles"])
    >>> ds["f1"].dims, float(ds["relative"][-1])
    (('sample', 'step', 'word'), 1.0)
    """
    if not 0 <= low <= high <= 1 or sigma < 0 or tolerance < 0:
        raise InterpError(
            f"attention_convergence: low={low!r}, high={high!r} must rise within 0 and 1, and sigma={sigma!r} and "
            f"tolerance={tolerance!r} must not be negative"
        )
    grids = _same_steps(open_grids(run, steps=steps, layers=layers))
    size = grid_size(run, grids, grid)
    vocabulary = chosen_words(grids[0].table, words)
    canny = partial(edges, sigma=sigma, low=low, high=high)
    image = run.tree["images"].to_dataset()["image"]
    done = run.samples["status"].to_numpy() == 1 if "status" in run.samples else np.ones(len(run), dtype=bool)
    f1 = np.full((len(run), grids[0].probs.sizes["step"], vocabulary.text.shape[1]), np.nan)
    for i in counted(np.flatnonzero(done)):
        wanted = canny(shrunk(image.isel(sample=int(i)).values @ LUMINANCE, size))
        for s, maps in enumerate(_word_maps(grids, vocabulary, int(i), size)):
            for w in np.flatnonzero(np.isfinite(maps).all((1, 2))):
                f1[i, s, w] = edge_f1(canny(maps[w]), wanted, tolerance)
    labels = {**layer_labels(grids), **sample_labels(run), **vocabulary.coords(), "bound": ["low", "high"]}
    result = xr.Dataset({"f1": (("sample", "step", "word"), f1, _attrs("F1 of edges"))}, labels)
    with np.errstate(invalid="ignore"):
        count = np.isfinite(f1).sum(2)
        mean = np.where(count == 0, np.nan, np.nansum(f1, 2) / np.maximum(count, 1))
    relative, interval = mean_interval(
        mean, units_of(result), resamples=resamples, seed=seed, statistic=lambda means: means / means[:, -1:]
    )
    result["relative"] = ("step", relative, _attrs("mean F1 relative to the last step"))
    result["relative_interval"] = (("step", "bound"), interval, _attrs("95 % interval of the relative F1"))
    return result.assign_attrs(grid=f"{size[0]}x{size[1]}")


def edges(image: np.ndarray, *, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    """Return Canny's edges, bool (y, x), of an image (y, x) scaled to 0…1; an even image has none.

    Source: Canny 1986, doi:10.1109/TPAMI.1986.4767851, by scikit-image.

    >>> step = np.zeros((8, 8)); step[:, 4:] = 3.0
    >>> bool(edges(step).any()), bool(edges(np.ones((8, 8))).any())
    (True, False)
    """
    from skimage.feature import canny

    smallest, largest = image.min(), image.max()
    if largest - smallest <= 1e-12 * max(abs(largest), 1e-300):
        return np.zeros(image.shape, dtype=bool)
    scaled = (image - smallest) / (largest - smallest)
    found: np.ndarray = canny(scaled, sigma=sigma, low_threshold=low, high_threshold=high)
    return found


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int = 0) -> float:
    """Return the F1 of two binary edge images (y, x); NaN if neither has an edge.

    >>> edge_f1(np.eye(4, dtype=bool), np.eye(4, dtype=bool)), edge_f1(np.eye(4) > 0, np.zeros((4, 4)) > 0)
    (1.0, 0.0)
    """
    if not found.any() and not wanted.any():
        return float("nan")
    if not found.any() or not wanted.any():
        return 0.0
    precision = (found & _thick(wanted, tolerance)).sum() / found.sum()
    recall = (wanted & _thick(found, tolerance)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image (y, x) at another size, smoothed first where it becomes smaller."""
    from skimage.transform import resize as scaled

    result: np.ndarray = scaled(image, size, order=1, anti_aliasing=True, preserve_range=True)
    return result


def _thick(mask: np.ndarray, tolerance: int) -> np.ndarray:
    """Edges widened by `tolerance` pixels in every direction."""
    from skimage.morphology import dilation, footprint_rectangle

    widened: np.ndarray = dilation(mask, footprint_rectangle((2 * tolerance + 1,) * 2)) if tolerance else mask
    return widened


def _same_steps(grids: list[Grid]) -> list[Grid]:
    """The grids at the steps that all of them hold."""
    shared = set.intersection(*({int(s) for s in g.probs["step"].values} for g in grids))
    if not shared:
        raise InterpError("the grids of this run have no step in common: choose layers of one grid")
    return [Grid(g.name, g.probs.isel(step=_where(g, shared)), g.table) for g in grids]


def _where(grid: Grid, steps: set[int]) -> Any:
    positions = [k for k, s in enumerate(grid.probs["step"].values) if int(s) in steps]
    whole = len(positions) == grid.probs.sizes["step"]
    return slice(None) if whole else positions


def _word_maps(grids: list[Grid], vocabulary: Words, i: int, size: tuple[int, int]) -> Any:
    """Yield one sample's word maps (word, y, x) at each step, means over layers and heads."""
    layers = sum(len(g.layers) for g in grids)
    for together in zip(*(maps_by_step(g, i) for g in grids), strict=True):
        total = sum(resize(maps.mean(1).sum(0), *size) for maps in together)
        yield vocabulary.of(np.asarray(total) / layers, i)


def _attrs(text: str) -> dict[str, str]:
    return {"units": "1", "long_name": text}
