"""Synthetic runs with several conditions or decoded x̂0, for trying probes on; `interp.probes.testing` offers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from interp.probes.conditions import steps_of
from interp.stores import Run, synthetic_run
from interp.stores.groups import x0_group


def swap_run(samples: int = 4, **kwargs: Any) -> Run:
    """Return a synthetic run of conditions `baseline` and `eos`; the `target` of a prompt is the next prompt.

    kwargs: those of `interp.stores.synthetic_run`. Nothing was really swapped: for trying `eos_replacement`
    on.

    >>> swap_run(samples=2).samples["target"].tolist()[0] == swap_run(samples=2).samples["prompt"].tolist()[1]
    True
    """
    run = synthetic_run(samples=samples, conditions=("baseline", "eos"), **kwargs)
    prompts = [str(p) for p in run.samples["prompt"]]
    following = [prompts[(i + 1) % samples + i // samples * samples] for i in range(len(prompts))]
    tree = run.tree.copy()
    tree["target"] = xr.DataArray(np.array(following, dtype=np.dtypes.StringDType()), dims="sample")
    return Run(tree)


def changed_run(conditions: Mapping[str, Sequence[Mapping[str, Any]]], samples: int = 3, **kwargs: Any) -> Run:
    """Return a synthetic run of `baseline` and these conditions, whose interventions are written into it as specs.

    Nothing was really changed, but what `remove_text` and `remove_guidance` skip is NaN and not counted in `nfe`.
    kwargs: those of `interp.stores.synthetic_run`. For trying probes on that compare conditions.

    >>> run = changed_run({"late": [{"name": "remove_text", "start": 0.5}]}, samples=1, steps=6)
    >>> run.nfe.values.tolist(), run.attrs["conditions"]["late"]
    ([[6, 6], [3, 6]], [{'name': 'remove_text', 'start': 0.5}])
    """
    run = synthetic_run(samples=samples, conditions=("baseline", *conditions), **kwargs)
    names = run.samples["condition"].to_numpy()

    def skipped(dataset: xr.Dataset) -> xr.Dataset:
        for name, specs in conditions.items():
            for spec in specs:
                lost = {"remove_text": "cond", "remove_guidance": "uncond"}.get(str(spec["name"]))
                if lost is not None and {"step", "branch"} <= set(dataset.dims):
                    dataset = _without_branch(dataset, names == name, steps_of(spec, dataset), lost)
        return dataset

    changed = like(run, skipped)
    changed.tree.attrs["conditions"] = {"baseline": [], **{k: [dict(s) for s in v] for k, v in conditions.items()}}
    return changed


def film_run(samples: int = 2, **kwargs: Any) -> Run:
    """Return a synthetic run with the node `x0`: pictures that go from grey to the image as the noise falls.

    kwargs: those of `interp.stores.synthetic_run`. For trying `x0_film` on.

    >>> film_run(samples=1, steps=6).x0.sizes["step"]
    6
    """
    run = synthetic_run(samples=samples, **kwargs)
    table = run.trajectory
    final = run.final_latents.values
    size = 4 * final.shape[-1]
    clean = 127.5 + 60 * final[:, :3].repeat(4, 2).repeat(4, 3).transpose(0, 2, 3, 1)
    share = table["data_scale"].values[None, :, None, None, None]
    films = np.clip(np.rint(127.5 + share * (clean[:, None] - 127.5)), 0, 255).astype("uint8")
    steps, timestep, sigma = (table[c].values for c in ("step", "timestep", "sigma"))
    group = x0_group(len(run), height=size, width=size, steps=steps, timestep=timestep, sigma=sigma)
    run.write_group("x0", group, ((i, {"image": film}) for i, film in enumerate(films)))
    return run


def _without_branch(dataset: xr.Dataset, samples: np.ndarray, steps: np.ndarray, branch: str) -> xr.Dataset:
    mine = xr.DataArray(samples, dims="sample") & (dataset["branch"] == branch).reset_coords(drop=True)
    off = mine & xr.DataArray(steps, dims="step")

    def cut(v: xr.DataArray) -> xr.DataArray:
        if v.name == "nfe":
            return (v - mine * int(steps.sum())).transpose(*v.dims).astype(v.dtype)
        return v.where(~off).transpose(*v.dims).astype(v.dtype) if {"step", "branch"} <= set(v.dims) else v

    return dataset.map(cut, keep_attrs=True)


def like(run: Run, change: Callable[[xr.Dataset], xr.Dataset]) -> Run:
    """Return a run of the nodes that `change` makes of this one's."""
    nodes = {node.path: change(node.to_dataset(inherit=False)) for node in run.tree.subtree}
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs.update(run.tree.attrs)
    return Run(tree)
