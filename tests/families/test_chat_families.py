"""FLUX.2, Qwen-Image, Z-Image: a template around the prompt, prompts of different lengths, guidance of their own."""

import numpy as np
import pytest
import torch
from PIL import Image

import interp
from interp.families import find_family
from interp.testing.leftovers import untouched
from tests.families.pipelines import BUILDERS, tiny

A, B, C = "a red circle", "a dog on the blue square background", "a circle red"
LAYERS = {"max_sequence_length": 40, "text_encoder_out_layers": [1, 2, 3]}
OPTIONS = {"flux2": LAYERS, "flux2_klein": LAYERS, "qwenimage": {}, "zimage": {}}
BARE = interp.Capture(attention=None, image=False)


def call(pipe, prompts=(A, B), steps=2, **more):
    return pipe(
        prompt=list(prompts), num_inference_steps=steps, height=32, width=48, output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))], **more,
    ).images  # fmt: skip


def traced(name, interventions=(), prompts=(A,), steps=2, capture=BARE, pipe=None, **more):
    return interp.trace(
        pipe or tiny(name), list(prompts), steps=steps, height=32, width=48, guidance_scale=3.0, capture=capture,
        interventions=list(interventions), progress=False, **{"options": OPTIONS.get(name, {}), "batch_size": 1, **more},
    )  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_that_the_encoder_reads(name, side):
    """Ids, of every position that the denoiser sees; also where a tokenizer pads on the left."""
    if (name, side) in (("qwenimage", "left"), ("zimage", "left")):
        side = "right"  # their states are cut by mask: padding is never seen
    pipe, seen = BUILDERS[name](), []
    pipe.tokenizer.padding_side = side
    family = find_family(pipe)
    handle = pipe.text_encoder.register_forward_pre_hook(
        lambda m, a, kw: seen.append((kw["input_ids"], kw["attention_mask"])), with_kwargs=True
    )
    call(pipe, steps=1, **OPTIONS[name])
    handle.remove()
    ids, mask = seen[0]
    arguments = family.arguments(OPTIONS[name])
    for row, prompt in enumerate((A, B)):
        tokens = family.tokenize(prompt, arguments)
        read = ids[row].tolist()
        if name in ("qwenimage", "zimage"):
            read = ids[row][mask[row] > 0].tolist()
            dropped = pipe.prompt_template_encode_start_idx if name == "qwenimage" else 0
            assert tokens.ids[: len(read) - dropped] == read[dropped:]
            assert set(tokens.ids[len(read) - dropped :]) <= {-1}  # what pads to a multiple of 32 is no token
            assert name == "qwenimage" or len(tokens.ids) % 32 == 0
        else:
            assert tokens.ids == read
        assert tokens.role.count("eos") == (0 if name == "flux2" else 1)
        if name != "flux2":
            assert tokens.role[tokens.eos] == "eos" and tokens.role[tokens.eos - 1] == "word"


@pytest.mark.parametrize("name", OPTIONS)
def test_replacing_the_prompt_equals_prompting(name):
    """Bit-equal to the other prompt's own run, though it has another number of tokens."""
    asked = traced(name, prompts=[B])
    with untouched(tiny(name)):
        replaced = traced(name, [interp.ReplacePrompt(B)], prompts=[A])
    assert np.array_equal(replaced.final_latents.values, asked.final_latents.values)
    assert not np.array_equal(replaced.final_latents.values, traced(name, prompts=[A]).final_latents.values)
    same = traced(name, [interp.ReplacePrompt("{prompt}")], prompts=[A, B], batch_size=2)
    plain = traced(name, prompts=[A, B], batch_size=2)
    assert np.array_equal(same.final_latents.values, plain.final_latents.values)


