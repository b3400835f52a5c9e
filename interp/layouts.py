"""The layout of a run: which groups, arrays and attributes a capture of a pipeline needs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from interp.capture import OF_IMAGE, AttentionPart, Capture
from interp.captured import ReduceCapture, SiteCapture, attention_groups, site_node
from interp.clock import Timeline, is_flow
from interp.encoder_states import hidden_groups
from interp.errors import InterpError
from interp.families import Arguments, Family
from interp.interventions import Intervention
from interp.loading import origin
from interp.offloading import in_files
from interp.stores import Group, TokenTable
from interp.stores.groups import attention_group, images_group, site_group, text_group, trajectory_group
from interp.stores.table import ROLES


def run_groups(
    family: Family, capture: Capture, times: Timeline, tokens: TokenTable, every_token: TokenTable,
    attention: list[AttentionPart], sites: list[SiteCapture], reductions: list[ReduceCapture], arguments: Arguments,
    height: int, width: int, texts: tuple[Sequence[str], Sequence[str]],
) -> dict[str, Group]:  # fmt: skip
    """Return the store's groups, by path, of samples with these prompts and negative prompts."""
    n = len(texts[0])
    channel, y, x = family.latent_shape(arguments)
    groups = {
        "trajectory": trajectory_group(
            n, timestep=times.timestep, sigma=times.sigma, alpha_bar=times.alpha_bar, data_scale=times.data_scale,
            noise_scale=times.noise_scale, channel=channel, y=y, x=x, noise_pred=capture.noise_pred, latents=capture.latents,
        )
    }  # fmt: skip
    kept = capture.chosen_steps(len(times))
    timing: dict[str, Any] = {"steps": kept, "timestep": times.timestep[kept]}
    for name, members in attention_groups(attention).items():
        part, first = members[0].part, members[0].site
        heads = capture.chosen_heads(first.heads)
        if capture.heads != "mean" and len({m.site.heads for m in members}) > 1:
            raise InterpError(
                f"the layers at {name} have different numbers of heads; capture heads='mean', or one layer"
            )
        groups[name] = attention_group(
            n, kind=first.kind, grid=first.grid, layers=[m.name for m in members],
            heads=["mean"] if capture.heads == "mean" else [str(h) for h in heads], branches=capture.branches,
            sigma=times.sigma[kept], tokens=tokens, dtype=capture.dtype, part=part, mantissa=capture.mantissa,
            cells=capture.chosen_cells(first.grid) if capture.region and part in OF_IMAGE else None, **timing,
        )  # fmt: skip
    for site in sites:
        groups[site_node(site.site)] = site_group(
            n, dims=site.dims, shape=site.shape, branches=capture.branches, cells=site.cells,
            tokens=every_token if "token" in site.dims else None,
            attrs={"site": site.site} | ({"grid": list(site.grid)} if site.grid else {}), **timing,
        )  # fmt: skip
    for one in reductions:
        groups[site_node(one.name)] = _reduction_group(one, capture, n, tokens, times, kept)
    if capture.text:
        width_of = int(family.text_inputs(family.dry_inputs(arguments).kwargs).embeddings.shape[-1])
        tables = {name: every_token.columns(span) for name, span in family.text_segments(arguments).items()}
        for name, table in tables.items():
            groups[f"text/{name}"] = text_group(
                n, branches=["cond", "uncond"], token=table.width, feature=width_of, tokens=table
            )
        if capture.text == "layers":
            groups |= hidden_groups(family, arguments, *texts, width_of, tables)
    if capture.image:
        groups["images"] = images_group(n, height, width)
    return groups


def _reduction_group(
    one: ReduceCapture, capture: Capture, n: int, tokens: TokenTable, times: Timeline, kept: list[int]
) -> Group:
    """The group of a reduction; what is added up over the steps stands at the last one."""
    over = one.over
    steps = kept[-1:] if "step" in over else kept
    layers = () if "layer" in over else (len(one.layers),)
    attrs: dict[str, Any] = {"reduction": capture.spec()["reduce"][one.name][1]}
    if over:
        attrs |= {"over": list(over), "steps": kept, "layers": [s.name for s in one.layers]}
    group = site_group(
        n, dims=(*("layer",) * len(layers), *one.dims), shape=(*layers, *one.shape), branches=capture.branches,
        steps=steps, timestep=times.timestep[steps], tokens=tokens if "token" in one.dims else None, attrs=attrs,
        cells=capture.chosen_cells(one.largest) if capture.region and "y" in one.dims else None,
    )  # fmt: skip
    if layers:
        group.coords["layer"] = (("layer",), np.asarray([s.name for s in one.layers], object))
    if "role" in one.dims:
        group.coords["role"] = (("role",), np.asarray(ROLES, object))
    return group


def run_attrs(
    pipe: Any, family: Family, capture: Capture, conditions: Mapping[str, Sequence[Intervention]], steps: int,
    guidance: float, height: int, width: int, options: dict[str, Any], arguments: Arguments,
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
        "prediction_type": str(
            scheduler.get("prediction_type", "flow_prediction" if is_flow(pipe.scheduler) else "epsilon")
        ),
        **({"rescaled_guidance": True} if _rescaled(family, arguments) else {}),
        "versions": dict(_versions()),
    }


@cache
def _versions() -> dict[str, str]:
    """Versions of what made the run; reading them from the installed packages takes longer than the rest of a plan."""
    return {p: version(p) for p in ("interp-diffusion", "torch", "diffusers", "transformers")}


def _rescaled(family: Family, arguments: Arguments) -> bool:
    """Tell whether the pipeline makes more of both predictions than u + w·(c − u), which readers of the run must know."""
    shape, scale = (2, 1, *family.latent_shape(arguments)), 7.0
    uncond, cond = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = uncond + scale * (cond - uncond)
    return not torch.allclose(family.combine(uncond, cond, scale, arguments), plain, rtol=1e-3, atol=1e-3)


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
    unknown = in_files(module)
    here = {n: p for n, p in sorted(module.named_parameters()) if p.device.type != "meta" and id(p) not in unknown}
    alike: dict[Any, dict[str, torch.Tensor]] = {}  # by device and dtype: waited for once, not for every parameter
    for name, p in here.items():
        apart = max(1, p.numel() // 4)
        alike.setdefault((p.device, p.dtype), {})[name] = p.flatten()[: 4 * apart : apart]
    values: dict[str, bytes] = {}
    for few in alike.values():
        data, end = torch.cat(list(few.values())).float().cpu().numpy().tobytes(), 0
        for name, some in few.items():
            end, start = end + 4 * len(some), end
            values[name] = data[start:end]
    digest = hashlib.sha256()
    for name in here:
        digest.update(name.encode())
        digest.update(values[name])
    return digest.hexdigest()[:16]
