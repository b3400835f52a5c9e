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
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from interp.errors import InterpError
from interp.recording import record
from interp.stores import Run
from interp.testing.case import ATTENTION_NODES, BARE, FamilyCase, alike
from interp.testing.leftovers import untouched
from interp.testing.pictures import filled
from interp.testing.putting import (
    NotOfferedError,
    Put,
    broadcast_attention,
    compile_blocks,
    compile_whole,
    faster_cache,
    first_block_cache,
    forget,
    form_scores,
    fuse_projections,
    offload,
    offload_groups,
    slice_attention,
    use_backend,
)

SAME, NOT_OFFERED, REFUSED = "the same numbers", "not offered", "refused"
_CACHED_STEPS = 5


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
        for group in {*ATTENTION_NODES} & {*last.children}:
            for grid, node in last[group].children.items():
                seen, own = (x["probs"].values for x in (node, later.tree[f"{group}/{grid}"]))
                assert (torch.from_numpy(seen) - torch.from_numpy(own)).nan_to_num().abs().max() <= case.tolerance
    return SAME


def _noise(run: Run) -> torch.Tensor:
    return torch.from_numpy(run.noise_pred.values).nan_to_num()


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
    forget(getattr(case.pipe, case.family.root))
    try:
        return case.call(guided=case.modes[0], **more)
    except Exception as error:  # whatever diffusers raises
        return f"it fails, watched or not ({type(error).__name__}: {error})"


def _recorded(case: FamilyCase, want: torch.Tensor, *, bare: bool = False, **more: Any) -> Run:
    forget(getattr(case.pipe, case.family.root))
    capture = BARE if bare else case.everything.changed(text=False)
    with untouched(case.pipe), record(case.pipe, capture=capture) as recording:
        got = case.call(guided=case.modes[0], **more)
    assert torch.equal(got, want), "the recorded image differs from an unwatched one"
    if not bare:
        filled(case, recording.run, case.modes[0])
    return recording.run
