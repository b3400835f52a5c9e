"""Prompt state in every kind of model: pooled vectors, masks, several encoders, joint attention.

The references are the pipelines themselves, given embeddings, masks and pooled vectors that were edited by hand.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

import interp
from tests.families.pipelines import sd3, tiny
from tests.interp.leftovers import untouched
from tests.interp.test_messages import expect, said

A, B = "a red circle", "a dog on the blue square background"  # 3 and 8 tokens
TABLE = [{"prompt": A, "target": B}, {"prompt": B, "target": A}]
BARE = interp.Capture(attention=None, image=False)
STEPS = 2


@dataclass
class Text:
    """What a pipeline is given: embeddings (sample, token, feature), pooled vector, mask."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def copy(self):
        return Text(*(None if x is None else x.clone() for x in (self.states, self.pooled, self.mask)))


@dataclass(frozen=True)
class Model:
    """encoders: for each encoder that follows another, its first position, length, and where A and B end."""

    encoders: tuple
    options: dict
    scale: float | None = 3.0


SHORT = {"max_sequence_length": 24}
CLIP, T5 = (0, 77, {A: 4, B: 9}), (0, 24, {A: 3, B: 8})
MODELS = {
    "sdxl": Model((CLIP,), {}),
    "pixart_alpha": Model((T5,), {**SHORT, "use_resolution_binning": False}),
    "sd3": Model((CLIP, (77, *T5[1:])), SHORT),
    "flux": Model((T5,), SHORT, None),
}
FAMILIES = tuple(MODELS)


@cache
@torch.no_grad()
def encoded(name, prompts=(A, B)):
    """By the pipeline's own `encode_prompt`."""
    pipe, prompts = tiny(name), list(prompts)
    if name == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return Text(states, pooled)
    if name == "pixart_alpha":
        states, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **SHORT)
        return Text(states, mask=mask)
    if name == "sd3":
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **SHORT)
        return Text(states, pooled)
    states, pooled, _ = pipe.encode_prompt(prompts, **SHORT)
    return Text(states, pooled)


def called(name, text, pipe=None):
    """The pipeline, given text states."""
    pipe, empty, model = pipe or tiny(name), encoded(name, ("", "")), MODELS[name]
    given = {"prompt_embeds": text.states}
    if text.pooled is not None:
        given["pooled_prompt_embeds"] = text.pooled
    if name in ("pixart_alpha", "sd3"):
        given["negative_prompt_embeds"] = empty.states
    if name == "sd3":
        given["negative_pooled_prompt_embeds"] = empty.pooled
    if text.mask is not None:
        given |= {
            "prompt_attention_mask": text.mask,
            "negative_prompt_attention_mask": empty.mask,
            "negative_prompt": None,
        }
    if model.scale is not None:
        given["guidance_scale"] = model.scale
    generator = [torch.Generator().manual_seed(5) for _ in text.states]
    return pipe(
        num_inference_steps=STEPS,
        height=16,
        width=16,
        generator=generator,
        output_type="latent",
        **given,
        **model.options,
    ).images


def traced(name, *changes, prompts=TABLE, pipe=None, options=None, **more):
    model = MODELS[name]
    return interp.trace(
        pipe or tiny(name), prompts, seeds=5, steps=STEPS, guidance_scale=model.scale, height=16, width=16, batch_size=2,
        capture=BARE, interventions=changes, options={**model.options, **(options or {})}, progress=False, **more,
    )  # fmt: skip


def final(run, name):
    pipe = tiny(name)
    if name != "flux":
        return torch.from_numpy(run.final_latents.values)
    latents = torch.from_numpy(run.final_latents.values)
    return pipe._pack_latents(latents, *latents.shape)


def edited(name, edit):
    """`edit(k, own, other, empty, where, mine, theirs)` changes sample k of `own` for each encoder's positions."""
    own, other, empty = encoded(name).copy(), encoded(name, (B, A)), encoded(name, ("", ""))
    for k, (a, b) in enumerate(((A, B), (B, A))):
        for first, length, end in MODELS[name].encoders:
            edit(k, own, other, empty, range(first, first + length), first + end[a], first + end[b])
    return own