@pytest.mark.parametrize("align", ["first_eos", "position"])
@pytest.mark.parametrize("name", ["flux2_klein", "qwenimage", "zimage"])
def test_eos_is_what_ends_the_turn(name, align):
    """A's words, then the other prompt's states from `<|im_end|>` on, as the denoiser really receives them."""
    pipe, seen = tiny(name), []
    family = find_family(pipe)
    arguments = family.arguments(OPTIONS[name])
    field = "cap_feats" if name == "zimage" else "encoder_hidden_states"
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kw: seen.append(kw[field]), with_kwargs=True)
    traced(name, [interp.ReplaceEOS(B, align=align)], prompts=[A], steps=1)
    handle.remove()
    got = seen[0][0]
    mine, other = (family.encode([p], arguments).embeddings[0] for p in (A, B))
    a, b = (family.tokenize(p, arguments).eos for p in (A, B))
    want = torch.cat([mine[:a], other[b:]])[: len(got)]
    if name == "flux2_klein" and align == "first_eos":  # padded to 40: B's last state fills the rest
        want = torch.cat([want, other[-1:].expand(len(got) - len(want), -1)])
    if align == "position":
        end = max(a, b)
        want = torch.cat([mine[:end], other[end:]])
    assert got.shape == want.shape and torch.equal(got, want)


@pytest.mark.parametrize("name", ["qwenimage", "zimage"])
def test_replacing_tokens_in_a_batch_of_different_lengths(name):
    """Each prompt's own words; noise has the deviation of the states that are there."""
    pipe, seen = tiny(name), []
    family = find_family(pipe)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, kw: seen.append(family.text_inputs(kw).embeddings[:2].clone()), with_kwargs=True
    )
    for value in ("zero", "random"):
        change = interp.ReplaceTokens(roles="word", value=value)
        traced(name, [change], prompts=[A, B], batch_size=2, steps=1)
    handle.remove()
    zero, noise = seen[0], seen[2 if name == "qwenimage" else 1]  # Qwen-Image calls once a branch
    own = family.encode([A, B]).embeddings
    for row, prompt in enumerate((A, B)):
        role = family.tokenize(prompt).role
        words = torch.tensor([i for i, r in enumerate(role) if r == "word"])
        others = torch.tensor([i for i, r in enumerate(role) if r in ("template", "eos")])
        assert (zero[row, words] == 0).all()
        assert torch.equal(zero[row, others], own[row, others]) and torch.equal(noise[row, others], own[row, others])
        there = own[row][~own[row].isnan().any(-1)]
        assert 0.7 < float(noise[row, words].std() / there.std()) < 1.3


def test_what_cannot_be_done_is_refused():
    with pytest.raises(interp.InterpError, match="no end-of-text token"):
        traced("flux2", [interp.ReplaceEOS(B)])
    with pytest.raises(interp.InterpError, match=r"RemoveText.* needs a run with guidance"):
        traced("flux2", [interp.RemoveText(start=0.5)])
    for name in ("flux2", "flux2_klein"):
        with pytest.raises(interp.InterpError, match="takes no negative prompt"):
            traced(name, negative_prompt=C)
        with pytest.raises(interp.InterpError, match="reference pictures"), interp.record(tiny(name), capture=BARE):
            call(tiny(name), image=Image.new("RGB", (32, 32)), **LAYERS)
    with (
        pytest.raises(interp.InterpError, match="masks of prompts that differ in length"),
        interp.record(tiny("qwenimage"), capture=BARE),
    ):
        call(tiny("qwenimage"), num_images_per_prompt=2)
    with pytest.raises(interp.InterpError, match="would be cut"):
        traced("qwenimage", prompts=[A], options={"max_sequence_length": 4})


def test_several_images_of_prompts_of_one_length():
    pipe = tiny("qwenimage")
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    with interp.record(pipe, capture=BARE) as recording:
        pipe([A, C], num_images_per_prompt=2, num_inference_steps=2, height=32, width=48, generator=generators,
             output_type="latent")  # fmt: skip
    apart = traced("qwenimage", prompts=[A, A, C, C], batch_size=4, seeds=0)
    assert list(recording.run.samples["prompt"]) == [A, A, C, C]
    assert recording.run.noise_pred.shape == apart.noise_pred.shape


