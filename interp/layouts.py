"""The layout of a run: which groups, arrays and attributes a capture of a pipeline needs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from interp.capture import Capture, Reducer
from interp.catalog import attention_sites, dry_run, match_sites, text_length
from interp.clock import Timeline
from interp.errors import InterpError
from interp.families import AttentionSite, Family
from interp.hooks import At
from interp.interventions import Intervention
from interp.loading import origin
from interp.stores import Group, TokenTable
from interp.stores.schema import attention_group, images_group, site_group, text_group, trajectory_group


@dataclass(frozen=True)
class ReduceCapture:
    """A reduction of attention to keep: its name, function, layers in order, and the shape of one sample's result."""

    name: str
    fn: Reducer
    layers: list[AttentionSite]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteCapture:
    """A module output to keep: its site and one sample's dims and shape."""

    site: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]


def captured_sites(
    family: Family, capture: Capture, height: int, width: int
) -> tuple[list[AttentionSite], list[SiteCapture]]:
    """Return the attention sites (with their grids) and module sites that a capture selects."""
    if capture.attention is None and not capture.sites:
        return [], []
    shapes, grids = dry_run(family, height, width)
    attention = [
        AttentionSite(s.name, s.module, s.kind, s.heads, grids[s.name])
        for s in capture.chosen_attention(attention_sites(family))
    ]
    sites = []
    for pattern in capture.sites:
        for site in match_sites(family, pattern):
            path, _, quantity = site.partition(":")
            if quantity != "out" or path not in shapes:
                raise InterpError(
                    f"Capture(sites={pattern!r}) asks for {site!r}; modules of the denoiser can be kept by their output "
                    "('…:out'), attention by Capture(attention=…), anything else with interp.HookRegistry"
                )
            dims = {1: ("feature",), 2: ("position", "feature"), 3: ("channel", "y", "x")}.get(len(shapes[path]))
            if dims is None:
                raise InterpError(f"{site!r} has shape {shapes[path]}, which has no labels; read it with HookRegistry")
            sites.append(SiteCapture(site, dims, shapes[path]))
    return attention, sites


def captured_reductions(family: Family, capture: Capture, height: int, width: int) -> list[ReduceCapture]:
    """Return the reductions that a capture names; each is tried on uniform probabilities for its shape.

    Raises:
        InterpError: a glob matches nothing, the function fails, or its shape differs between layers.
    """
    if not capture.reduce:
        return []
    _, grids = dry_run(family, height, width)
    found = []
    for name, (glob, fn) in capture.reducers.items():
        layers = [
            AttentionSite(s.name, s.module, s.kind, s.heads, grids[s.name])
            for s in Capture(attention=glob).chosen_attention(attention_sites(family))
        ]
        shapes = {_reduced_shape(name, fn, site, text_length(family)) for site in layers}
        if len(shapes) > 1:
            raise InterpError(
                f"Capture(reduce={name!r}) gives different shapes for different layers ({sorted(shapes)}); return one "
                "shape, or name layers of one grid: reduce={name: (glob, function)}"
            )
        found.append(ReduceCapture(name, fn, layers, shapes.pop()))
    return found


