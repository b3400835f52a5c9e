"""Recording reads only: pictures and latents are bit-equal to untraced ones, and nothing is left behind."""

from functools import cache

import numpy as np
import pytest
import torch

import interp
from tests.interp.leftovers import fingerprint, untouched
from tests.interp.reference import in_dtype, tiny

EVERYTHING = interp.Capture(
    attention="all",
    heads="all",
    tokens="all",
    branches=("cond", "uncond"),
    sites=("unet.mid_block:out", "unet.conv_*:out", "unet.mid_block.att*:out", "unet:out"),
    text=True,
    dtype="float32",
)
PROMPTS = ["a red circle", "a dog on the blue square background"]
DTYPES = [torch.float32, torch.bfloat16]


def plain(pipe, prompts=PROMPTS, seeds=(3, 4), steps=3):
    """An untraced call: pictures as uint8, and the latents after the last step."""
    latents = []
    images = pipe(
        prompts, num_inference_steps=steps, guidance_scale=5.0, output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        callback_on_step_end=lambda pipe, step, timestep, kept: latents.append(kept["latents"]) or {},
    ).images  # fmt: skip
    return (images * 255).round().astype("uint8"), latents[-1].float().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_record_is_bit_equal(name, dtype):
    with in_dtype(tiny(name), dtype) as pipe, untouched(pipe):
        images, latents = plain(pipe)
        generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
        with interp.record(pipe, capture=EVERYTHING) as recording:
            out = pipe(PROMPTS, num_inference_steps=3, guidance_scale=5.0, generator=generators, output_type="np")
        run = recording.run
        assert np.array_equal((out.images * 255).round().astype("uint8"), images)
        assert np.array_equal(run.images.values, images)
        assert np.array_equal(run.final_latents.values, latents)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_trace_is_bit_equal(name, dtype):
    with in_dtype(tiny(name), dtype) as pipe, untouched(pipe):
        references = [plain(pipe, [p, p], steps=2) for p in PROMPTS]
        run = interp.trace(
            pipe,
            PROMPTS,
            seeds=[3, 4],
            steps=2,
            guidance_scale=5.0,
            capture=EVERYTHING,
            batch_size=2,
            progress=False,
        )
        assert np.array_equal(run.images.values, np.concatenate([i for i, _ in references]))
        assert np.array_equal(run.final_latents.values, np.concatenate([x for _, x in references]))
        # and all that was asked for is there
        assert np.isfinite(run.noise_pred.values).all()
        assert {"text", "sites", "attention", "self_attention"} <= set(run.tree.children)
        for node in run.tree.subtree:
            for array in node.data_vars.values():
                assert array.dtype.kind != "f" or np.isfinite(array.values).all(), (node.path, array.name)


def test_text_is_what_the_denoiser_received():
    pipe = tiny("sd1")
    run = interp.trace(
        pipe, PROMPTS, steps=2, guidance_scale=5.0, capture=EVERYTHING, batch_size=2, progress=False,
        negative_prompt="a cat",
    )  # fmt: skip
    cond, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    uncond, _ = pipe.encode_prompt(["a cat"] * 2, "cpu", 1, False)
    stored = run.tree["text/text_encoder"]["embeddings"]
    assert np.array_equal(stored.sel(branch="cond").values, cond.detach().numpy())
    assert np.array_equal(stored.sel(branch="uncond").values, uncond.detach().numpy())


def test_module_outputs_equal_a_plain_hook():
    pipe, seen = tiny("sd1"), []

    handle = pipe.unet.mid_block.register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    try:
        run = interp.trace(
            pipe, "a red circle", steps=3, guidance_scale=5.0, progress=False,
            capture=interp.Capture(sites=("unet.mid_block:out",), branches=("cond", "uncond"), steps=[0, 2]),
        )  # fmt: skip
    finally:
        handle.remove()
    assert len(seen) == 3  # planning does not call other people's hooks
    value = run.tree["sites/unet.mid_block"]["value"]
    assert list(value.step.values) == [0, 2]
    for i, step in enumerate([0, 2]):
        uncond, cond = seen[step].numpy()
        assert np.array_equal(value.isel(sample=0, step=i).sel(branch="cond"), cond.astype(value.dtype))
        assert np.array_equal(value.isel(sample=0, step=i).sel(branch="uncond"), uncond.astype(value.dtype))


class Stop(Exception):  # noqa: N818
    pass


def latents(pipe):
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="latent").images.numpy()


@cache
def undisturbed():
    """What a pipeline gives that nobody has watched."""
    return latents(tiny.__wrapped__("sd1"))


@pytest.mark.parametrize(
    ("where", "error"),
    [(w, Stop) for w in ("writer", "step", "call", "prediction", "attention", "callback")]
    + [("reader", KeyboardInterrupt)],
)
def test_nothing_is_left_after_an_exception(where, error):
    pipe = tiny("sd1")

    def burst(*args, **kwargs):
        raise error

    more = {"callback_on_step_end": burst} if where == "callback" else {}
    with untouched(pipe), pytest.raises(error), interp.HookRegistry(pipe) as hooks:
        site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
        if where == "reader":
            hooks.read(f"{site}:probs", burst)
        elif where == "writer":
            hooks.write("unet.mid_block:out", burst)
        elif where == "attention":
            hooks.on_attention(next(s for s in hooks.family.attention_sites() if s.name == site), burst)
        elif where != "callback":
            getattr(hooks, f"on_{where}")(burst)
        with interp.record(pipe, capture=EVERYTHING):
            pipe("a red circle", num_inference_steps=2, guidance_scale=5.0, **more)
    # and the pipeline works as before
    assert np.array_equal(latents(pipe), undisturbed())


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_trace_leaves_nothing_after_an_exception_in_a_kernel(error):
    pipe, calls = tiny("sd1"), []

    def burst(*_):
        calls.append(1)
        if len(calls) == 4:
            raise error

    handle = pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_out[0].register_forward_hook(burst)
    try:
        with untouched(pipe), pytest.raises(error):
            interp.trace(pipe, PROMPTS, steps=3, capture=EVERYTHING, batch_size=1, progress=False)
    finally:
        handle.remove()
    assert len(calls) == 4


def test_fingerprint_can_fail():
    """The check above sees a hook, a class, a patched function: else it would prove nothing."""
    pipe = tiny("sd1")
    before = fingerprint(pipe)
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: None)
    assert fingerprint(pipe) != before
    handle.remove()
    assert fingerprint(pipe) == before
    with interp.HookRegistry(pipe):
        assert fingerprint(pipe) != before
    assert fingerprint(pipe) == before