def test_truncated_guidance_evaluates_one_branch():
    """Z-Image turns guidance off where 1 − t/1000 is above `cfg_truncation`."""
    run = traced("zimage", steps=4, options={"cfg_truncation": 0.5})
    off = 1 - run.latents.timestep.values / 1000 > 0.5
    assert 0 < off.sum() < 4
    uncond = run.noise_pred.isel(sample=0).sel(branch="uncond")
    assert [bool(np.isnan(step).all()) for step in uncond.values] == off.tolist()
    assert run.trajectory.guidance_scale.values[0].tolist() == [1.0 if o else 4.0 for o in off]
    assert run.nfe.values.tolist() == [[4, 4 - int(off.sum())]]


@pytest.mark.parametrize("name", ["flux2", "zimage"])
def test_one_stream_blocks_hold_what_the_family_says(name):
    """Text and image within the joined sequence are what went into it."""
    pipe, joined, given = tiny(name), [], []
    blocks = pipe.transformer.single_transformer_blocks if name == "flux2" else pipe.transformer.layers
    before = (
        (pipe.transformer.transformer_blocks[-1], pipe.transformer.transformer_blocks[-1])
        if name == "flux2"
        else (pipe.transformer.context_refiner[-1], pipe.transformer.noise_refiner[-1])
    )
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda m, a, kw: joined.append(a[0] if a else kw["hidden_states"]), with_kwargs=True
        ),
        *(m.register_forward_hook(lambda m, a, out: given.append(out)) for m in dict.fromkeys(before)),
    ]  # fmt: skip
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_attention(hooks.family.attention_sites()[-1], lambda k, c: spans.append(hooks.spans(k, c)))
        spans = []
        call(pipe, prompts=[A], steps=1, **OPTIONS[name])
    for handle in handles:
        handle.remove()
    text, image = given[0] if name == "flux2" else (given[1], given[0])
    length = min(text.shape[1], spans[0].text_keys.stop - spans[0].text_keys.start)
    assert torch.equal(joined[0][:1, spans[0].text_keys][:, :length], text[:1, :length])
    assert torch.equal(joined[0][:1, spans[0].image_queries], image[:1, : 8 * 12])


@pytest.mark.parametrize("name", ["qwenimage", "zimage", "flux2_klein"])
def test_maps_of_a_word(name):
    """A word's columns are found by name, and add up with the rest of the text and the image to one."""
    everything = interp.Capture(attention="all", heads="all", tokens="all", dtype="float32", image=False)
    run = traced(name, prompts=[B], steps=1, capture=everything)
    one = traced(name, prompts=[B], steps=1, capture=everything.changed(tokens=["dog"], attention="cross"))
    whole, picked = run.attention("8x12"), one.attention("8x12")
    at = list(whole.token_text.values[0]).index("dog")
    assert [t for t in picked.token_text.values[0] if t] == ["dog"]
    assert np.allclose(picked.values[..., 0, :, :], whole.values[..., at, :, :], atol=1e-6)
    joint = run.tree["self_attention/8x12"]["probs"].sel(layer=whole.layer)
    total = whole.sum("token") + joint.sum(("key_y", "key_x"))
    assert np.allclose(total.values, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["flux2", "qwenimage", "zimage", "sd1"])
