"""Drawing a probe's result: its own plot, or plain curves over the steps for a probe that brings none."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.probes.base import Probe
from interp.probes.bootstrap import units_of
from interp.probes.discovery import find_probe, loaded_probe
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CURVES = 12


def plot(ds: xr.Dataset, *, probe: Probe | None = None, **options: Any) -> Figure:
    """Draw a probe's result and return a matplotlib Figure; nothing is shown and no pyplot state is touched.

    The probe is found by `ds.attrs["probe"]`; pass `probe=` for one that lives in a notebook. `options` go to
    the probe's own plot. A probe without one gets a panel a variable, curves over the steps, means over the
    samples.

    Raises InterpError when `ds` is not the result of a probe, or nothing in it can be drawn.

    >>> from interp.stores import synthetic_run
    >>> figure = plot(synthetic_run().probe("frequency_energy"))
    >>> len(figure.axes)
    3
    """
    if not isinstance(ds, xr.Dataset) or (probe is None and "probe" not in ds.attrs):
        raise InterpError('plot() takes the Dataset that a probe returned: its attrs["probe"] is missing here')
    if probe is None:
        name = str(ds.attrs["probe"])
        probe = loaded_probe(name) or find_probe(name)
    return (probe.plot or plot_curves)(ds, **options)


def plot_curves(ds: xr.Dataset) -> Figure:
    """Draw each variable with a `step` dimension as curves: means over samples, other dimensions as colours.

    Bands are bootstrap 95 % intervals of the means.

    ds: any Dataset; variables without `step` or of text are left out. Raises InterpError when none is left.
    """
    from interp.probes.style import PALETTE, curve, legend, new_figure, step_axis

    drawable = {k: v for k, v in ds.data_vars.items() if "step" in v.dims and v.dtype.kind in "fiub"}
    if not drawable:
        raise InterpError("nothing in this result depends on the step: give the probe a plot= of its own")
    figure, axes = new_figure(len(drawable))
    for ax, (key, variable) in zip(axes, drawable.items(), strict=True):
        over = next((d for d in ("sample", "pair") if d in variable.dims), None)
        others = [d for d in variable.dims if d not in ("step", over)]
        if np.prod([variable.sizes[d] for d in others], initial=1) > MAX_CURVES:
            variable, others = variable.mean(others, keep_attrs=True), []
        for n, index in enumerate(product(*(range(variable.sizes[d]) for d in others))):
            chosen = dict(zip(others, index, strict=True))
            text = " ".join(
                str(variable[d].values[i]) if d in variable.coords else f"{d} {i}" for d, i in chosen.items()
            )
            one, color = variable.isel(chosen), PALETTE[n % len(PALETTE)]
            if over is None:
                ax.plot(one["step"], one, color=color, label=text)
            else:
                curve(ax, one["step"], one.transpose(over, "step"), color=color, label=text, units=units_of(ds, over))
        step_axis(ax)
        ax.set_ylabel(f"{key} ({variable.attrs.get('units', '')})")
        if others:
            legend(ax)
    return figure
