"""Stable Diffusion 3 and 3.5: several encoders, skip-layer guidance, parts of a joint attention."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import interp
from interp.families import find_family
from tests.families.pipelines import sd3, tiny
from tests.interp.leftovers import untouched
from tests.interp.reference import scheduler_of

A, B = "a red circle", "a dog on the blue square background"
SHORT = {"max_sequence_length": 24}
FULL = {"heads": "all", "tokens": "all", "dtype": "float32", "image": False}


def call(pipe, prompts=(A, B), steps=3, scale=4.0, **more):
    return pipe(
        list(prompts), num_inference_steps=steps, guidance_scale=scale, height=32, width=48, output_type="latent",
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))], **{**SHORT, **more},
    ).images  # fmt: skip


def traced(pipe, capture, prompts=(A, B), steps=1, **more):
    return interp.trace(
        pipe, list(prompts), steps=steps, guidance_scale=4.0, height=32, width=48, batch_size=2, options=SHORT,
        capture=capture, progress=False, **more,
    )  # fmt: skip


SKIPPING = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}


def test_skip_layer_guidance_is_a_pass_of_no_branch():
    """The third call of a step is neither recorded as a branch nor mistaken for one."""
    pipe, seen = tiny("sd35"), []
    want, without = call(pipe, **SKIPPING), call(pipe)
    assert not torch.equal(want, without)
    with untouched(pipe), interp.HookRegistry(pipe) as hooks, interp.record(pipe) as recording:
        hooks.read("transformer.transformer_blocks.1:out", lambda x, at: seen.append((at.step, at.branch, x.shape[0])))
        got = call(pipe, **SKIPPING)
    assert torch.equal(got, want)
    assert seen == [(s, b, 2) for s in range(3) for b in ("uncond", "cond")]
    assert recording.run.nfe.values.tolist() == [[3, 3]] * 2
    with interp.record(pipe) as plain:
        call(pipe)
    assert np.array_equal(*(r.run.noise_pred.isel(step=0).values for r in (recording, plain)))


def test_a_dropped_branch_is_not_brought_back_by_skip_layer_guidance():
    pipe = tiny("sd35")
    for kept in ("cond", "uncond"):
        results = []
        for more in ({}, SKIPPING):
            with interp.HookRegistry(pipe) as hooks:
                hooks.on_call(lambda c, kept=kept: setattr(c, "keep", (kept,)))
                results.append(call(pipe, **more))
        assert torch.equal(*results)


def test_parts_of_a_joint_attention_add_up():
    """The image's queries, and the text's, have one softmax over all keys, before any selection."""
    run = traced(tiny("sd35"), interp.Capture(attention="all", **FULL))
    text, image = run.attention("8x12"), run.tree["self_attention/8x12"]["probs"]
    layers = list(text.layer.values)
    assert layers == [f"transformer.transformer_blocks.{i}.attn" for i in (0, 1)]
    assert "transformer.transformer_blocks.0.attn2" in image.layer.values  # 3.5's own self-attention
    total = text.sum("token") + image.sel(layer=layers).sum(("key_y", "key_x"))
    assert np.allclose(total.values, 1, atol=1e-5)
    alone = image.sel(layer="transformer.transformer_blocks.0.attn2").sum(("key_y", "key_x"))
    assert np.allclose(alone.values, 1, atol=1e-5)
    assert run.tree["attention/8x12"].attrs["kind"] == "joint"
    back = run.tree["text_attention/8x12"]["probs"]
    assert back.dims[-3:] == ("token", "key_y", "key_x")
    own = run.tree["within_text_attention/8x12"]["probs"]
    assert own.dims[-2:] == ("query_token", "token") and list(own.layer.values) == layers
    assert np.allclose(back.sum(("key_y", "key_x")).values + own.sum("token").values, 1, atol=1e-5)
    whole, few = own[1, 0], interp.Capture(attention="within_text", **{**FULL, "tokens": "prompt"})
    few = traced(tiny("sd35"), few).tree["within_text_attention/8x12"]["probs"][1, 0]
    pads, used = own.token_role.values[1] == "pad", few.token_role.values == "word"
    words = own.token_role.values[1] == "word"
    assert np.allclose(few.values[..., used, :][..., -1], whole.values[..., words, :][..., pads].sum(-1), atol=1e-6)
    assert np.allclose(few.values[..., -1, used], whole.values[..., pads, :][..., words].sum(-2), atol=1e-6)


def test_a_glob_keeps_image_to_text_where_there_is_text():
    run = traced(tiny("sd35"), interp.Capture(attention=("*blocks.0.attn", "*blocks.0.attn2"), **FULL))
    assert list(run.attention("8x12").layer.values) == ["transformer.transformer_blocks.0.attn"]
    assert list(run.tree["self_attention/8x12"].layer.values) == ["transformer.transformer_blocks.0.attn2"]
    assert "text_attention" not in run.tree.children
    with pytest.raises(interp.InterpError, match=r"joint attention alone has; this model has cross and self attention"):
        interp.plan(tiny("sd1"), A, capture=interp.Capture(attention="text"))


def test_tokens_of_both_encoders():
    """CLIP's 77 positions, then T5's: a word has columns in both, and padding is summed over both."""
    pipe = tiny("sd3")
    every = traced(pipe, interp.Capture(attention="cross", **FULL))
    prompt = traced(pipe, interp.Capture(attention="cross", **{**FULL, "tokens": "prompt"}))
    table = every.tokens("8x12")
    roles, words = table["token_role"].values[1], table["token_word"].values[1]
    assert len(roles) == 77 + 24 and list(roles).count("eos") == 2 and list(roles).count("bos") == 1
    for word in range(7):
        assert {bool(p >= 77) for p in np.flatnonzero(words == word)} == {True, False}
    kept = prompt.tokens("8x12")["token_role"].values[1]
    used = [r for r in kept if r not in ("", "pad")]
    assert used == [r for r in roles if r != "pad"] and kept[-1] == "pad"
    pads = every.attention("8x12")[1].values[..., roles == "pad", :, :].sum(-3)
    assert np.allclose(prompt.attention("8x12")[1].values[..., -1, :, :], pads, atol=1e-6)
    assert int(prompt.tokens("8x12")["token_count"].values[1, -1]) == (roles == "pad").sum()


def test_states_by_encoder():
    run = traced(tiny("sd3"), interp.Capture(attention=None, text=True, image=False))
    parts = {name: node["embeddings"].sizes["token"] for name, node in run.tree["text"].children.items()}
    assert parts == {"text_encoder": 77, "text_encoder_3": 24}


def test_eos_is_replaced_in_each_encoder():
    """[EOS] of another prompt: CLIP's run of EOS and padding, and T5's, each within its own positions."""
    pipe, seen = tiny("sd3"), []
    family = find_family(pipe)
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_call(lambda c: seen.append(family.text_inputs(c.kwargs).embeddings.clone()))
        traced(pipe, interp.Capture(attention=None, image=False), prompts=[A])
    with interp.HookRegistry(pipe) as hooks:
        handle = pipe.transformer.register_forward_pre_hook(
            lambda m, a, kw: seen.append(kw["encoder_hidden_states"].clone()), with_kwargs=True
        )
        traced(
            pipe, interp.Capture(attention=None, image=False), prompts=[A], interventions=[interp.ReplaceEOS(B)]
        )  # fmt: skip
        handle.remove()
    arguments = family.arguments(SHORT)
    other = family.encode([B], arguments).embeddings[0]
    mine, theirs = family.tokenize(A, arguments), family.tokenize(B, arguments)
    plain, changed = seen[0][1], seen[1][1]
    for span in family.text_segments(arguments).values():
        a, b = mine.part(span).eos, theirs.part(span).eos
        old, new, others = plain[span], changed[span], other[span]
        assert torch.equal(new[:a], old[:a])
        length = len(others) - b
        assert torch.equal(new[a : a + length], others[b:][: len(new) - a])
    assert torch.equal(seen[0][0], seen[1][0])  # the branch without text keeps its own


def test_without_t5():
    """T5 may be left out: its positions hold zeros, and are padding."""
    pipe = sd3()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    want = call(pipe)
    capture = interp.Capture(text=True, image=False, tokens="all")
    with interp.record(pipe, capture=capture) as recording:
        assert torch.equal(call(pipe), want)
    roles = recording.run.tokens("8x12")["token_role"].values[0]
    assert set(roles[77:]) == {"pad"} and list(recording.run.tree["text"].children) == ["text_encoder"]


def test_noise_levels_that_depend_on_the_size():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=1.2)
    with scheduler_of(tiny("sd3"), scheduler) as pipe:
        small = interp.trace(pipe, A, steps=4, height=32, width=32, options=SHORT, progress=False)
        wide = interp.trace(pipe, A, steps=4, height=32, width=64, options=SHORT, progress=False)
    assert (small.trajectory.sigma.values[1:] < wide.trajectory.sigma.values[1:]).all()
    assert small.attrs["prediction_type"] == "flow_prediction"


def test_noise_levels_that_a_family_does_not_know_are_an_error(monkeypatch):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    monkeypatch.setattr(type(find_family(tiny("sd3"))), "schedule", lambda self, arguments: {"mu": 3.0})
    with scheduler_of(tiny("sd3"), scheduler) as pipe, pytest.raises(interp.InterpError, match="was planned"):
        interp.trace(pipe, A, steps=4, height=32, width=32, options=SHORT, progress=False)
