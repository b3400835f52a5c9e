"""Runs made by hand, array by array, so that the right answer of a probe is known."""

import numpy as np
import xarray as xr

from interp.stores import Run


def trajectory(latents, final, data_scale, noise_scale, **more):
    """latents (sample, step, channel, y, x), final (sample, channel, y, x), scales (step,)."""
    steps = np.asarray(latents).shape[1]
    fields = {
        "latents": (("sample", "step", "channel", "y", "x"), np.asarray(latents, dtype="float32")),
        "final_latents": (("sample", "channel", "y", "x"), np.asarray(final, dtype="float32")),
    }
    coords = {
        "step": np.arange(steps),
        "timestep": ("step", np.linspace(999, 0, steps)),
        "data_scale": ("step", np.asarray(data_scale, dtype=float)),
        "noise_scale": ("step", np.asarray(noise_scale, dtype=float)),
    }
    if "noise_pred" in more:
        dims = ("sample", "step", "branch", "channel", "y", "x")
        fields["noise_pred"] = (dims, more["noise_pred"])
        fields["guidance_scale"] = (("sample", "step"), more["guidance_scale"])
        coords["branch"] = ["cond", "uncond"]
    return xr.Dataset(fields, coords)


def attention(probs, texts, roles, words, counts=None, *, layers=None, steps=None, branches=("cond",)):
    """probs (sample, step, branch, layer, head, token, y, x); the token table as lists a sample."""
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    probs = np.asarray(probs)
    layers = layers or [f"unet.layer{k}.attn2" for k in range(probs.shape[3])]
    steps = np.arange(probs.shape[1]) if steps is None else np.asarray(steps)
    table = {"text": texts, "role": roles, "word": words}
    table["count"] = counts or [[int(role != "") for role in line] for line in roles]
    coords = {f"token_{name}": (("sample", "token"), np.asarray(value)) for name, value in table.items()}
    coords |= {"step": steps, "timestep": ("step", 999.0 - steps), "branch": list(branches), "layer": layers}
    coords["head"] = [str(h) for h in range(probs.shape[4])]
    return xr.Dataset({"probs": (dims, probs)}, coords)


def make_run(nodes, **columns):
    """A run of these nodes; `columns` is its table of samples."""
    n = len(next(iter(nodes.values()))["sample"]) if not columns else len(next(iter(columns.values())))
    defaults = {
        "prompt": [""] * n,
        "condition": ["baseline"] * n,
        "prompt_id": list(range(n)),
        "seed": [0] * n,
    }
    table = {**defaults, "status": [1] * n, **columns}
    root = xr.Dataset({k: ("sample", np.asarray(v)) for k, v in table.items()}, {"sample": np.arange(n)})
    root.attrs = {"format": "interp.run/1", "prediction_type": "epsilon"}
    return Run(xr.DataTree.from_dict({"/": root, **nodes}))


def scores(**metrics):
    """`/scores` from name=values; "__" stands for the colon."""
    names = [name.replace("__", ":") for name in metrics]
    values = np.stack([np.asarray(v, dtype="float32") for v in metrics.values()], axis=1)
    return xr.Dataset({"score": (("sample", "metric"), values)}, {"metric": names})
