"""Vectors to steer with: numbers, files, and the difference of two conditions of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError
from interp.interventions.arrays import given_numbers, kept_path, read_array
from interp.stores import Run

Vector = str | tuple[float, ...]
"""The path of a file, or one number a channel."""


WHAT = "Steer: a vector"


def kept_vector(given: Any) -> Vector:
    """Return a vector as a spec can hold it.

    Raises:
        InterpError: it is neither numbers in one dimension nor the path of a .npy or .safetensors file.
    """
    if isinstance(given, (str, Path)):
        return kept_path(given, WHAT)
    values = given_numbers(given, WHAT)
    if values.ndim != 1:
        raise InterpError(
            f"{WHAT} is numbers, one a channel, not an array of shape {values.shape}; save larger ones with numpy.save and "
            "give the path"
        )
    return tuple(values.tolist())


def read_vector(vector: Vector) -> torch.Tensor:
    """Return a vector's numbers, float32.

    Raises:
        InterpError: its file is not there, or does not hold one array of finite numbers.
    """
    return read_array(vector, WHAT) if isinstance(vector, str) else torch.tensor(vector, dtype=torch.float32)


def steering_vector(
    run: Run,
    site: str,
    *,
    positive: str | Sequence[int],
    negative: str | Sequence[int],
    branch: str = "cond",
    steps: slice | Sequence[int] = slice(None),
) -> np.ndarray:
    """Return the difference of two groups' mean activations at a site, one number a channel (difference in means).

    Args:
        run: A run that captured the site.
        site: Its name.
        positive, negative: A condition, or positions of samples: the vector leads from the second to the first.
        branch: Whose activations.
        steps: Which captured steps are averaged.

    Returns:
        float64 (channel,), in the units of the activation: means over samples, steps and positions.

    Raises:
        InterpError: the site, a condition or a value is not there.

    Source: Marks and Tegmark, arXiv:2310.06824 (difference in means); Turner et al., arXiv:2308.10248.

    >>> import interp
    >>> run = interp.trace("scenes", ["a red circle", "a blue circle"], steps=2, progress=False,
    ...                    capture=interp.Capture(sites=("unet.mid_block:out",)))
    >>> steering_vector(run, "unet.mid_block:out", positive=[0], negative=[1]).shape
    (192,)
    """
    means = []
    for chosen in (positive, negative):
        part = run.condition(chosen) if isinstance(chosen, str) else run.isel(list(chosen))
        value = part.site(site)
        if branch not in value["branch"].values:
            raise InterpError(
                f"the run captured {site!r} in {', '.join(map(str, value['branch'].values))}, not in {branch!r}"
            )
        value = value.sel(branch=branch).isel(step=steps)
        over = [d for d in value.dims if d not in ("channel", "feature")]
        mean = value.astype("float64").mean(over, skipna=False).values
        if not np.isfinite(mean).all():
            raise InterpError(f"{site!r} was not evaluated in some of these samples and steps, so it has no mean")
        means.append(mean)
    return np.asarray(means[0] - means[1])
