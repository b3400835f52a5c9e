"""FLUX.1: a call per branch, packed latents, two- and one-stream blocks."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import interp
from interp.families import find_family
from tests.families.pipelines import tiny
from tests.interp.leftovers import untouched

A, B = "a red circle", "a dog on the blue square background"
SHORT = {"max_sequence_length": 24}
TRUE = {**SHORT, "true_cfg_scale": 3.0}
BARE = interp.Capture(attention=None, image=False)


def call(pipe, prompts=(A, B), steps=3, size=(32, 48), **more):
    return pipe(
        list(prompts), num_inference_steps=steps, height=size[0], width=size[1], output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))], **{**SHORT, **more},
    ).images  # fmt: skip


def traced(pipe, interventions=(), prompts=(A, B), steps=3, options=TRUE, capture=BARE, **more):
    return interp.trace(
        pipe, list(prompts), steps=steps, height=32, width=48, batch_size=1, options=options, capture=capture,
        interventions=list(interventions), progress=False, **more,
    )  # fmt: skip


@torch.no_grad()
def looped(pipe, prompt, steps, keep, scale=3.0, embedded=3.5):
    """True guidance by hand, in packed latents: `keep(step)` names the branches that are evaluated."""
    states = {"cond": pipe.encode_prompt(prompt, **SHORT), "uncond": pipe.encode_prompt("", **SHORT)}
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    x = pipe._pack_latents(x, 1, 4, 16, 24)
    ids = pipe._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32)
    scheduler = deepcopy(pipe.scheduler)
    mu = 0.5 + (96 - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    for i, t in enumerate(scheduler.timesteps):
        out = {}
        for branch in keep(i):
            embeddings, pooled, text_ids = states[branch]
            out[branch] = pipe.transformer(
                hidden_states=x, timestep=t.expand(1) / 1000, guidance=torch.tensor([embedded]), txt_ids=text_ids,
                pooled_projections=pooled, encoder_hidden_states=embeddings, img_ids=ids,
            ).sample  # fmt: skip
        if len(out) == 2:
            guided = out["uncond"] + scale * (out["cond"] - out["uncond"])
        else:
            (guided,) = out.values()
        x = scheduler.step(guided, t, x).prev_sample
    return pipe._unpack_latents(x, 32, 48, 2)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize(
    ("change", "kept"), [(None, None), (interp.RemoveText, "uncond"), (interp.RemoveGuidance, "cond")], ids=str
)
def test_dropped_branches_equal_a_loop_by_hand(change, kept, start):
    """Bit for bit, also where the first call of the first step is the one that is skipped."""
    pipe, calls = tiny("flux"), []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    try:
        with untouched(pipe):
            calls.clear()
            run = traced(pipe, [change(start=start)] if change else [], prompts=[A], steps=4)
            counted = len(calls)
    finally:
        handle.remove()
    first = 4 if change is None else round(4 * start)
    want = looped(pipe, A, 4, lambda i: ("cond", "uncond") if i < first else (kept,))
    assert torch.equal(torch.from_numpy(run.final_latents.values), want)
    passes = {"cond": 4, "uncond": 4}
    if change:
        passes["cond" if kept == "uncond" else "uncond"] = first
    assert run.nfe.values.tolist() == [[passes["cond"], passes["uncond"]]]
    assert counted == sum(passes.values())
    left = run.noise_pred.isel(sample=0, step=slice(first, None))
    for branch in ("cond", "uncond") if first < 4 else ():
        assert np.isnan(left.sel(branch=branch).values).all() == (branch != kept)
    scales = run.trajectory.guidance_scale.values[0]
    assert scales.tolist() == [3.0] * first + [{"uncond": 0.0, "cond": 1.0}.get(kept, 3.0)] * (4 - first)


def test_the_plan_counts_passes():
    pipe = tiny("flux")
    plan = lambda **more: interp.plan(pipe, [A, B], steps=4, height=32, width=48, capture=BARE, **more)  # noqa: E731
    assert plan(options=SHORT).forward_passes == 2 * 4
    assert plan(options=TRUE).forward_passes == 2 * 8
    assert plan(options=TRUE, interventions=[interp.RemoveText(start=0.5)]).forward_passes == 2 * 6


def test_a_distilled_model_has_no_second_branch():
    pipe, seen = tiny("flux"), []
    with pytest.raises(interp.InterpError, match=r"RemoveText.* needs a run with guidance"):
        traced(pipe, [interp.RemoveText(start=0.5)], options=SHORT)
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_call(lambda c: setattr(c, "keep", ("uncond",)))
        with pytest.raises(interp.InterpError, match=r"every denoiser call of a step was skipped.*is guidance on"):
            call(pipe)
    with interp.HookRegistry(pipe) as hooks:
        hooks.read("transformer.transformer_blocks.0:out", lambda x, at: seen.append((at.step, at.branch, at.timestep)))
        call(pipe, steps=2)
    assert [s[:2] for s in seen] == [(0, "cond"), (1, "cond")]
    assert seen[0][2] == pytest.approx(1000) and seen[0][2] > seen[1][2] > 0


@pytest.mark.parametrize("dropping", ["outer", "inner"])
def test_nested_registries_agree_about_a_skipped_call(dropping):
    pipe, seen = tiny("flux"), []
    a, b = interp.HookRegistry(pipe), interp.HookRegistry(pipe)
    drop, watch = (a, b) if dropping == "outer" else (b, a)
    drop.on_call(lambda c: setattr(c, "keep", ("uncond",)) if c.step == 1 else None)
    watch.on_prediction(lambda p: seen.append((p.call.step, *p.outputs)))
    watch.read("transformer.single_transformer_blocks.0:out", lambda x, at: seen.append((at.step, at.branch)))
    with untouched(pipe), a, b:
        got = call(pipe, prompts=[A], steps=2, true_cfg_scale=3.0, negative_prompt=[""])
    want = looped(pipe, A, 2, lambda i: ("cond", "uncond") if i == 0 else ("uncond",))
    assert torch.equal(find_family(pipe).unpack(got, {"height": 32, "width": 48}), want)
    assert set(seen) == {(0, "cond"), (0, "uncond"), (1, "uncond")}


def test_one_stream_blocks_hold_the_text_first():
    """What the family says of the joined sequence is what the block makes of its two inputs."""
    pipe, joined, given = tiny("flux"), [], []
    block = pipe.transformer.single_transformer_blocks[0]
    handles = [
        block.register_forward_pre_hook(lambda m, a, kw: given.append(kw), with_kwargs=True),
        block.norm.register_forward_pre_hook(lambda m, a: joined.append(a[0])),
    ]
    try:
        call(pipe, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    family = find_family(pipe)
    site = family.attention_sites()[-1]
    assert "single" in site.name
    spans = family.spans(site, joined[0].shape[1], joined[0].shape[1], {"encoder_hidden_states": torch.empty(2, 24, 1)})
    assert torch.equal(joined[0][:, spans.text_keys], given[0]["encoder_hidden_states"])
    assert torch.equal(joined[0][:, spans.image_queries], given[0]["hidden_states"])


def test_a_block_output_is_the_images():
    pipe, seen, blocks = tiny("flux"), [], []
    names = ["transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"]
    for name in names:
        module = pipe.transformer.get_submodule(name.removeprefix("transformer."))
        blocks.append(module.register_forward_hook(lambda m, a, out: blocks.append(out[1].clone())))
    try:
        with interp.HookRegistry(pipe) as hooks:
            for name in names:
                hooks.read(f"{name}:out", lambda x, at: seen.append(x.clone()))
            call(pipe, steps=1)
    finally:
        for handle in blocks[:2]:
            handle.remove()
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, blocks[2:], strict=True))
    assert seen[0].shape[1] == 96
    table = {s.name: s for s in interp.sites(pipe, "transformer*", 32, 48)}
    assert table[f"{names[0]}:out"].shape == (96, 32)
    assert table[f"{names[0]}.attn:probs"].kind == "joint"


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart_alpha"])
def test_replacing_the_prompt_equals_prompting(name):
    """States, pooled vector and mask of the other prompt, in every step: bit-equal to the other prompt's own run."""
    pipe = tiny(name)
    options = (
        {**SHORT, "use_resolution_binning": False} if name == "pixart_alpha" else TRUE if name == "flux" else SHORT
    )
    replaced = traced(pipe, [interp.ReplacePrompt(B)], prompts=[A], options=options)
    asked = traced(pipe, prompts=[B], options=options)
    assert np.array_equal(replaced.final_latents.values, asked.final_latents.values)
    assert not np.array_equal(
        replaced.final_latents.values, traced(pipe, prompts=[A], options=options).final_latents.values
    )


def test_sizes_are_whole_patches():
    with pytest.raises(interp.InterpError, match="multiples of 8"):
        interp.plan(tiny("flux"), A, height=36, width=32)


def test_layers_of_joint_attention_cannot_read_another_prompt():
    with pytest.raises(interp.InterpError, match="no keys or values of the prompt by layer"):
        traced(tiny("flux"), [interp.ReplacePrompt(B, side="v")])