def test_predicted_pictures_come_from_what_the_scheduler_was_given(name):
    """x̂0 of the first step, from the scheduler's own model output, whose norm the pipeline may have changed."""
    from interp.autoencoding import to_pictures

    pipe, seen = tiny(name), []
    options = {"sd1": {"guidance_rescale": 0.7}, "zimage": {"cfg_normalization": 1.0}}.get(name, OPTIONS.get(name, {}))
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_step(lambda end: seen.append((end.latents, end.model_output)))
        run = traced(name, capture=interp.Capture(attention=None), options=options)
    assert run.attrs.get("rescaled_guidance", False) == (name != "flux2")
    if name != "flux2":  # which has one branch
        with pytest.raises(interp.InterpError, match="its pipeline rescales the guided prediction"):
            run.probe("frequency_energy", data="predicted")
    interp.score(run, "x0", pipe=pipe, steps=[0])
    latents, output = seen[0]
    a, b = (float(run.trajectory[n].values[0]) for n in ("data_scale", "noise_scale"))
    want = to_pictures(pipe, (latents - b * output) / a if name == "sd1" else latents - b * output)
    assert np.abs(run.x0.values[:, 0].astype(int) - want).max() <= 1
    own = to_pictures(pipe, torch.from_numpy(run.final_latents.values))
    assert np.abs(own.astype(int) - run.images.values).max() <= 1


@pytest.mark.parametrize("name", [*OPTIONS, "flux"])
def test_real_pictures_enter(name):
    """The denoiser receives the noised picture: what the pipeline would make of these latents."""
    pipe, seen = tiny(name), []
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["x"][0] if "x" in kw else kw["hidden_states"]), with_kwargs=True
    )
    run = interp.encode_image(
        pipe, picture, [600.0, 300.0], prompt=A, options=OPTIONS.get(name, {"max_sequence_length": 24}), capture=BARE
    )
    handle.remove()
    family = find_family(pipe)
    latents = torch.from_numpy(run.latents.values[0])
    for step, got in enumerate(seen):
        want = latents[step] if name == "zimage" else family.pack(latents[step][None])
        torch.testing.assert_close(got.reshape(want.shape), want)
    clean = torch.from_numpy(run.final_latents.values)
    assert clean.isfinite().all() and run.latents.timestep.values.tolist() == [600.0, 300.0]
    noise = (latents - (1 - torch.tensor([0.6, 0.3]).view(2, 1, 1, 1)) * clean) / torch.tensor([0.6, 0.3]).view(
        2, 1, 1, 1
    )
    torch.testing.assert_close(noise[0], noise[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwenimage", "zimage"])
def test_sites_beside_texts_of_different_lengths(name):
    """Of a sequence of image and text the image's positions are kept, whatever the prompts' lengths."""
    block = {"qwenimage": "transformer.transformer_blocks.1", "zimage": "transformer.layers.1"}[name]
    attention = f"{block}.{'attn' if name == 'qwenimage' else 'attention'}"
    pipe, seen = tiny(name), {}
    capture = BARE.changed(sites=(f"{block}:in", f"{block}:out", f"{block}:update", f"{attention}:q", f"{attention}:k"))
    with interp.HookRegistry(pipe) as hooks:
        for site in (f"{attention}:q", f"{block}:out"):
            hooks.read(site, lambda x, at: seen.setdefault((at.site, at.branch), x.clone()))
        run = traced(name, prompts=[A, B], batch_size=2, steps=1, capture=capture)
    query = seen[f"{attention}:q", "cond"]
    want = query[:, :, :96] if name == "zimage" else query[:, :, -96:]
    np.testing.assert_allclose(run.site(f"{attention}:q").sel(branch="cond").values[:, 0], want)
    out = seen[f"{block}:out", "cond"][:, :96]
    np.testing.assert_allclose(run.site(f"{block}:out").sel(branch="cond").values[:, 0], out)
    update = run.site(f"{block}:out") - run.site(f"{block}:in")
    np.testing.assert_allclose(run.site(f"{block}:update").values, update.values, atol=1e-6)
    if name == "zimage":
        with pytest.raises(interp.InterpError, match="as many positions as a prompt has tokens"):
            interp.plan(pipe, A, height=32, width=48, capture=BARE.changed(sites="*context_refiner.0:out"))
