"""Stored probabilities equal an independent eager computation, at every layer, head, token, position and step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from einops import rearrange

import interp
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, Eager, tiny

PROMPTS = ["a red circle", "a dog on the blue square background"]
BOTH = ("cond", "uncond")
TOLERANCE = 1e-5


def full(**changes):
    settings = {"heads": "all", "tokens": "all", "branches": BOTH, "dtype": "float32", **changes}
    return interp.Capture(attention=settings.pop("attention", "all"), **settings)


def recorded(pipe, capture, prompts=PROMPTS, steps=2, size=(16, 16), scale=SCALE):
    """Record one call and compute the reference in the very same call."""
    with interp.record(pipe, capture=capture) as recording, Eager(pipe.unet) as eager:
        pipe(
            prompts, num_inference_steps=steps, guidance_scale=scale, height=size[0], width=size[1],
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))], output_type="latent",
        )  # fmt: skip
    return recording.run, eager.probs


def expected(calls, step, samples, branch, grid):
    """One layer's (sample, head, key, y, x) of a branch; rows are [uncond, cond]."""
    rows = calls[step]
    rows = rows[samples:] if branch == "cond" else rows[:samples]
    return rearrange(rows, "b h (y x) k -> b h k y x", y=grid[0], x=grid[1])


def cross(run):
    return {tuple(map(int, g.split("x"))): run.attention(g) for g in run.grids}


def itself(run):
    children = run.tree["self_attention"].children
    return {tuple(map(int, g.split("x"))): run.tree[f"self_attention/{g}"]["probs"] for g in children}


