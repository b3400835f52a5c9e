"""When the text is used: conditions that leave it out of the first or of the last steps (arXiv:2405.15330)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.comparing import compare, relative
from interp.probes.comparing_plot import draw_along
from interp.probes.conditions import Spec, check_condition, conditions_with, steps_of
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run

EARLY = '{"baseline": [], "early20": [RemoveText(stop=0.2)], "early40": [RemoveText(stop=0.4)], …}'
LATE = '{"baseline": [], "late20": [RemoveText(start=0.8)], "late40": [RemoveText(start=0.6)], …}'


@probe(
    "text_window",
    needs={"samples": ["condition"]},
    plot=partial(draw_along, x="steps_without_text", label="first steps without text"),
)
def text_window(
    run: Run,
    *,
    reference: str = "baseline",
    conditions: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Distance of pictures whose first steps had no text from those that had it throughout (1), and their scores.

    Trace these conditions, all with the same prompts and seeds: an unchanged one and `RemoveText(stop=…)` for several
    lengths of the beginning, e.g. `conditions={"baseline": [], "early20": [interp.RemoveText(stop=0.2)], …}`.

    Parameters: `reference` names the unchanged condition; `conditions` None (all that remove the text from the first
    step on) or some of them; `metrics` None (all of `/scores`) or some; `resamples` and `seed` belong to the bootstrap
    over prompts.

    Returns a Dataset over `condition` (the reference first, then by length) and `pair` (a prompt and seed):
    `image_distance` (mean |difference| of pixels as a share of 255), `latent_distance` (relative L2 of the final
    latents), `score` (condition, pair, metric), `passes`, each with `…_mean` and a 95 % interval `…_interval`, as far
    as the run holds them; `relative_image`, `relative_latent` (condition) and `relative_score` (condition, metric), the
    paper's (mean − worst)/(best − worst) over these conditions. Coordinates of the conditions: `steps_without_text`,
    and `a`, the paper's label of its section 5.2, there counted down from the number of steps: the text is used for
    t in [0, a) alone. (In its section 6 the same letter means the reverse: see `acceleration`.)

    Raises InterpError when the run has no such conditions. Source: Yi et al., arXiv:2405.15330, section 5.2, Figures 7
    and 8a.

    >>> from interp.probes.testing import changed_run
    >>> windows = {f"early{n}": [{"name": "remove_text", "stop": n, "unit": "step"}] for n in (2, 4)}
    >>> ds = text_window(changed_run(windows, samples=2, steps=6))
    >>> ds["condition"].values.tolist(), ds["steps_without_text"].values.tolist(), ds["a"].values.tolist()
    (['baseline', 'early2', 'early4'], [0, 2, 4], [6, 4, 2])
    """
    windows, _ = _windows(run, ["remove_text"], conditions, first=True, asker="text_window", example=EARLY)
    ds = compare(
        run, reference, list(windows), metrics=metrics, resamples=resamples, seed=seed, asker="text_window"
    )  # fmt: skip
    lengths = [0, *windows.values()]
    ds = ds.assign_coords(
        steps_without_text=("condition", lengths), a=("condition", [_number_of_steps(run) - n for n in lengths])
    )
    for name, short in (("image_distance", "image"), ("latent_distance", "latent"), ("score", "score")):
        if f"{name}_mean" in ds:
            mean = ds[f"{name}_mean"]
            share = relative(mean.values, best="high" if name == "score" else "low")
            attrs = {"units": "1", "long_name": f"{short}: (mean − worst) / (best − worst)"}
            ds[f"relative_{short}"] = (mean.dims, share, attrs)
    return ds


