"""How much of a step is guidance: norms of the two branches' difference along the trajectory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.base import probe
from interp.probes.bootstrap import units_of
from interp.probes.labels import sample_labels, step_labels, trajectory_of
from interp.probes.progress import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.stores import Run

NAMES = {
    "uncond_norm": "‖ε(∅)‖, without text",
    "guidance_norm": "w‖ε(C) − ε(∅)‖, guidance",
    "ratio": "w‖ε(C) − ε(∅)‖ / ‖ε(∅)‖",
    "cosine": "cosine of ε(C) and ε(∅)",
}


def draw(ds: xr.Dataset) -> Figure:
    """Draw both norms, their ratio and the branches' cosine over the steps.

    ds: the result of `guidance_norm`. Lines are means over the samples, bands their bootstrap 95 % intervals.
    """
    from interp.probes.style import BLACK, BLUE, ORANGE, curve, legend, new_figure, note, step_axis, title

    drawn = partial(curve, units=units_of(ds))
    figure, (norms, ratio, cosine) = new_figure(3)
    drawn(norms, ds.step, ds.uncond_norm, color=BLACK, label=NAMES["uncond_norm"])
    drawn(norms, ds.step, ds.guidance_norm, color=ORANGE, label=NAMES["guidance_norm"])
    norms.set(ylabel="norm / √dimensions (model output)", ylim=(0, None))
    title(norms, "Guidance and unconditional score")
    legend(norms)
    drawn(ratio, ds.step, ds.ratio, color=ORANGE, label=NAMES["ratio"])
    ratio.set(ylabel=f"{NAMES['ratio']} (1)", ylim=(0, None))
    title(ratio, "Share of guidance")
    drawn(cosine, ds.step, ds.cosine, color=BLUE, label=NAMES["cosine"])
    cosine.set(ylabel=f"{NAMES['cosine']} (1)")
    title(cosine, "Agreement of the branches")
    for ax in (norms, ratio, cosine):
        step_axis(ax)
    note(figure)
    return figure


@probe("guidance_norm", needs={"trajectory": ["noise_pred", "guidance_scale"]}, plot=draw)
def guidance_norm(run: Run) -> xr.Dataset:
    """Norms of the unconditional prediction and of the guidance term at each step (model output, per dimension).

    With D the number of latent dimensions, w the guidance scale that the step really used, and ε(C), ε(∅) the raw
    outputs with and without text (noise, velocity or flow: see the run's `prediction_type`).

    Returns a Dataset, float64 (sample, step): `uncond_norm` = ‖ε(∅)‖/√D, `guidance_norm` = w‖ε(C) − ε(∅)‖/√D,
    `ratio` of the second to the first, and `cosine` of ε(C) and ε(∅), by which adaptive guidance decides
    (arXiv:2312.12487). NaN where one branch was not evaluated. Samples are read one by one.

    Raises InterpError when noise_pred was not captured. Source: Yi et al., arXiv:2405.15330, section 5.2, Figure 8b.

    >>> from interp.stores import synthetic_run
    >>> ds = guidance_norm(synthetic_run(samples=2, steps=6, seed=0))
    >>> ds["ratio"].dims, bool((ds["ratio"] > 0).all())
    (('sample', 'step'), True)
    """
    trajectory = trajectory_of(run)
    noise, scale = trajectory["noise_pred"], trajectory["guidance_scale"]
    shape = trajectory.sizes["sample"], trajectory.sizes["step"]
    numbers = {name: np.full(shape, np.nan) for name in NAMES}
    branches = [str(b) for b in trajectory["branch"].values]
    for i in counted(range(shape[0])):
        values = noise.isel(sample=i).values.astype(np.float64).reshape(shape[1], len(branches), -1)
        cond, uncond = (values[:, branches.index(name)] for name in ("cond", "uncond"))
        w = np.abs(scale.isel(sample=i).values.astype(np.float64))
        plain, guided, with_text = (_rms(field) for field in (uncond, cond - uncond, cond))
        numbers["uncond_norm"][i] = plain
        numbers["guidance_norm"][i] = w * guided
        with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 has no ratio
            numbers["ratio"][i] = w * guided / plain
            numbers["cosine"][i] = (cond * uncond).mean(1) / (with_text * plain)
    units = {"uncond_norm": "model output", "guidance_norm": "model output", "ratio": "1", "cosine": "1"}
    variables = {
        name: (("sample", "step"), values, {"units": units[name], "long_name": NAMES[name]})
        for name, values in numbers.items()
    }
    return xr.Dataset(variables, {**step_labels(trajectory), **sample_labels(run)})


def _rms(values: np.ndarray) -> np.ndarray:
    """The norm per dimension (step,) of (step, dimension)."""
    return np.sqrt((values**2).mean(1))
