"""Sana, HunyuanDiT, AuraFlow: what the conformance suite does not ask; text interventions against the calls they stand for."""

import numpy as np
import pytest
import torch

import interp
from interp.families import find_family
from tests.families.pipelines import tiny
from tests.families.test_conformance import FAMILIES, INSTRUCTION

A, B = "a red circle", "a dog on the blue square background"
NAMES = ["sana", "hunyuandit", "auraflow"]
BARE = interp.Capture(attention=None, image=False)


def settings(name):
    height, width = FAMILIES[name].get("size", (32, 48))
    return {
        "steps": 2, "guidance_scale": 3.0, "height": height, "width": width, "options": FAMILIES[name]["options"],
        "progress": False,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_another_prompt_is_what_its_own_run_gives(name):
    """Exchanging states and masks of the whole run is generating from the other prompt, to the bit."""
    pipe = tiny(name)
    replaced = interp.trace(pipe, A, interventions=[interp.ReplacePrompt(B)], capture=BARE, **settings(name))
    own, other = (interp.trace(pipe, prompt, capture=BARE, **settings(name)) for prompt in (A, B))
    assert np.array_equal(replaced.final_latents.values, other.final_latents.values)
    assert not np.array_equal(own.final_latents.values, other.final_latents.values)


@pytest.mark.parametrize("name", NAMES)
def test_without_text_is_what_the_empty_prompt_gives(name):
    pipe, given = tiny(name), settings(name)
    removed = interp.trace(pipe, A, interventions=[interp.RemoveText()], capture=BARE, **given)
    without = {**given, "guidance_scale": 1.0}
    if name == "sana":  # which reads a negative prompt without its instruction
        without["options"] = {**given["options"], "complex_human_instruction": []}
    empty = interp.trace(pipe, "", capture=BARE, **without)
    assert removed.nfe.values.tolist() == [[0, 2]]
    assert np.allclose(removed.final_latents.values, empty.final_latents.values, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuandit", "auraflow"])
def test_the_end_of_text_comes_from_another_prompt(name):
    """Before each encoder's first EOS the states are the prompt's own, from there on the other's."""
    pipe, family, seen = tiny(name), find_family(tiny(name)), []
    arguments = family.arguments(settings(name)["options"])

    class Look(interp.RemoveGuidance):
        def attach(self, hooks, batch):
            super().attach(hooks, batch)
            hooks.on_call(lambda call: seen.append(family.text_inputs(call.kwargs).embeddings[-1]))

    interp.trace(pipe, A, interventions=[interp.ReplaceEOS(B), Look()], capture=BARE, **settings(name))
    mine, other = (family.encode([p], arguments).embeddings[0] for p in (A, B))
    for span in family.text_segments(arguments).values():
        first, second = (family.tokenize(p, arguments).part(span).eos for p in (A, B))
        states, a, b = seen[0][span], mine[span], other[span]
        assert torch.equal(states[:first], a[:first])
        assert torch.equal(states[first], b[second]) and not torch.equal(states[first], a[first])


@pytest.mark.parametrize("name", ["sana", "hunyuandit"])
def test_all_layers_by_name_are_the_whole(name):
    """Exchanging keys and values in every layer is exchanging the states, where nothing else reads them."""
    pipe, given = tiny(name), settings(name)
    whole, layered, value = (
        interp.trace(pipe, A, interventions=[interp.ReplacePrompt(B, pooled="keep", **more)], capture=BARE, **given)
        for more in ({}, {"layers": "*"}, {"side": "v"})
    )
    if name == "sana":  # HunyuanDiT's time embedding reads T5's states too
        assert np.array_equal(whole.final_latents.values, layered.final_latents.values)
    seen = []

    class Look(interp.RemoveGuidance):
        def attach(self, hooks, batch):
            super().attach(hooks, batch)
            hooks.read("*attn2.to_v:in", lambda x, at: seen.append(x.clone()))

    for prompt, changes in ((B, []), (A, [interp.ReplacePrompt(B, layers="*")])):
        interp.trace(pipe, prompt, interventions=[*changes, Look()], capture=BARE, **{**given, "steps": 1})
    half = len(seen) // 2
    assert half == len([s for s in find_family(pipe).attention_sites() if s.kind == "cross"])
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not np.array_equal(value.final_latents.values, layered.final_latents.values)


def test_sana_has_no_end_of_text():
    with pytest.raises(interp.InterpError, match="no end-of-text token"):
        interp.trace(tiny("sana"), A, interventions=[interp.ReplaceEOS(B)], capture=BARE, **settings("sana"))


@pytest.mark.parametrize("attention", ["self", "*attn1"])
def test_linear_attention_is_refused_in_one_sentence(attention):
    with pytest.raises(interp.InterpError, match="linear and has no softmax probabilities"):
        interp.plan(tiny("sana"), A, capture=interp.Capture(attention=attention), height=32, width=64)
    with pytest.raises(interp.InterpError, match="linear and has no softmax probabilities"):
        interp.HookRegistry(tiny("sana")).read("*attn1:probs", print)


def test_linear_attention_is_not_skipped_silently():
    given = {**settings("sana"), "steps": 1}
    with pytest.warns(
        UserWarning, match="linear and has no softmax probabilities; the other attention is kept"
    ) as told:
        run = interp.trace(tiny("sana"), A, capture=interp.Capture(attention="all", image=False), **given)
    assert [w.filename for w in told if "linear" in str(w.message)] == [__file__]
    assert "self_attention" not in run.tree.children and "attention" in run.tree.children


@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
def test_sana_reads_the_prompt_behind_its_instruction(instruction):
    """Ids of all positions, and of those the ones that are kept, against the tokenizer's own work."""
    pipe = tiny("sana")
    family, length = find_family(pipe), 24
    arguments = family.arguments({"max_sequence_length": length})
    arguments["complex_human_instruction"] = instruction
    tokens = family.tokenize("A Red background", arguments)
    before = "\n".join(instruction or [])
    whole = pipe.tokenizer(before + "a red background")["input_ids"]
    room = length if not instruction else len(pipe.tokenizer(before)["input_ids"]) + length - 2
    every = whole + [pipe.tokenizer.pad_token_id] * (room - len(whole))
    assert tokens.ids == [every[0], *every[-length + 1 :]]
    words = [t for t, role in zip(tokens.text, tokens.role, strict=True) if role == "word"]
    assert words == ["a", "red", "back", "ground"] and tokens.role[tokens.eos] == "pad"


def test_the_registers_get_what_is_missing():
    """Text and image together get less than 1: the rest goes to the registers."""
    pipe, totals = tiny("auraflow"), {}
    family = find_family(pipe)

    def add(probs, at):
        totals[at.site, at.step] = probs[0, :, family.registers + 24 :, : family.registers].sum(-1)

    with interp.HookRegistry(pipe) as hooks:
        hooks.read("*:probs", lambda x, at: add(x, at) if at.branch == "cond" else None)
        capture = interp.Capture(attention="all", heads="all", tokens="all", dtype="float32", image=False)
        run = interp.trace(pipe, A, capture=capture, **{**settings("auraflow"), "steps": 1})
    text, image = run.attention("8x12"), run.tree["self_attention/8x12"]["probs"]
    given = (text.sum("token") + image.sum(("key_y", "key_x"))).isel(sample=0, step=0, branch=0)
    for layer in given.layer.values:
        missing = 1 - given.sel(layer=layer).values.reshape(2, -1)
        assert np.allclose(missing, totals[f"{layer}:probs", 0].numpy(), atol=1e-5) and missing.max() > 0.01
