"""How far the pictures of changed conditions are from those of a reference, and how their scores differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.bootstrap import mean_interval
from interp.probes.conditions import Pairs, describe, pair_up, specs_of
from interp.probes.labels import plain_text
from interp.probes.needs import held
from interp.probes.progress import counted
from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp.stores import Run

DISTANCES = ("image_distance", "latent_distance")
EXPLAINED = {
    "image_distance": ("1 (of the full pixel range)", "L1 distance of the picture from the reference's"),
    "latent_distance": ("1", "‖x₀ − x₀,ref‖ / ‖x₀,ref‖ of the final latents"),
    "score": ("the metric's own", "score"),
    "passes": ("forward passes", "forward passes really run, both branches"),
}


def compare(
    run: Run,
    reference: str,
    conditions: Sequence[str],
    *,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    asker: str = "this analysis",
) -> xr.Dataset:
    """Compare conditions of a run with a reference condition, sample by sample of the same prompt and seed.

    Returns a Dataset over `condition` (the reference first) and `pair` (a prompt and seed), float64, of what the run
    holds: `image_distance` (mean absolute difference of the pixels, share of 255), `latent_distance` (relative L2
    distance of the final latents), `score` (condition, pair, metric) and `passes`. Each has its mean over the pairs in
    `<name>_mean` (condition, …) and a bootstrap 95 % interval over prompts in `<name>_interval` (condition, …, bound).
    Coordinates: `changes` (condition) says what was done; prompt, prompt_id, seed (pair); `sample` (condition, pair)
    is the sample, −1 for none. A pair without a sample of a condition is NaN there.

    metrics: None for all of `/scores`, or some. Raises InterpError for conditions and metrics that are not there, and
    when the run holds neither pictures nor latents nor scores.

    >>> from interp.stores import synthetic_run
    >>> run = synthetic_run(samples=2, conditions=("baseline", "other"))
    >>> ds = compare(run, "baseline", ["other"])
    >>> ds["image_distance"].dims, float(ds["image_distance_mean"][0])
    (('condition', 'pair'), 0.0)
    """
    pairs = pair_up(run, reference, conditions)
    labels = run.samples.iloc[pairs.positions[0]]
    data: dict[str, Any] = {}
    found: dict[str, np.ndarray] = {}
    if "image" in held(run, "images"):
        found["image_distance"] = distances(pairs, 0, pictures(run), pixel_distance)
    if "final_latents" in held(run, "trajectory"):
        found["latent_distance"] = distances(pairs, 0, latents(run), relative_distance)
    names = _metrics(run, metrics, asker)
    if names:
        found["score"] = pairs.of(run.tree["scores"].to_dataset()["score"].sel(metric=names).values)
    if not found:
        raise InterpError(f"{asker} needs images, final latents or scores, of which this run holds none")
    if "nfe" in held(run, "trajectory"):
        found["passes"] = pairs.of(run.tree["trajectory"].to_dataset()["nfe"].values.sum(1))
    units = resampled(labels["prompt_id"].to_numpy())
    for name, values in found.items():
        dims = ("condition", "pair", *(["metric"] if name == "score" else []))
        summarise(data, name, dims, values, units, *EXPLAINED[name], resamples=resamples, seed=seed)
    specs = specs_of(run)
    numbers = run.samples.index.to_numpy()
    coords = {
        "condition": pairs.conditions,
        "changes": ("condition", [describe(specs[c]) for c in pairs.conditions]),
        "bound": ["low", "high"],
        "prompt": ("pair", plain_text(labels["prompt"])),
        "prompt_id": ("pair", labels["prompt_id"].to_numpy()),
        "seed": ("pair", labels["seed"].to_numpy()),
        "sample": (("condition", "pair"), np.where(pairs.positions >= 0, numbers[pairs.positions], -1)),
        **({"metric": names} if names else {}),
    }
    return xr.Dataset(data, coords, {"reference": reference, "level": 0.95, "pairs": len(labels)})


def summarise(
    data: dict[str, Any],
    name: str,
    dims: tuple[str, ...],
    values: np.ndarray,
    units: np.ndarray,
    unit: str,
    text: str,
    *,
    resamples: int,
    seed: int,
) -> None:
    """Add values (…, pair, …), their mean over the pairs and its interval (…, bound) to the variables `data`."""
    axis = dims.index("pair")
    mean, interval = mean_interval(np.moveaxis(values, axis, 0), units, resamples=resamples, seed=seed)
    rest = tuple(d for d in dims if d != "pair")
    data[name] = (dims, values, {"units": unit, "long_name": text})
    data[f"{name}_mean"] = (rest, mean, {"units": unit, "long_name": f"{text}, mean over pairs"})
    data[f"{name}_interval"] = ((*rest, "bound"), interval, {"units": unit, "long_name": f"{text}, 95 % interval"})


def resampled(prompts: np.ndarray) -> np.ndarray:
    """Return what the bootstrap draws anew: prompts, or the pairs themselves if there is one prompt only."""
    return prompts if len(np.unique(prompts)) > 1 else np.arange(len(prompts))


def distances(
    pairs: Pairs, to: int, read: Callable[[int], np.ndarray], distance: Callable[[np.ndarray, np.ndarray], float]
) -> np.ndarray:
    """Return the distance of each sample from that of condition number `to`, (condition, pair), NaN without either.

    `read(i)` gives what sample i has; only one pair is held at a time.
    """
    result = np.full(pairs.positions.shape, np.nan)
    for p, row in enumerate(counted(pairs.positions.T)):
        if row[to] < 0:
            continue
        wanted = read(int(row[to]))
        for c, i in enumerate(row):
            if i >= 0:
                result[c, p] = 0.0 if i == row[to] else distance(read(int(i)), wanted)
    return result


def pictures(run: Run) -> Callable[[int], np.ndarray]:
    """Return a reader of one sample's picture, float64 (height, width, rgb)."""
    images = run.tree["images"].to_dataset()["image"]
    return lambda i: np.asarray(images.isel(sample=i).values, dtype=np.float64)


def latents(run: Run) -> Callable[[int], np.ndarray]:
    """Return a reader of one sample's final latents, float64 (channel, y, x)."""
    final = run.tree["trajectory"].to_dataset()["final_latents"]
    return lambda i: np.asarray(final.isel(sample=i).values, dtype=np.float64)


def pixel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean absolute difference of two pictures as a share of 255."""
    return float(np.abs(one - other).mean() / 255)


def relative_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return ‖one − other‖ / ‖other‖; NaN if the other is 0."""
    size = np.linalg.norm(other)
    return float(np.linalg.norm(one - other) / size) if size > 0 else float("nan")


def relative(mean: np.ndarray, *, best: str) -> np.ndarray:
    """Return (value − worst)/(best − worst) over the conditions (axis 0): the paper's "relative" scores.

    best: "low" or "high" values.

    >>> relative(np.array([0.0, 0.1, 0.4]), best="low").tolist()
    [1.0, 0.75, 0.0]
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.fmin.reduce(mean, axis=0), np.fmax.reduce(mean, axis=0)  # NaN only where all are
        share = (mean - low) / (high - low)
    return 1 - share if best == "low" else share


def _metrics(run: Run, metrics: Sequence[str] | str | None, asker: str) -> list[str]:
    known = sorted(held(run, "scores"))
    if metrics is None:
        return known
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in wanted:
        if name not in known:
            raise InterpError(
                f"{asker} needs the scores {name!r}, where this run has {', '.join(known) or 'none'}"
                f"{nearest(name, known)}: run `interp score RUN` with that metric"
            )
    return wanted