@probe(
    "acceleration",
    needs={"samples": ["condition"]},
    plot=partial(draw_along, x="steps_removed", label="last steps with one branch", by="removed"),
)
def acceleration(
    run: Run,
    *,
    reference: str = "baseline",
    conditions: Sequence[str] | str | None = None,
    metrics: Sequence[str] | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """What leaving a branch out of the last steps saves (1: share of forward passes) and what it changes (1).

    Trace these conditions, all with the same prompts and seeds: an unchanged one and, for several lengths of the end,
    `RemoveText(start=…)` (the paper's rule: the prediction without text alone) or, to compare, `RemoveGuidance(start=…)`
    (that with text alone), e.g. `conditions={"baseline": [], "late40": [interp.RemoveText(start=0.6)], …}`.

    Parameters: `reference` names the unchanged condition; `conditions` None (all that remove a branch up to the last
    step) or some of them; `metrics` None (all of `/scores`) or some; `resamples` and `seed` belong to the bootstrap
    over prompts.

    Returns a Dataset like that of `text_window`: `image_distance`, `latent_distance`, `score` and `passes` with their
    means and 95 % intervals, and `passes_saved` (condition) = 1 − passes/passes of the reference, as really run, beside
    `passes_saved_expected` = a/(2T) for a steps of T (solvers that evaluate the model once a step). Coordinates of the
    conditions: `steps_removed` = a of the paper's equation 9, and `removed`, "text" or "guidance", "" for the
    reference. Seconds are not part of a run: measure them by the clock.

    Raises InterpError when the run has no such conditions. Source: Yi et al., arXiv:2405.15330, section 6, equation 9,
    Table 2.

    >>> from interp.probes.testing import changed_run
    >>> late = {"late2": [{"name": "remove_text", "start": 4, "unit": "step"}]}
    >>> ds = acceleration(changed_run(late, samples=2, steps=6))
    >>> ds["steps_removed"].values.tolist(), ds["passes_saved"].values.round(3).tolist()
    ([0, 2], [0.0, 0.167])
    """
    names = ["remove_text", "remove_guidance"]
    windows, specs = _windows(run, names, conditions, first=False, asker="acceleration", example=LATE)
    ds = compare(
        run, reference, list(windows), metrics=metrics, resamples=resamples, seed=seed, asker="acceleration"
    )  # fmt: skip
    lengths = np.array([0, *windows.values()])
    ds = ds.assign_coords(
        steps_removed=("condition", lengths),
        removed=("condition", ["", *(str(specs[c]["name"]).removeprefix("remove_") for c in windows)]),
    )
    if "passes_mean" in ds:
        saved = 1 - ds["passes_mean"].values / ds["passes_mean"].values[0]
        ds["passes_saved"] = ("condition", saved, {"units": "1", "long_name": "share of forward passes saved"})
    expected = lengths / (2 * _number_of_steps(run))
    ds["passes_saved_expected"] = ("condition", expected, {"units": "1", "long_name": "a / (2T)"})
    return ds


def _windows(
    run: Run, names: list[str], conditions: Sequence[str] | str | None, *, first: bool, asker: str, example: str
) -> tuple[dict[str, int], dict[str, Spec]]:
    """The conditions that remove a branch from the first step on (or up to the last), by length; and their specs."""
    specs = conditions_with(run, names, conditions, asker=asker, example=example)
    lengths = {}
    for name, spec in specs.items():
        off = steps_of(spec, _steps(run))
        edge, number = (off if first else off[::-1]), int(off.sum())
        if number and edge[:number].all():
            lengths[name] = number
        elif conditions is not None:
            check_condition(run, name)
            where = "starts with the first" if first else "ends with the last"
            raise InterpError(f"{asker}: the window of condition {name!r} is not one that {where} step")
    if not lengths:
        raise InterpError(f"{asker} found no window of the kind it needs: trace the run with conditions={example}")
    return dict(sorted(lengths.items(), key=lambda item: item[1])), specs


def _steps(run: Run) -> xr.Dataset:
    """A dataset with the run's steps, timesteps and noise levels."""
    if "trajectory" in run.tree.children:
        return run.tree["trajectory"].to_dataset()
    return xr.Dataset(coords={"step": np.arange(int(run.attrs["steps"]))})


def _number_of_steps(run: Run) -> int:
    return int(_steps(run).sizes["step"])