def move(own, to, other, origin, k):
    """State and mask together."""
    own.states[k, to] = other.states[k, origin]
    if own.mask is not None:
        own.mask[k, to] = other.mask[k, origin]


def eos(k, own, other, empty, where, mine, theirs):
    for p in range(mine, where.stop):
        move(own, p, other, min(theirs + p - mine, where.stop - 1), k)
    if own.pooled is not None:
        own.pooled[k] = other.pooled[k]


def one_eos(k, own, other, empty, where, mine, theirs):
    move(own, mine, other, theirs, k)


def other_words(k, own, other, empty, where, mine, theirs):
    first = where[0] + (where.stop - where.start == 77)
    for p in range(first, mine):
        move(own, p, other, p, k)


def no_words(k, own, other, empty, where, mine, theirs):
    clip = where.stop - where.start == 77
    for p in range(where[0] + clip, mine):
        move(own, p, empty, max(p, where[0] + 1 + clip), k)  # the first padding stands in for the empty prompt's EOS
    if own.pooled is not None:
        own.pooled[k] = empty.pooled[k]


def zero_words(k, own, other, empty, where, mine, theirs):
    own.states[k, where[0] + (where.stop - where.start == 77) : mine] = 0
    if own.pooled is not None:
        own.pooled[k] = 0


def repeat(k, own, other, empty, where, mine, theirs):
    before, first = own.copy(), where[0] + (where.stop - where.start == 77)
    for i in range(6):
        move(own, mine + i, before, first + i % (mine - first), k)