def _reduced_shape(name: str, fn: Reducer, site: AttentionSite, text: int) -> tuple[int, ...]:
    queries = site.grid[0] * site.grid[1]
    keys = queries if site.kind == "self" else text
    at = At(f"{site.name}:probs", 0, 0.0, 0, "cond", 1)
    try:
        result = fn(torch.full((1, site.heads, queries, keys), 1 / keys), at)
        shape = tuple(result.shape)
    except Exception as error:
        raise InterpError(
            f"Capture(reduce={name!r}) fails on probabilities (sample 1, head {site.heads}, query {queries}, key {keys}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not shape or shape[0] != 1:
        raise InterpError(f"Capture(reduce={name!r}) must return (sample, …), but gave shape {shape} for one sample")
    return shape[1:]


def run_groups(
    family: Family, capture: Capture, times: Timeline, tokens: TokenTable, every_token: TokenTable,
    attention: list[AttentionSite], sites: list[SiteCapture], reductions: list[ReduceCapture], height: int, width: int,
    n: int,
) -> dict[str, Group]:  # fmt: skip
    """Return the store's groups, by path, of `n` samples."""
    channel, y, x = family.latent_shape(height, width)
    groups = {
        "trajectory": trajectory_group(
            n, timestep=times.timestep, sigma=times.sigma, alpha_bar=times.alpha_bar, data_scale=times.data_scale,
            noise_scale=times.noise_scale, channel=channel, y=y, x=x, noise_pred=capture.noise_pred, latents=capture.latents,
        )
    }  # fmt: skip
    kept = capture.chosen_steps(len(times))
    timing: dict[str, Any] = {"steps": kept, "timestep": times.timestep[kept]}
    for name, members in attention_groups(attention).items():
        heads = capture.chosen_heads(members[0].heads)
        if capture.heads != "mean" and len({s.heads for s in members}) > 1:
            raise InterpError(
                f"the layers at {name} have different numbers of heads; capture heads='mean', or one layer"
            )
        groups[name] = attention_group(
            n, kind=members[0].kind, grid=members[0].grid, layers=[s.name for s in members],
            heads=["mean"] if capture.heads == "mean" else [str(h) for h in heads], branches=capture.branches,
            sigma=times.sigma[kept], tokens=tokens, dtype=capture.dtype, self_attention=members[0].kind == "self", **timing,
        )  # fmt: skip
    for site in sites:
        groups[site_node(site.site)] = site_group(
            n,
            dims=site.dims,
            shape=site.shape,
            branches=capture.branches,
            attrs={"site": site.site},
            **timing,
        )
    for one in reductions:
        dims = ("layer", *(f"axis_{i}" for i in range(len(one.shape))))
        group = site_group(
            n, dims=dims, shape=(len(one.layers), *one.shape), branches=capture.branches,
            attrs={"reduction": capture.spec()["reduce"][one.name][1]}, **timing,
        )  # fmt: skip
        group.coords["layer"] = (("layer",), np.asarray([s.name for s in one.layers], object))
        groups[site_node(one.name)] = group
    if capture.text:
        width_of = int(family.dry_inputs(height, width).kwargs["encoder_hidden_states"].shape[-1])
        groups["text/" + next(iter(family.text_encoders))] = text_group(
            n, branches=["cond", "uncond"], token=every_token.width, feature=width_of, tokens=every_token
        )
    if capture.image:
        groups["images"] = images_group(n, height, width)
    return groups


def attention_groups(attention: list[AttentionSite]) -> dict[str, list[AttentionSite]]:
    """Sort attention sites into the store's groups, one a kind and grid."""
    groups: dict[str, list[AttentionSite]] = {}
    for site in attention:
        node = "self_attention" if site.kind == "self" else "attention"
        groups.setdefault(f"{node}/{site.grid[0]}x{site.grid[1]}", []).append(site)
    return groups


def site_node(site: str) -> str:
    """Return the store's group of a module site: `sites/unet.mid_block`."""
    return f"sites/{site.partition(':')[0]}"


def run_attrs(
    pipe: Any, family: Family, capture: Capture, conditions: Mapping[str, Sequence[Intervention]], steps: int,
    guidance: float, height: int, width: int, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the root attributes: all that must be equal for a run to be resumed, and the versions."""
    scheduler = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    return {
        "pipeline": {
            "class": type(pipe).__name__,
            **origin(pipe),
            "config_hash": _config_hash(pipe),
            "family": family.name,
        },
        "weights_hash": _weights_hash(family.denoiser),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            **json.loads(json.dumps(scheduler, default=str)),
        },
        "steps": steps,
        "size": [height, width],
        "guidance_scale": guidance,
        "dtype": str(family.denoiser.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "pipeline_options": options,
        "capture": capture.spec(),
        "conditions": {name: [c.spec() for c in changes] for name, changes in conditions.items()},
        "prediction_type": str(scheduler.get("prediction_type", "epsilon")),
        "versions": {p: version(p) for p in ("interp-diffusion", "torch", "diffusers", "transformers")},
    }


def _config_hash(pipe: Any) -> str:
    parts = {}
    for name, part in pipe.components.items():
        config = getattr(part, "config", None)
        if config is not None and name != "scheduler":
            values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            parts[name] = {k: v for k, v in values.items() if not k.startswith("_") and "version" not in k}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def _weights_hash(module: torch.nn.Module) -> str:
    """A digest of a few values of every parameter: a resumed run must not go on with other weights."""
    digest = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        if p.device.type == "meta":  # offloaded
            continue
        digest.update(name.encode())
        digest.update(p.detach().flatten()[:: max(1, p.numel() // 4)][:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
