"""Several swaps side by side: windows of exchanged EOS tokens, numbers of them (arXiv:2405.15330, §5.2, appendix C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from interp.probes.comparing import relative
from interp.probes.conditions import Spec, describe, specs_of, steps_of
from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run

EXCHANGES = ("replace_eos", "replace_prompt", "replace_tokens")


def swept(run: Run, results: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Put the means of several swaps (name → result of `eos_replacement` for it) side by side, over `swap`.

    Raises InterpError without a swap.
    """
    if not results:
        raise InterpError("eos_replacement: swap=() names no condition; give one or several")
    names = list(results)
    parts = []
    for one in results.values():
        kept = one[[v for v in one.data_vars if "pair" not in one[v].dims]]
        parts.append(kept.drop_vars([c for c in kept.coords if "pair" in kept[c].dims]))
    ds = xr.concat(parts, dim=xr.Variable("swap", names), combine_attrs="drop_conflicts")
    mean = ds["alignment_mean"].sel(image="swap").transpose("swap", "metric", "text")
    attrs = {"units": "1", "long_name": "(mean − worst) / (best − worst) of the swapped images"}
    ds["alignment_relative"] = (mean.dims, relative(mean.values, best="high"), attrs)
    specs, steps = specs_of(run), run.tree["trajectory"].to_dataset()
    windows = [_window(specs[name], steps) for name in names]
    return ds.assign_coords(
        changes=("swap", [describe(specs[name]) for name in names]),
        first_step=("swap", [first for first, _ in windows]),
        steps_exchanged=("swap", [number for _, number in windows]),
        tokens_repeated=("swap", [_repeated(specs[name]) for name in names]),
        pairs=("swap", [one.attrs["pairs"] for one in results.values()]),
    )


def _window(specs: list[Spec], steps: xr.Dataset) -> tuple[int, int]:
    """The first step at which states of the other prompt are read, and how many there are; (−1, 0) if never."""
    spec = next((s for s in specs if s.get("name") in EXCHANGES and s.get("value") != "repeat"), None)
    on = np.flatnonzero(steps_of(spec, steps)) if spec is not None else np.array([], int)
    return (int(steps["step"].values[on[0]]), len(on)) if len(on) else (-1, 0)


def _repeated(specs: list[Spec]) -> int:
    """How many tokens became repeated words; −1 if none, or if all (no number is written then)."""
    spec = next((s for s in specs if s.get("value") == "repeat"), {})
    return -1 if spec.get("count") is None else int(spec["count"])