CHANGES = {
    "eos": (interp.ReplaceEOS("{target}"), eos),
    "one eos": (interp.ReplaceEOS("{target}", count=1, pooled="keep"), one_eos),
    "other words": (interp.ReplaceTokens(roles="word", prompt="{target}"), other_words),
    "clean padding": (interp.ReplaceTokens(roles="word", value="pad", pooled="replace"), no_words),
    "zero": (interp.ReplaceTokens(roles="word", pooled="replace"), zero_words),
    "repeat": (interp.ReplaceTokens(roles=("eos", "pad"), value="repeat", count=6), repeat),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", CHANGES)
def test_changes_equal_embeddings_made_by_hand(name, kind):
    """Two prompts in a batch, to the last bit."""
    change, edit = CHANGES[kind]
    run, want = traced(name, change), called(name, edited(name, edit))
    assert torch.equal(final(run, name), want)
    assert (run.nfe.sel(branch="cond").values == STEPS).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_pooled_vector_together_and_apart(name):
    own, other = encoded(name), encoded(name, (B, A))
    base = called(name, own)
    with untouched(tiny(name)) if name != "pixart_alpha" else torch.no_grad():
        assert torch.equal(final(traced(name), name), base)
        assert torch.equal(final(traced(name, interp.ReplacePrompt("{target}")), name), called(name, other))
    if own.pooled is None:
        expect(said(lambda: traced(name, interp.ReplacePrompt("{target}", pooled="only"))), "no pooled vector")
        return
    kept, only = (traced(name, interp.ReplacePrompt("{target}", pooled=p)) for p in ("keep", "only"))
    assert torch.equal(final(kept, name), called(name, replace(other, pooled=own.pooled)))
    assert torch.equal(final(only, name), called(name, replace(own, pooled=other.pooled)))
    parts = [interp.ReplacePrompt("{target}", pooled="only"), interp.ReplacePrompt("{target}", pooled="keep")]
    assert torch.equal(final(traced(name, *parts), name), called(name, other))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_prompt_changes_nothing(name):
    base = called(name, encoded(name))
    depth = 2  # layers of every tiny encoder
    for change in (
        interp.ReplaceEOS("{prompt}"),
        interp.ReplaceTokens(roles=("word", "eos"), prompt="{prompt}", pooled="replace"),
        interp.ReplaceTokens(roles="eos", value="eos"),
        interp.EncoderLayer(depth),
    ):
        assert torch.equal(final(traced(name, change), name), base), change


# Layers, keys and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha"])
def test_keys_and_values_of_all_layers_are_the_whole(name):
    """Also for masked states that are projected on the way to the layers: the longer prompt's mask comes with its keys."""
    whole = final(traced(name, interp.ReplacePrompt("{target}")), name)
    k, v = (interp.ReplacePrompt("{target}", side=s, pooled=p) for s, p in (("k", "replace"), ("v", "keep")))
    assert torch.equal(final(traced(name, interp.ReplacePrompt("{target}", layers="*")), name), whole)
    assert torch.equal(final(traced(name, k, v), name), whole)
    assert not torch.equal(final(traced(name, k), name), whole)
    same = [interp.ReplacePrompt("{prompt}", side="k"), interp.ReplaceEOS("{prompt}", side="v", pooled="keep")]
    assert torch.equal(final(traced(name, *same), name), final(traced(name), name))


@pytest.mark.parametrize("side", ["k", "v", "kv"])
def test_one_layer_of_pixart_by_hand(side):
    """Plain torch hooks on one block: its own projections of the other caption, and the mask with the keys."""
    pipe, other, own = tiny("pixart_alpha"), encoded("pixart_alpha", (B, A)), encoded("pixart_alpha")
    empty, module = encoded("pixart_alpha", ("", "")), tiny("pixart_alpha").transformer.transformer_blocks[1].attn2
    with torch.no_grad():
        read = pipe.transformer.caption_projection(torch.cat([empty.states, other.states]))
    bias = ((1 - torch.cat([empty.mask, other.mask]).float()) * -10000.0)[:, None]
    handles = [
        getattr(module, f"to_{one}").register_forward_pre_hook(lambda m, args: (read,)) for one in side
    ]  # fmt: skip
    if "k" in side:
        swap = lambda m, args, kwargs: (args, {**kwargs, "attention_mask": bias})  # noqa: E731
        handles.append(module.register_forward_pre_hook(swap, with_kwargs=True))
    try:
        want = called("pixart_alpha", own)
    finally:
        for handle in handles:
            handle.remove()
    change = interp.ReplacePrompt("{target}", side=side, layers="*blocks.1.attn2")
    assert torch.equal(final(traced("pixart_alpha", change), "pixart_alpha"), want)
    assert not torch.equal(want, called("pixart_alpha", own))


def test_a_stream_of_text_has_no_layers():
    for name in ("sd3", "flux"):
        for more in ({"side": "k"}, {"layers": "*blocks.0*"}):
            text = said(lambda name=name, more=more: traced(name, interp.ReplacePrompt("{target}", **more)))
            expect(text, "a stream that every block changes", "leave out side and layers")


def test_what_has_no_meaning_is_refused():
    tokens = interp.ReplaceTokens
    expect(said(lambda: traced("pixart_alpha", tokens(roles="pad"))), "masks the padding", "nothing reads")
    expect(said(lambda: traced("pixart_alpha", tokens(roles="bos"))), "has no 'bos'", "'word', 'eos', 'pad'")
    expect(said(lambda: traced("flux", tokens(roles="word", value="bos"))), "has no 'bos'")
    text = said(lambda: traced("sdxl", interp.ReplaceEOS("{target}"), options={"prompt_2": "a cat"}))
    expect(text, "'prompt_2'", "different prompts")


def test_without_t5_its_positions_stay_zero():
    pipe = sd3()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    run = traced("sd3", interp.ReplacePrompt("{target}"), pipe=pipe)
    want = traced("sd3", prompts=[B, A], pipe=pipe)
    assert np.array_equal(run.final_latents.values, want.final_latents.values)
    text = said(lambda: traced("sd3", interp.ReplaceTokens(indices=80), pipe=pipe))
    expect(text, "no text encoder fills position 80")


# The text encoder's layers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def inner(encoder, tokenizer, layer, length):
    """Hidden state after so many layers, as it is and through the final norm: (sample, token, feature) twice."""
    ids = tokenizer([A, B], padding="max_length", max_length=length, return_tensors="pt")
    state = encoder(ids.input_ids, output_hidden_states=True).hidden_states[layer]
    text = getattr(encoder, "text_model", encoder)
    norm = text.final_layer_norm if hasattr(text, "final_layer_norm") else encoder.encoder.final_layer_norm
    return state, norm(state)


def ends(states):
    """The states at the first end-of-text token of CLIP."""
    return torch.stack([states[k, CLIP[2][prompt]] for k, prompt in enumerate((A, B))])


@pytest.mark.parametrize("layer", [0, 1])
def test_an_inner_layer_of_sdxl(layer):
    """Both encoders' states without the final norm, as XL reads them; the pooled vector through norm and projection."""
    pipe = tiny("sdxl")
    one, _ = inner(pipe.text_encoder, pipe.tokenizer, layer, 77)
    two, normed = inner(pipe.text_encoder_2, pipe.tokenizer_2, layer, 77)
    with torch.no_grad():
        pooled = pipe.text_encoder_2.text_projection(ends(normed))
    own = encoded("sdxl")
    for change, text in [
        (interp.EncoderLayer(layer), Text(torch.cat([one, two], -1), pooled)),
        (interp.EncoderLayer(layer, pooled="keep"), Text(torch.cat([one, two], -1), own.pooled)),
        (
            interp.EncoderLayer(layer, encoders="text_encoder"),
            Text(torch.cat([one, own.states[..., 32:]], -1), own.pooled),
        ),
    ]:
        assert torch.equal(final(traced("sdxl", change), "sdxl"), called("sdxl", text)), change


def test_an_inner_layer_of_flux_and_sd3():
    pipe = tiny("flux")
    _, t5 = inner(pipe.text_encoder_2, pipe.tokenizer_2, 1, 24)
    _, normed = inner(pipe.text_encoder, pipe.tokenizer, 1, 77)
    want = called("flux", Text(t5, ends(normed)))
    assert torch.equal(final(traced("flux", interp.EncoderLayer(1)), "flux"), want)
    pipe, own = tiny("sd3"), encoded("sd3")
    _, t5 = inner(pipe.text_encoder_3, pipe.tokenizer_3, 0, 24)
    want = called("sd3", replace(own, states=torch.cat([own.states[:, :77], t5], 1)))
    assert torch.equal(final(traced("sd3", interp.EncoderLayer(0, encoders="text_encoder_3")), "sd3"), want)


def test_an_inner_layer_of_masked_t5():
    pipe, own = tiny("pixart_alpha"), encoded("pixart_alpha")
    ids = pipe.tokenizer([A, B], padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        state = pipe.text_encoder(**ids, output_hidden_states=True).hidden_states[1]
        states = pipe.text_encoder.encoder.final_layer_norm(state)
    want = called("pixart_alpha", replace(own, states=states))
    assert torch.equal(final(traced("pixart_alpha", interp.EncoderLayer(1)), "pixart_alpha"), want)


def test_messages_about_encoders():
    layer = interp.EncoderLayer
    expect(said(lambda: layer(-1)), "whole number from 0")
    expect(said(lambda: traced("sdxl", layer(1, encoders="text_encoder2"))), "did you mean 'text_encoder_2'")
    expect(said(lambda: traced("flux", layer(3))), "has 2 layers", "at most")


@pytest.mark.parametrize("name", ["sana", "hunyuandit"])
def test_other_cross_attention_by_keys_and_values(name):
    """States that are projected (Sana), or masked by a learned state (HunyuanDiT), on their way to the layers."""
    # Sana's own instruction before the prompt is long, and the tiny encoder reads it letter by letter
    options = {"sana": {"complex_human_instruction": ["a photo of"]}, "hunyuandit": {}}[name]
    more = {"height": 64, "width": 64, "options": {"use_resolution_binning": False, **options}}

    def latents(*changes):
        run = interp.trace(
            tiny(name),
            TABLE,
            seeds=5,
            steps=1,
            capture=BARE,
            interventions=changes,
            batch_size=2,
            progress=False,
            **more,
        )
        return run.final_latents.values

    base = latents()
    assert np.array_equal(latents(interp.ReplacePrompt("{prompt}", side="k")), base)
    assert np.array_equal(latents(interp.EncoderLayer(2)), base)
    tokens = interp.ReplaceTokens
    both = latents(tokens(roles="word", layers="*"))
    assert np.array_equal(latents(tokens(roles="word", side="k"), tokens(roles="word", side="v")), both)
    assert not np.array_equal(both, base)
