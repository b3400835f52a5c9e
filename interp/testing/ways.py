"""Ways in which a model may be run: sliced, fused, offloaded, by another kernel, compiled, adapted, cached.

Each is put on a copy of the denoiser, as a user would. Then a recorded call gives what an unwatched one gives, and the
attention of the model that runs plainly; or it is refused in one sentence; or the model does not offer it, which is found
by trying.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
from accelerate import cpu_offload
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_faster_cache, apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from interp.errors import InterpError
from interp.recording import record
from interp.stores import Run
from interp.testing.case import BARE, FamilyCase, alike
from interp.testing.leftovers import untouched
from interp.testing.pictures import filled

SAME, NOT_OFFERED, REFUSED = "the same numbers", "not offered", "refused"
Put = Callable[[FamilyCase, Any], None]
_CACHED_STEPS = 5
_CALLS: list[int] = []  # denoiser calls since the pipeline was called last


class NotOfferedError(Exception):
    """The model cannot be run in this way, watched or not."""


def check_way(case: FamilyCase, put_on: Put) -> str:
    """Record the model as `put_on` changes it; return the outcome, and behind a colon what was said of it."""
    with _worn(case, put_on) as why:
        if why:
            return f"{NOT_OFFERED}: {why}"
        want = _plainly(case)
        if isinstance(want, str):
            return f"{NOT_OFFERED}: {want}"
        run = _recorded(case, want)
    plain = case.plain(case.modes[0])
    if (want - plain).abs().max() > 100 * case.tolerance * plain.abs().max():
        return f"{NOT_OFFERED}: diffusers then computes something else, watched or not"
    alike(run, case.recorded(case.modes[0]).run, case.tolerance)
    return SAME


def check_compiled(case: FamilyCase, put_on: Put) -> str:
    """A compiled model runs eagerly while it is recorded, which is said: what it gives is what the plain model gives."""
    with _worn(case, put_on) as why:
        if why:
            return f"{NOT_OFFERED}: {why}"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = _recorded(case, case.plain(case.modes[0]))
        assert any("the model is compiled" in str(w.message) for w in told), "nothing says that the model runs eagerly"
    alike(run, case.recorded(case.modes[0]).run, 0)
    return SAME


def check_cache(case: FamilyCase, put_on: Put) -> str:
    """Attention that did not run is not recorded as if it had; latents and predictions are those of the cached model."""
    steps: dict[str, Any] = {"num_inference_steps": _CACHED_STEPS}
    with _worn(case, put_on) as why:
        if why:
            return f"{NOT_OFFERED}: {why}"
        want = _plainly(case, **steps)
        if isinstance(want, str):
            return f"{NOT_OFFERED}: {want}"
        _recorded(case, want, bare=True, **steps)
        try:
            _recorded(case, want, **steps)
        except InterpError as error:
            assert not re.search(r"\. [A-Z]|\n", str(error)), f"more than one sentence: {error}"
            assert "must be turned off" in str(error), f"what to do is not said: {error}"
            return f"{REFUSED}: {error}"
    return SAME


def check_adapter(case: FamilyCase) -> str:
    """A LoRA that is loaded while the pipeline is watched, and one that was there before, are both seen."""

    def adapt(denoiser: Any) -> None:
        if not hasattr(denoiser, "add_adapter") or find_spec("peft") is None:
            raise NotOfferedError(f"{type(denoiser).__name__} takes no adapter")
        from peft import LoraConfig

        site = case.family.attention_sites()
        inside = site[0].module if site else denoiser
        first = next(n for n, m in inside.named_modules() if isinstance(m, torch.nn.Linear)).rpartition(".")[2]
        torch.manual_seed(1)
        denoiser.add_adapter(LoraConfig(r=2, target_modules=[first], init_lora_weights=False))

    capture = case.everything.changed(text=False)
    with case.copied() as denoiser:
        with record(case.pipe, capture=capture) as recording:
            plain = case.call(guided=case.modes[0])
            try:
                adapt(denoiser)
            except NotOfferedError as why:
                return f"{NOT_OFFERED}: {why}"
            while_watched = case.call(guided=case.modes[0])
        assert torch.equal(plain, case.plain(case.modes[0]))
        want = _plainly(case)
        assert isinstance(want, torch.Tensor) and torch.equal(while_watched, want) and not torch.equal(want, plain)
        later = _recorded(case, want)
        both = recording.run
        last = both.tree.isel(sample=slice(len(case.prompts), None))
        assert torch.equal(torch.from_numpy(last["trajectory/noise_pred"].values).nan_to_num(), _noise(later))
        for group in {"attention", "self_attention", "text_attention"} & {*last.children}:
            for grid, node in last[group].children.items():
                seen, own = (x["probs"].values for x in (node, later.tree[f"{group}/{grid}"]))
                assert (torch.from_numpy(seen) - torch.from_numpy(own)).nan_to_num().abs().max() <= case.tolerance
    return SAME


def _noise(run: Run) -> torch.Tensor:
    return torch.from_numpy(run.noise_pred.values).nan_to_num()


# How a model is made to run so


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


WAYS: dict[str, Callable[[FamilyCase], str]] = {
    "attention slicing": partial(check_way, put_on=slice_attention),
    "explicit processors": partial(check_way, put_on=form_scores),
    "fused projections": partial(check_way, put_on=fuse_projections),
    "CPU offload": partial(check_way, put_on=offload),
    "group offload, leaves": partial(check_way, put_on=partial(offload_groups, "leaf_level")),
    "group offload, blocks": partial(check_way, put_on=partial(offload_groups, "block_level")),
    "backend _native_math": partial(check_way, put_on=partial(use_backend, "_native_math")),
    "backend flex": partial(check_way, put_on=partial(use_backend, "flex")),
    "compiled model": partial(check_compiled, put_on=compile_whole),
    "compiled blocks": partial(check_compiled, put_on=compile_blocks),
    "pyramid attention broadcast": partial(check_cache, put_on=broadcast_attention),
    "FasterCache": partial(check_cache, put_on=partial(faster_cache, False)),
    "FasterCache without a branch": partial(check_cache, put_on=partial(faster_cache, True)),
    "first block cache": partial(check_cache, put_on=first_block_cache),
    "LoRA": check_adapter,
}
"""What every family is run by: name → check."""


@contextmanager
def _worn(case: FamilyCase, put_on: Put) -> Iterator[str]:
    """Lend the pipeline a denoiser that runs so; yield why it cannot, or nothing."""
    backend = _AttentionBackendRegistry._active_backend  # `set_attention_backend` sets the process's default, too
    with case.copied() as denoiser:
        try:
            try:
                put_on(case, denoiser)
            except NotOfferedError as why:
                yield str(why)
            else:
                yield ""
        finally:
            _AttentionBackendRegistry.set_active_backend(backend)


def _plainly(case: FamilyCase, **more: Any) -> torch.Tensor | str:
    """What an unwatched call gives, or why it fails."""
    _forget(case)
    try:
        return case.call(guided=case.modes[0], **more)
    except Exception as error:  # whatever diffusers raises
        return f"it fails, watched or not ({type(error).__name__}: {error})"


def _recorded(case: FamilyCase, want: torch.Tensor, *, bare: bool = False, **more: Any) -> Run:
    _forget(case)
    capture = BARE if bare else case.everything.changed(text=False)
    with untouched(case.pipe), record(case.pipe, capture=capture) as recording:
        got = case.call(guided=case.modes[0], **more)
    assert torch.equal(got, want), "the recorded image differs from an unwatched one"
    if not bare:
        filled(case, recording.run, case.modes[0])
    return recording.run


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


def _forget(case: FamilyCase) -> None:
    """Empty what the call before left in caches; pipelines do so for some models alone, and none that is broken off."""
    _CALLS.clear()
    for registry in _caches(getattr(case.pipe, case.family.root)):
        registry.reset_stateful_hooks(recurse=False)
