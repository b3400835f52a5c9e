"""The labels that results carry over from a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.stores.errors import InterpError

if TYPE_CHECKING:
    from interp.stores import Run

COLUMNS = ("prompt", "condition", "prompt_id", "seed")


def sample_labels(run: Run) -> dict[str, tuple[str, np.ndarray]]:
    """Return prompt, condition, prompt_id and seed of each sample, and `sample` itself, as coordinates."""
    root = run.tree.dataset
    labels: dict[str, tuple[str, np.ndarray]] = {}
    for name in ("sample", *COLUMNS):
        if name in root.variables:
            values = np.asarray(root[name].values)
            labels[name] = ("sample", values if values.dtype.kind in "iuf" else plain_text(values))
    return labels


def plain_text(values: Any) -> np.ndarray:
    """Return strings of any dtype (StringDType, object) as fixed-width unicode: every format takes it."""
    array = np.asarray(values)
    return np.array([str(v) for v in array.ravel().tolist()], dtype=str).reshape(array.shape)


def step_labels(dataset: xr.Dataset) -> dict[str, Any]:
    """Return step, and timestep, sigma and alpha_bar where known, as coordinates."""
    found = {"step": ("step", dataset["step"].values)}
    return found | {c: ("step", dataset[c].values) for c in ("timestep", "sigma", "alpha_bar") if c in dataset.coords}


def trajectory_of(run: Run) -> xr.Dataset:
    """Return the run's trajectory, lazily."""
    dataset: xr.Dataset = run.tree["trajectory"].to_dataset()
    return dataset


def check_option(asker: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise InterpError unless the value of an option is one of those known."""
    if value not in known:
        raise InterpError(f"{asker}: {name}={value!r} is not possible; it is one of {', '.join(map(repr, known))}")
