"""x̂0, what the model predicts the clean picture to be, decoded at each step and written into the run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr

from interp.autoencoding import to_pictures
from interp.capture import Capture
from interp.errors import InterpError
from interp.families import Arguments, Family, find_family
from interp.loading import load
from interp.stores import Run
from interp.stores.groups import x0_group

AT_ONCE = 8
"""Pictures decoded together."""


def write_x0(run: Run, pipe: Any = None, steps: Any = None) -> None:
    """Decode x̂0 of all finished samples and write the node `x0`: image (sample, step, height, width, rgb).

    Args:
        run: A run that kept latents and noise predictions.
        pipe: The pipeline whose autoencoder decodes; default is the one that made the run, loaded again.
        steps: Which steps, as `Capture.steps`: a slice, a list, a share such as 0.2; None is all.

    Raises:
        InterpError: latents or predictions were not kept, or the pipeline must be given.
    """
    latents, trajectory = run.latents, run.trajectory
    if "guidance" not in trajectory:
        run.noise_pred  # noqa: B018 - says what is missing
    pipe = _pipeline(run) if pipe is None else load(pipe) if isinstance(pipe, str) else pipe
    kept = Capture(steps=steps).chosen_steps(latents.sizes["step"])
    done = np.flatnonzero(run.samples["status"].to_numpy() == 1)
    if not len(done) or not kept:
        raise InterpError("the run has no finished sample, or no step was chosen, to decode x0 of")
    prediction = str(run.attrs.get("prediction_type", "epsilon"))
    family, options = find_family(pipe), dict(run.attrs.get("pipeline_options") or {})

    def decoded(i: int) -> np.ndarray:
        one = trajectory.isel(sample=i, step=kept)
        clean = torch.from_numpy(predicted_x0(one, prediction, guided_prediction(one, family, options)))
        return np.concatenate([to_pictures(pipe, part) for part in clean.split(AT_ONCE)])

    def blocks() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for i in done:
            yield int(i), {"image": decoded(int(i))}

    first = decoded(int(done[0]))
    times = {name: trajectory[name].values[kept] for name in ("step", "timestep", "sigma") if name in trajectory.coords}
    total = len(run) if run.path is None else int(_stored(run))
    group = x0_group(
        total, height=first.shape[1], width=first.shape[2], steps=times["step"], timestep=times["timestep"],
        sigma=times.get("sigma"), attrs={"prediction_type": prediction},
    )  # fmt: skip
    run.write_group("x0", group, blocks())


def predicted_x0(trajectory: xr.Dataset, prediction: str, guided: np.ndarray) -> np.ndarray:
    """Return the clean latents that one sample's guided predictions imply: all float32 (step, channel, y, x).

    Of x_t = a·x_0 + b·ε: ε-prediction gives (x_t − b·ε)/a, flow x_t − b·v, and v (of x_t scaled to unit variance)
    (a·x_t/n − b·v)/n with n² = a² + b² (Salimans and Ho, arXiv:2202.00512).
    """
    x = trajectory["latents"].values.astype("float64")
    a, b = (trajectory[name].values.astype("float64")[:, None, None, None] for name in ("data_scale", "noise_scale"))
    out = guided.astype("float64")
    if prediction == "sample":
        return out.astype("float32")
    if "flow" in prediction:
        return (x - b * out).astype("float32")
    if prediction == "v_prediction":
        norm = np.sqrt(a**2 + b**2)
        return ((a * x / norm - b * out) / norm).astype("float32")
    if prediction != "epsilon":
        raise InterpError(f"x0 of the prediction type {prediction!r} is unknown here")
    return ((x - b * out) / a).astype("float32")


def guided_prediction(trajectory: xr.Dataset, family: Family, arguments: Arguments) -> np.ndarray:
    """Return what the scheduler was given (step, channel, y, x): both branches combined as the pipeline does, or the one
    that was evaluated."""
    noise = trajectory["noise_pred"]
    cond, uncond = (noise.sel(branch=b).values for b in ("cond", "uncond"))
    combined = [
        family.combine(torch.from_numpy(u[None]), torch.from_numpy(c[None]), float(scale), arguments)[0]
        for u, c, scale in zip(uncond, cond, trajectory["guidance_scale"].values, strict=True)
    ]
    both = torch.stack(combined).numpy()
    return np.where(np.isnan(cond), uncond, np.where(np.isnan(uncond), cond, both))


def _stored(run: Run) -> int:
    from interp.stores import open_run

    assert run.path is not None
    return len(open_run(run.path))


def _pipeline(run: Run) -> Any:
    name = str(dict(run.attrs.get("pipeline") or {}).get("id", ""))
    if not name:
        raise InterpError(
            "decoding x0 needs the run's autoencoder, and the run does not know where its pipeline came from; give it: "
            "interp.score(run, ['x0'], pipe=pipe)"
        )
    return load(name)
