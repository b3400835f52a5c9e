"""Kernels, caches, fusions, adapters, offloading: recorded correctly, or refused in one sentence; never a silent gap."""

import re

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

import interp
from tests.families import pipelines
from tests.families.pipelines import tiny
from tests.interp.leftovers import untouched

SHORT = {"max_sequence_length": 24}
CAPTURE = interp.Capture(attention="all", heads="all", tokens="all", dtype="float32", image=False)
FLUX = "transformer.transformer_blocks.0.attn"


def traced(pipe, capture=CAPTURE, steps=3, **options):
    return interp.trace(
        pipe,
        "a red circle",
        steps=steps,
        height=32,
        width=48,
        options={**SHORT, **options},
        capture=capture,
        progress=False,
    )


def alike(run, other, tolerance=1e-5):
    for part in ("attention", "self_attention", "text_attention"):
        for name, node in run.tree[part].children.items() if part in run.tree.children else ():
            assert np.allclose(node["probs"].values, other.tree[part][name]["probs"].values, atol=tolerance), part
    assert np.allclose(run.final_latents.values, other.final_latents.values, atol=1e-4)
    return True


@pytest.fixture(autouse=True)
def own_backend():
    """`set_attention_backend` also sets the process's default."""
    kept = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(kept)


@pytest.fixture(scope="module")
def flux_run():
    return traced(tiny("flux"))


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_other_kernels_of_the_dispatcher(backend, flux_run):
    """flex never reaches scaled_dot_product_attention; its call is seen at the dispatcher."""
    pipe = pipelines.flux()
    pipe.transformer.set_attention_backend(backend)
    kernels = dict(_AttentionBackendRegistry._backends)
    with untouched(pipe):
        assert alike(traced(pipe), flux_run)
    assert kernels == _AttentionBackendRegistry._backends


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_an_edit_means_the_same_in_every_kernel(backend):
    pipe = pipelines.flux()
    pipe.transformer.set_attention_backend(backend)

    def to_the_first(p, at):
        return torch.nn.functional.one_hot(torch.zeros(p.shape[:-1], dtype=torch.long), p.shape[-1]).to(p)

    values, outputs = [], []
    module = pipe.transformer.transformer_blocks[0].attn
    handles = [
        module.add_v_proj.register_forward_hook(lambda m, a, out: values.append(out)),
        module.to_out[0].register_forward_pre_hook(lambda m, a: outputs.append(a[0])),
    ]
    try:
        with interp.HookRegistry(pipe) as hooks:
            hooks.write(f"{FLUX}:probs", to_the_first)
            pipe("a red circle", height=32, width=48, num_inference_steps=1, output_type="latent", **SHORT)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(outputs[0], values[0][:, :1].expand_as(outputs[0]), atol=1e-6)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_fused_projections(name):
    pipe = getattr(pipelines, name)()
    plain = traced(pipe)
    pipe.transformer.fuse_qkv_projections()
    with untouched(pipe):
        assert alike(traced(pipe), plain)


def test_attention_slicing():
    pipe, options = pipelines.pixart_alpha(), {"use_resolution_binning": False}
    plain = traced(pipe, **options)
    pipe.enable_attention_slicing("max")
    with untouched_pixart(pipe):
        assert alike(traced(pipe, **options), plain)


class untouched_pixart:  # noqa: N801
    """Processors and hooks of the transformer, for a pipeline that cannot run at its own tiny size."""

    def __init__(self, pipe):
        self.facts = lambda: [
            (type(m), getattr(m, "processor", None), len(m._forward_hooks)) for m in pipe.transformer.modules()
        ]

    def __enter__(self):
        self.before = self.facts()

    def __exit__(self, *_):
        assert self.before == self.facts()


def test_lora_before_and_while_recording(flux_run):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["to_q", "add_k_proj"], init_lora_weights=False)
    before = pipelines.flux()
    torch.manual_seed(1)
    before.transformer.add_adapter(config)
    adapted = traced(before)
    assert np.abs(adapted.attention("8x12").values - flux_run.attention("8x12").values).max() > 1e-3
    later = pipelines.flux()
    arguments = {"num_inference_steps": 3, "height": 32, "width": 48, "output_type": "latent", **SHORT}
    with interp.record(later, capture=CAPTURE) as recording:
        later("a red circle", generator=torch.Generator().manual_seed(0), **arguments)
        torch.manual_seed(1)
        later.transformer.add_adapter(config)
        later("a red circle", generator=torch.Generator().manual_seed(0), **arguments)
    got = recording.run.attention("8x12").values
    assert np.allclose(got[0], flux_run.attention("8x12").values[0], atol=1e-6)
    assert np.allclose(got[1], adapted.attention("8x12").values[0], atol=1e-6)


def test_offloaded_weights(flux_run):
    """Weights that live elsewhere and come for each module's call."""
    pipe = pipelines.flux()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    try:
        assert alike(traced(pipe), flux_run)
    finally:
        remove_hook_from_submodules(pipe.transformer)


CACHES = {
    "pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",),
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: 500 if len(pipe.seen) > 2 else 1000, tensor_format="BCHW",
        is_guidance_distilled=True, spatial_attention_block_identifiers=("^transformer_blocks",),
        attention_weight_callback=lambda _: 0.5,
    ),
    "first block cache": lambda pipe: FirstBlockCacheConfig(threshold=100.0),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_caches_are_refused_where_they_leave_a_gap(cache):
    pipe = pipelines.flux()
    pipe.seen = []
    bare = interp.Capture(attention=None, image=False)
    want = traced(pipe, bare).final_latents.values
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    pipe.transformer.register_forward_pre_hook(lambda *_: pipe.seen.append(1))
    for capture in (
        CAPTURE,
        interp.Capture(attention=None, sites=("*single_transformer_blocks.0.attn:out",), image=False),
    ):
        if cache != "first block cache" and capture is not CAPTURE:
            continue  # the module's output is there: the one that the model used
        pipe.seen.clear()
        with pytest.raises(interp.InterpError, match=r"did not run.*must be turned off") as caught:
            traced(pipe, capture, steps=5)
        assert not re.search(r"\. [A-Z]", str(caught.value))
        pipe.transformer._reset_stateful_cache()
    pipe.transformer.disable_cache()
    assert np.array_equal(traced(pipe, bare).final_latents.values, want)


def test_compiled_transformers_are_watched_eagerly(flux_run):
    pipe = pipelines.flux()
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")
    try:
        with pytest.warns(UserWarning, match="runs eagerly"):
            run = traced(pipe)
    finally:
        torch._dynamo.reset()
    assert alike(run, flux_run)