def check_all(run, reference, steps=2, samples=2):
    """Compare every number; return how many layers were compared."""
    layers = 0
    for grid, probs in cross(run).items():
        assert probs.dims == ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
        for site in probs.layer.values:
            layers += 1
            for step in range(steps):
                for branch in BOTH:
                    want = expected(reference[str(site)], step, samples, branch, grid)
                    got = probs.isel(step=step).sel(branch=branch, layer=site).values
                    assert np.abs(got - want).max() <= TOLERANCE, (site, step, branch)
                    assert np.abs(got.sum(-3) - 1).max() <= TOLERANCE
    return layers


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_cross_attention_equals_eager(name):
    run, reference = recorded(tiny(name), full(attention="cross"))
    assert check_all(run, reference) == sum(".attn2" in site for site in reference)
    # peaky, so that a wrong row, head or token could not pass
    probs = next(iter(cross(run).values())).values
    assert probs.max() > 0.1 and np.abs(probs[:, :, 0] - probs[:, :, 1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_self_attention_equals_eager(name):
    run, reference = recorded(tiny(name), full(attention="self"))
    seen = set()
    for grid, probs in itself(run).items():
        assert probs.dims[-4:] == ("query_y", "query_x", "key_y", "key_x")
        for site in probs.layer.values:
            seen.add(str(site))
            for step in range(2):
                for branch in BOTH:
                    rows = reference[str(site)][step]
                    rows = rows[2:] if branch == "cond" else rows[:2]
                    want = rearrange(rows, "b h (y x) (v u) -> b h y x v u", y=grid[0], v=grid[0])
                    got = probs.isel(step=step).sel(branch=branch, layer=site).values
                    assert np.abs(got - want).max() <= TOLERANCE
    assert seen == {s for s in reference if ".attn1" in s}


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_pictures_that_are_not_square(size):
    """The grid is (query_y, query_x): an asymmetric picture tells them apart."""
    run, reference = recorded(tiny("sd1"), full(attention="cross"), size=size)
    grids = set(cross(run))
    assert grids == {(size[0] // 2, size[1] // 2), (size[0] // 4, size[1] // 4)}
    assert check_all(run, reference) == 4


def test_row_and_column_are_not_exchanged():
    """Attention that depends on the row of the query alone is constant along query_x, and varies along query_y."""
    pipe = tiny("sd1")
    site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"

    def by_row(hidden, at):
        rows = torch.arange(8.0)[None, :, None, None].expand(hidden.shape[0], 8, 12, hidden.shape[-1])
        return rows.flatten(1, 2).to(hidden) * torch.linspace(-1, 1, hidden.shape[-1])

    with interp.HookRegistry(pipe) as hooks:
        hooks.write(f"{site}:in", by_row)
        run = interp.trace(
            pipe, PROMPTS[:1], steps=1, height=16, width=24, progress=False,
            capture=full(attention=site, heads="mean", branches=("cond",), image=False),
        )  # fmt: skip
    probs = run.attention("8x12").isel(sample=0, step=0, branch=0, layer=0, head=0)
    assert probs.sizes["query_y"] == 8 and probs.sizes["query_x"] == 12
    assert float(probs.std("query_x").max()) < 1e-6
    assert float(probs.std("query_y").max()) > 1e-3


def test_head_mean_and_chosen_heads():
    pipe = tiny("sd1")
    heads = recorded(pipe, full(attention="cross"))[0]
    mean = recorded(pipe, full(attention="cross", heads="mean"))[0]
    some = recorded(pipe, full(attention="cross", heads=[2, 0]))[0]
    for grid in heads.grids:
        every = heads.attention(grid)
        assert list(mean.attention(grid)["head"].values) == ["mean"]
        assert np.allclose(mean.attention(grid).values, every.mean("head", keepdims=True).values, atol=1e-6)
        assert list(some.attention(grid)["head"].values) == ["2", "0"]
        assert np.array_equal(some.attention(grid).values, every.isel(head=[2, 0]).values)


@pytest.mark.parametrize("name", ["sd2"])
def test_prompt_tokens_sum_the_padding(name):
    pipe = tiny(name)
    every = recorded(pipe, full(attention="cross"))[0]
    prompt = interp.trace(
        pipe, PROMPTS, steps=2, guidance_scale=SCALE, batch_size=2, progress=False,
        capture=full(attention="cross", tokens="prompt", image=False),
    )  # fmt: skip
    whole = interp.trace(
        pipe, PROMPTS, steps=2, guidance_scale=SCALE, batch_size=2, progress=False,
        capture=full(attention="cross", image=False),
    )  # fmt: skip
    assert every.grids == prompt.grids
    for grid in prompt.grids:
        probs, table, all_tokens = prompt.attention(grid), prompt.tokens(grid), whole.attention(grid)
        for i in range(2):
            roles = [str(r) for r in table["token_role"].values[i]]
            words = roles.count("word")
            assert roles[: words + 2] == ["bos", *["word"] * words, "eos"]
            assert roles[-1] == "pad" and set(roles[words + 2 : -1]) <= {""}
            count = words + 2
            assert np.array_equal(probs[i].values[..., :count, :, :], all_tokens[i].values[..., :count, :, :])
            pad = all_tokens[i].values[..., count:, :, :].sum(-3)
            assert np.allclose(probs[i].values[..., -1, :, :], pad, atol=1e-6)
            assert np.isnan(probs[i].values[..., count:-1, :, :]).all()
            assert int(table["token_count"].values[i, -1]) == 77 - count
            assert np.nansum(probs[i].values, axis=-3) == pytest.approx(1, abs=1e-5)
    # the two prompts differ in length, so that one of them leaves columns unused
    assert "" in [str(r) for r in prompt.tokens(prompt.grids[0])["token_role"].values.flat]


def test_chosen_token_positions():
    pipe = tiny("sd1")
    some = recorded(pipe, full(attention="cross", tokens=[5, 0, 76]))[0]
    every = recorded(pipe, full(attention="cross"))[0]
    for grid in some.grids:
        assert np.array_equal(some.attention(grid).values, every.attention(grid).isel(token=[5, 0, 76]).values)


def test_chosen_steps_and_dtype():
    pipe = tiny("sd1")
    every = recorded(pipe, full(attention="cross"), steps=4)[0]
    for steps, kept in (([3, 1], [1, 3]), (slice(1, None, 2), [1, 3]), (0.5, [0, 3])):
        some = recorded(pipe, full(attention="cross", steps=steps, dtype="float16"), steps=4)[0]
        probs = some.attention("4x4")
        assert some.tree["attention/4x4/probs"].dtype == np.float16 and probs.dtype == np.float32  # stored, and shown
        assert list(probs.step.values) == kept
        want = every.attention("4x4").isel(step=kept)
        assert np.array_equal(probs.values, want.values.astype("float16"))
        assert np.array_equal(probs.timestep.values, every.trajectory.timestep.values[kept])
        assert np.array_equal(some.latents.values, every.latents.values)  # latents are kept of every step


@pytest.mark.parametrize("slices", ["auto", "max"])
def test_attention_slicing_gives_the_same(slices):
    pipe = tiny("sd1")
    pipe.enable_attention_slicing(slices)
    try:
        with untouched(pipe):
            run, reference = recorded(pipe, full(attention="cross"))
        assert check_all(run, reference) == 4
    finally:
        pipe.disable_attention_slicing()
        pipe.unet.set_attn_processor(AttnProcessor2_0())


def test_explicit_processor_gives_the_same():
    pipe = tiny("sd1")
    pipe.unet.set_attn_processor(AttnProcessor())
    try:
        run, reference = recorded(pipe, full(attention="cross"))
        assert check_all(run, reference) == 4
    finally:
        pipe.unet.set_attn_processor(AttnProcessor2_0())


class OwnKernel:
    """A processor that forms attention in a way nobody can observe, as xformers or sage kernels do."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=attn.heads)
                   for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))  # fmt: skip
        p = torch.softmax(q @ k.transpose(-1, -2) * attn.scale, -1)
        return attn.to_out[0](rearrange(p @ v, "b h n d -> b n (h d)"))


def test_a_kernel_that_cannot_be_observed_is_an_error():
    pipe = tiny("sd1")
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    module = pipe.unet.get_submodule(site)
    own = module.processor
    module.set_processor(OwnKernel())
    try:
        with untouched(pipe), pytest.raises(interp.InterpError, match=f"{site}.*OwnKernel calls neither"):
            interp.trace(pipe, PROMPTS[0], steps=1, progress=False)
        # left out of the capture, the rest is recorded
        run = interp.trace(
            pipe, PROMPTS[0], steps=1, progress=False, capture=interp.Capture(attention="*up_blocks*attn2")
        )
        assert run.attention("8x8").sizes["layer"] > 0
    finally:
        module.set_processor(own)


def test_a_layer_that_does_not_run_is_an_error():
    """A cache that skips blocks must not leave a gap."""
    pipe = tiny("sd1")
    module = pipe.unet.mid_block.attentions[0]
    own = module.forward
    calls = []

    def every_other(hidden, *args, **kwargs):
        if type(hidden) is torch.Tensor:  # planning passes tensors without data
            calls.append(1)
        return (hidden,) if len(calls) == 2 else own(hidden, *args, **kwargs)

    module.forward = every_other
    try:
        with pytest.raises(interp.InterpError, match=r"mid_block.*did not run in this step"):
            interp.trace(pipe, PROMPTS[0], steps=2, progress=False)
    finally:
        del module.forward
    assert module.forward.__func__ is own.__func__


def test_lora_through_peft():
    """LoRA moves `to_q` and `to_k`: the probabilities are those of the adapted model."""
    from peft import LoraConfig

    from tests.families.pipelines import sd1

    pipe = sd1()
    before = recorded(pipe, full(attention="cross"))[0]
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    with untouched(pipe):
        run, reference = recorded(pipe, full(attention="cross"))
    assert check_all(run, reference) == 4
    assert np.abs(run.attention("4x4").values - before.attention("4x4").values).max() > 1e-3


def test_fused_projections():
    from tests.families.pipelines import sd1

    pipe = sd1()
    before = recorded(pipe, full(attention="all"))[0]
    pipe.fuse_qkv_projections(vae=False)
    with untouched(pipe):
        run = recorded_without_reference(pipe, full(attention="all"))
    for grid in before.grids:
        assert np.allclose(run.attention(grid).values, before.attention(grid).values, atol=TOLERANCE)
    for grid, probs in itself(before).items():
        assert np.allclose(itself(run)[grid].values, probs.values, atol=TOLERANCE)


def recorded_without_reference(pipe, capture):
    with interp.record(pipe, capture=capture) as recording:
        pipe(
            PROMPTS, num_inference_steps=2, guidance_scale=SCALE, output_type="latent",
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        )  # fmt: skip
    return recording.run


def test_two_kinds_of_mask_and_scale_reach_the_reference():
    """The observer's arithmetic on one module alone: boolean and additive masks, causal, own scale, grouped heads."""
    from interp.kernels import AttentionCall

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8) for n in (6, 5, 5))
    eye = torch.eye(5).expand(2, 4, 5, 5)
    allowed = torch.rand(2, 1, 6, 5) > 0.3
    allowed[..., 0] = True
    cases = [
        (AttentionCall("s", q, k, v, mask=allowed, scale=0.3), {"attn_mask": allowed, "scale": 0.3}),
        (
            AttentionCall("s", q, k, v, mask=torch.where(allowed, 0.0, -2.0), scale=0.3),
            {"attn_mask": torch.where(allowed, 0.0, -2.0), "scale": 0.3},
        ),
        (AttentionCall("s", q, k, v, scale=8**-0.5, causal=True), {"is_causal": True}),
    ]
    for call, options in cases:
        want = F.scaled_dot_product_attention(q, k, eye, **options)  # values = identity: the output is p itself
        assert torch.allclose(call.probabilities(), want, atol=1e-6)
        assert torch.equal(call.probabilities(slice(1, 2)), call.probabilities()[1:2])
    grouped = AttentionCall("s", q, k[:, :2], v[:, :2], scale=8**-0.5)
    want = F.scaled_dot_product_attention(q, k[:, :2], eye[:, :2], enable_gqa=True)
    assert torch.allclose(grouped.probabilities(), want, atol=1e-6)


def test_every_site_has_its_own_attention():
    """Two layers of one grid are not exchanged, whatever order they run in."""
    run, reference = recorded(tiny("sd1"), full(attention="cross"))
    a, b = (str(s) for s in run.attention("8x8").layer.values[:2])
    assert np.abs(reference[a][0] - reference[b][0]).max() > 1e-2
    modules = [f"unet.{n}" for n, m in tiny("sd1").unet.named_modules() if isinstance(m, Attention) and "attn2" in n]
    assert sorted(s for g in run.grids for s in map(str, run.attention(g).layer.values)) == sorted(modules)
