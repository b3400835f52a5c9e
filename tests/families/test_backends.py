"""Kernels, caches, fusions, adapters, offloading: recorded correctly, or refused in one sentence; never a silent gap."""

from shutil import which

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch._dynamo.utils import counters

import interp
from tests.families import pipelines
from tests.families.pipelines import tiny

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
    for part in ("attention", "self_attention", "text_attention", "within_text_attention"):
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


def test_a_block_that_a_cache_leaves_out_has_no_output():
    """First block cache: later blocks do not run, so what they would have given cannot be kept."""
    pipe = pipelines.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    capture = interp.Capture(attention=None, sites=("*single_transformer_blocks.0.attn:out",), image=False)
    with pytest.raises(interp.InterpError, match=r"did not run.*must be turned off"):
        traced(pipe, capture, steps=3)


@pytest.mark.skipif(which("g++") is None, reason="torch's compiler needs one of C++")
def test_what_is_compiled_is_watched_eagerly(flux_run):
    """By torch's own compiler: recorded, the plain model's numbers; before and after, the compiled one's."""
    pipe = pipelines.flux()
    torch._dynamo.reset()
    counters.clear()
    # a small part, and plain code for it: compiling takes seconds
    scalar = {"cpp.simdlen": 1, "cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    pipe.transformer.single_transformer_blocks[0].norm.compile(options=scalar)

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_inference_steps=2, height=32, width=48, generator=generator, output_type="latent",
                    **SHORT).images  # fmt: skip

    try:
        before = latents()
        assert counters["stats"]["unique_graphs"] == 1
        with pytest.warns(UserWarning, match="runs eagerly"):
            run = traced(pipe)
        assert torch.equal(latents(), before)
    finally:
        torch._dynamo.reset()
    assert alike(run, flux_run, 0)


def test_a_run_of_weights_in_files_is_resumed(tmp_path):
    """Between calls such weights hold anything: what is read of them must not make it another model."""
    pipe = pipelines.flux()
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level", offload_to_disk_path=str(tmp_path / "weights"))
    settings = {
        "steps": 2,
        "height": 32,
        "width": 48,
        "options": SHORT,
        "progress": False,
        "store": tmp_path / "run.zarr",
    }
    first = interp.trace(pipe, "a red circle", **settings)
    assert pipe.transformer.proj_out.weight.device.type == "cpu"
    again = interp.trace(pipe, "a red circle", **settings)
    assert np.array_equal(first.final_latents.values, again.final_latents.values)
