"""How a model is made to run in another way, as a user would: each function changes a denoiser, or says why it cannot."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
from accelerate import cpu_offload
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_faster_cache, apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from interp.testing.case import FamilyCase

Put = Callable[[FamilyCase, Any], None]
_CALLS: list[int] = []  # denoiser calls since the pipeline was called last


class NotOfferedError(Exception):
    """The model cannot be run in this way, watched or not."""


def slice_attention(case: FamilyCase, denoiser: Any) -> None:
    """By the model's own method, or that of its attention modules."""
    before = _processors(denoiser)
    if hasattr(denoiser, "set_attention_slice"):
        denoiser.set_attention_slice("max")
    else:
        for module in denoiser.modules():
            if hasattr(module, "set_attention_slice"):
                try:
                    module.set_attention_slice(1)
                except AttributeError as error:  # diffusers 0.42 calls a method that it does not have
                    raise NotOfferedError(str(error)) from error
    if [type(p) for p in _processors(denoiser)] == [type(p) for p in before]:
        raise NotOfferedError(f"{type(denoiser).__name__} has no attention that can be sliced")


def fuse_projections(case: FamilyCase, denoiser: Any) -> None:
    """Queries, keys and values by one matrix."""
    if not hasattr(denoiser, "fuse_qkv_projections"):
        raise NotOfferedError(f"{type(denoiser).__name__} has no fuse_qkv_projections")
    before = len(list(denoiser.parameters()))
    try:
        denoiser.fuse_qkv_projections()
    except ValueError as error:
        raise NotOfferedError(str(error)) from error
    if len(list(denoiser.parameters())) == before:
        raise NotOfferedError(f"{type(denoiser).__name__} fuses nothing")


def offload(case: FamilyCase, denoiser: Any) -> None:
    """Weights that live elsewhere, and come for each module's call."""
    cpu_offload(denoiser, execution_device=torch.device("cpu"))


def offload_groups(level: str, case: FamilyCase, denoiser: Any) -> None:
    """Weights that lie in files, one a group of modules, and are read for the group's call alone."""
    files, device = TemporaryDirectory(), torch.device("cpu")
    finalize(denoiser, files.cleanup)
    try:
        denoiser.enable_group_offload(device, device, level, num_blocks_per_group=1, offload_to_disk_path=files.name)
    except (AttributeError, ValueError) as error:
        raise NotOfferedError(str(error)) from error


def form_scores(case: FamilyCase, denoiser: Any) -> None:
    """Processors that form the probabilities themselves, as all did before fused kernels."""
    found = [m for m in denoiser.modules() if type(getattr(m, "processor", None)) is AttnProcessor2_0]
    if not found:
        raise NotOfferedError(f"{type(denoiser).__name__} has no attention with interchangeable processors")
    for module in found:
        module.set_processor(AttnProcessor())


def use_backend(name: str, case: FamilyCase, denoiser: Any) -> None:
    """Another kernel of diffusers' attention dispatcher."""
    if not any(hasattr(p, "_attention_backend") for p in _processors(denoiser)):
        raise NotOfferedError(f"{type(denoiser).__name__} does not use the attention dispatcher")
    denoiser.set_attention_backend(name)


def compile_whole(case: FamilyCase, denoiser: Any) -> None:
    """`torch.compile(model)`; which compiler makes no difference, since its code is not run."""
    setattr(case.pipe, case.family.root, torch.compile(denoiser, backend="eager"))


def compile_blocks(case: FamilyCase, denoiser: Any) -> None:
    """The blocks that repeat."""
    try:
        denoiser.compile_repeated_blocks(backend="eager")
    except (AttributeError, ValueError) as error:
        raise NotOfferedError(str(error)) from error


def broadcast_attention(case: FamilyCase, denoiser: Any) -> None:
    """Pyramid attention broadcast: every other step's attention is that of the step before."""
    blocks = {"block_skip_range": 2, "timestep_skip_range": (-1, 2000)}
    given = {f"{kind}_attention_{name}": value for kind in ("spatial", "cross") for name, value in blocks.items()}
    config = PyramidAttentionBroadcastConfig(**given, current_timestep_callback=lambda: 500)
    _cache(denoiser, config, apply_pyramid_attention_broadcast)


def faster_cache(leave_out: bool, case: FamilyCase, denoiser: Any) -> None:
    """FasterCache: attention is extrapolated, and where both branches are one batch, that without text may be left out."""
    if leave_out and (case.guided is None or case.family.sequential):
        raise NotOfferedError("its denoiser is not given both branches at once")
    denoiser.register_forward_pre_hook(lambda *_: _CALLS.append(1))
    branch: dict[str, Any] = {
        "unconditional_batch_skip_range": 2, "unconditional_batch_timestep_skip_range": (-1, 900),
    }  # fmt: skip
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900), tensor_format="BCHW",
        current_timestep_callback=lambda: 500 if len(_CALLS) > 2 else 1000,
        attention_weight_callback=lambda _: 0.5, is_guidance_distilled=not leave_out, **(branch if leave_out else {}),
    )  # fmt: skip
    _cache(denoiser, config, apply_faster_cache)


def first_block_cache(case: FamilyCase, denoiser: Any) -> None:
    """First block cache: where the first block changes little, the others are left out."""
    _cache(denoiser, FirstBlockCacheConfig(threshold=100.0), apply_first_block_cache)


def forget(denoiser: Any) -> None:
    """Empty what the call before left in caches; pipelines do so for some models alone, and none that is broken off."""
    _CALLS.clear()
    for registry in _caches(denoiser):
        registry.reset_stateful_hooks(recurse=False)


def _processors(denoiser: Any) -> list[Any]:
    return [p for p in (getattr(m, "processor", None) for m in denoiser.modules()) if p is not None]


def _cache(denoiser: Any, config: Any, apply: Callable[[Any, Any], None]) -> None:
    try:
        if hasattr(denoiser, "enable_cache"):
            denoiser.enable_cache(config)
        else:
            apply(denoiser, config)
    except Exception as error:  # whatever diffusers raises about a model that it does not know
        raise NotOfferedError(f"{type(error).__name__}: {error}") from error
    if not _caches(denoiser):
        raise NotOfferedError(f"nothing of {type(denoiser).__name__} is cached")


def _caches(denoiser: Any) -> list[Any]:
    registries = [getattr(m, "_diffusers_hook", None) for m in denoiser.modules()]
    return [r for r in registries if r is not None and r.hooks]
