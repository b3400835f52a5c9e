"""Prompt state: what is exchanged equals a plain loop that is given embeddings made by hand, to the last bit."""

import numpy as np
import pytest
import torch
import yaml

import interp
from interp.interventions import from_spec
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, sample, states, tiny
from tests.interp.test_messages import expect, said

STEPS = 2
BARE = interp.Capture(attention=None, image=False)
A, B = "a red circle and a red cat", "a dog on the blue square background"  # 'background' is two tokens
TABLE = [{"prompt": A, "target": B, "word": "cat"}, {"prompt": B, "target": A, "word": "background"}]
EOS = {A: 8, B: 9}  # positions of the first end-of-text token


def traced(pipe, *changes, prompts=TABLE, steps=STEPS, seeds=(7,), **more):
    """Two samples that differ in everything."""
    return interp.trace(
        pipe, prompts, seeds=list(seeds), steps=steps, guidance_scale=SCALE, capture=BARE, batch_size=2,
        interventions=changes, progress=False, **more,
    )  # fmt: skip


def looped(pipe, edited, window=range(STEPS), steps=STEPS, negative=""):
    """The plain loop; `edited` (sample, token, feature) is read at the steps of the window."""
    return sample(
        pipe, states(pipe, [A, B]), states(pipe, [negative] * 2), [7, 7], steps, SCALE,
        text=lambda i, own: edited if i in window else own,
    )  # fmt: skip


def equal(run, want):
    assert np.array_equal(run.latents.values, torch.stack(want.latents, 1).numpy())
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    assert run.nfe.values.tolist() == [[len(want.latents)] * 2] * 2
    return True


def by_hand(make):
    """Embeddings (sample, token, feature) edited sample by sample: `make(own, other, empty, eos)` changes `own`."""
    pipe = tiny("sd1")
    own, empty = states(pipe, [A, B]), states(pipe, ["", ""])[0]
    other = states(pipe, [B, A])
    result = own.clone()
    for k, prompt in enumerate((A, B)):
        make(result[k], other[k], empty, EOS[prompt])
    assert not torch.equal(result, own)
    return result


def put(where, what):
    """An edit by hand: `what(own, other, empty, eos)` goes to the positions `where(eos)`."""

    def make(own, other, empty, eos):
        own[where(eos)] = what(own.clone(), other, empty, eos)[where(eos)]

    return make


def words(eos):
    return slice(1, eos)


def run_of_eos(eos):
    return slice(eos, 77)


def zeros(own, *_):
    return torch.zeros_like(own)


def repeated(own, other, empty, eos):
    """The first five positions after the words hold the words again, from the first."""
    for k in range(5):
        own[eos + k] = own[1 + k % (eos - 1)]
    return own


def clean(own, other, empty, eos):
    """Padding of an empty prompt; position 1 is its EOS, so its first padding stands in there."""
    return torch.cat([empty[2:3], empty[2:3], empty[2:]])


TOKENS = {
    "E12 Zero+EOS": (interp.ReplaceTokens(roles=("word",)), put(words, zeros)),
    "E12 Sem+Zero": (interp.ReplaceTokens(roles=("eos", "pad"), value="zero"), put(run_of_eos, zeros)),
    "E11 all bos": (
        interp.ReplaceTokens(roles=("word", "eos", "pad"), value="bos"),
        put(lambda eos: slice(1, 77), lambda own, *_: own[:1].expand(77, -1)),
    ),
    "E11 all eos": (
        interp.ReplaceTokens(roles=("word", "eos", "pad"), value="eos"),
        put(lambda eos: slice(1, 77), lambda own, o, e, eos: own[eos : eos + 1].expand(77, -1)),
    ),
    "clean pad": (interp.ReplaceTokens(roles=("word", "eos"), value="pad"), put(lambda eos: slice(1, eos + 1), clean)),
    "pad": (interp.ReplaceTokens(roles="pad", value="pad"), put(lambda eos: slice(eos + 1, 77), clean)),
    "other words": (
        interp.ReplaceTokens(roles="word", prompt="{target}"), put(words, lambda own, other, *_: other),
    ),
    "E9 repeat": (
        interp.ReplaceTokens(roles=("eos", "pad"), value="repeat", count=5),
        put(lambda eos: slice(eos, eos + 5), repeated),
    ),
    "indices": (interp.ReplaceTokens(indices=(0, 3, 76)), put(lambda eos: [0, 3, 76], zeros)),
    "by column": (
        interp.ReplaceTokens(words="{word}"), put(lambda eos: [7] if eos == EOS[A] else [7, 8], zeros),
    ),
    "both": (interp.ReplaceTokens(roles="bos", indices=5, value="eos"),
             put(lambda eos: [0, 5], lambda own, o, e, eos: own[eos : eos + 1].expand(77, -1))),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_replaced_tokens_equal_embeddings_made_by_hand(name):
    change, make = TOKENS[name]
    assert equal(traced(tiny("sd1"), change), looped(tiny("sd1"), by_hand(make)))


def test_words_by_occurrence_and_phrase():
    pipe = tiny("sd1")
    first, second = [2], [6]  # a red circle and a red cat
    for change, where in [
        (interp.ReplaceTokens(words="RED"), first + second),
        (interp.ReplaceTokens(words="red", occurrence=0), first),
        (interp.ReplaceTokens(words="red", occurrence=1), second),
        (interp.ReplaceTokens(words="red cat"), [6, 7]),
        (interp.ReplaceTokens(words=("red", "circle"), count=2), [2, 3]),
    ]:
        edited = states(pipe, [A, A])
        edited[:, where] = 0
        run = traced(pipe, change, prompts=[A], seeds=[7, 8])
        want = sample(pipe, edited, states(pipe, ["", ""]), [7, 8], STEPS, SCALE)
        assert np.array_equal(run.final_latents.values, want.final.numpy()), change


def test_noise_is_seeded_by_sample_and_as_large_as_the_states():
    pipe = tiny("sd1")
    seen = []

    def states_read(change, seeds=(7, 8)):
        """The text states that the first cross-attention reads, (sample, token, feature)."""
        seen.clear()
        site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k:in"
        keep = interp.Edit(lambda x, at: seen.append(x.clone()) if at.branch == "cond" else None, site)
        traced(pipe, change, keep, prompts=[A], seeds=seeds)
        assert torch.equal(seen[0], seen[1])  # the same noise at every step
        return seen[0]

    own = states(pipe, [A, A])
    noise = states_read(interp.ReplaceTokens(roles=("eos", "pad"), value="random"))
    assert torch.equal(noise[:, :8], own[:, :8]) and not torch.equal(noise[0, 8:], noise[1, 8:])
    assert torch.equal(states_read(interp.ReplaceTokens(roles=("eos", "pad"), value="random")), noise)
    assert torch.equal(states_read(interp.ReplaceTokens(roles="pad", value="random"))[:, 9:], noise[:, 9:])
    assert torch.equal(
        states_read(interp.ReplaceTokens(roles="pad", value="random"), seeds=(8, 9))[0, 9:], noise[1, 9:]
    )
    assert not torch.equal(states_read(interp.ReplaceTokens(roles="pad", value="random", seed=1))[:, 9:], noise[:, 9:])
    half = states_read(interp.ReplaceTokens(roles=("eos", "pad"), value="random", scale=0.5))
    assert torch.equal(half[:, 8:], noise[:, 8:] * 0.5)
    drawn = noise[:, 8:] / own.std(dim=(1, 2), unbiased=False)[:, None, None]
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05  # 4,416 numbers


@pytest.mark.parametrize("layer", [0, 1])
def test_an_inner_layer_of_the_encoder(layer):
    """Its hidden state through the final norm, within a window; all layers are the encoder itself."""
    pipe = tiny("sd1")
    ids = pipe.tokenizer([A, B], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[layer]
        edited = pipe.text_encoder.final_layer_norm(hidden)
    with untouched(pipe):
        run = traced(pipe, interp.EncoderLayer(layer, start=0.5))
    assert equal(run, looped(pipe, edited, (1,)))


@pytest.mark.parametrize("align", ["first_eos", "position"])
@pytest.mark.parametrize(("skip", "count"), [(0, 1), (2, 3), (66, None)])
def test_a_number_of_eos(align, skip, count):
    """Positions of the run counted from its first: so many are taken from the other prompt's."""

    def make(own, other, empty, eos):
        theirs = EOS[B] if eos == EOS[A] else EOS[A]
        first = eos if align == "first_eos" else max(eos, theirs)
        for n in range(skip, 77 if count is None else skip + count):
            if first + n < 77:
                own[first + n] = other[min(theirs + n, 76) if align == "first_eos" else first + n]

    change = interp.ReplaceEOS("{target}", align=align, skip=skip, count=count)
    assert equal(traced(tiny("sd1"), change), looped(tiny("sd1"), by_hand(make)))


def test_the_command_line_reads_them():
    from interp.command_values import read_intervention

    assert read_intervention("replace_tokens words=[red] value=zero") == interp.ReplaceTokens(words=("red",))
    assert read_intervention("replace_tokens words=[{word}]") == interp.ReplaceTokens(words="{word}")
    assert read_intervention("encoder_layer layer=2 start=0.5") == interp.EncoderLayer(2, start=0.5)
    assert read_intervention("replace_eos prompt={target} count=3 side=v") == interp.ReplaceEOS(
        "{target}", count=3, side="v"
    )


@pytest.mark.parametrize("window", [{"stop": 0.5}, {"start": 1, "stop": 2, "unit": "step"}], ids=str)
def test_windows(window):
    pipe, steps = tiny("sd1"), 3
    inside = (0, 1) if "start" not in window else (1,)
    run = traced(pipe, interp.ReplaceTokens(roles="word", **window), steps=steps)
    assert equal(run, looped(pipe, by_hand(put(words, zeros)), inside, steps))


def test_negative_prompts_are_untouched():
    pipe = tiny("sd1")
    run = traced(pipe, interp.ReplaceTokens(roles="word"), negative_prompt="a green dog")
    assert equal(run, looped(pipe, by_hand(put(words, zeros)), negative="a green dog"))


def test_order_of_the_list():
    """Repeated words and another prompt's remaining EOS: the paper's appendix C, in either order."""
    pipe, n = tiny("sd1"), 3

    def make(own, other, empty, eos):
        theirs = EOS[B] if eos == EOS[A] else EOS[A]
        for p in range(eos + n, 77):
            own[p] = other[min(theirs + p - eos, 76)]
        for k in range(n):
            own[eos + k] = own[1 + k]

    changes = [
        interp.ReplaceEOS("{target}", skip=n),
        interp.ReplaceTokens(roles=("eos", "pad"), value="repeat", count=n),
    ]
    want = looped(pipe, by_hand(make))
    assert equal(traced(pipe, *changes), want) and equal(traced(pipe, *changes[::-1]), want)
    text = said(lambda: traced(pipe, interp.ReplaceEOS("{target}"), changes[1]))
    expect(text, "both decide about", "text:eos")


ALL = [
    interp.ReplaceTokens(roles=("eos", "pad"), value="random", scale=0.5, seed=3, start=0.2),
    interp.ReplaceTokens(words=("red", "blue square"), occurrence=1, value="pad", side="v", layers="*mid*"),
    interp.ReplaceTokens(indices=3, prompt="{target}", pooled="replace"),
    interp.ReplaceEOS("{target}", count=3, skip=1, pooled="only"),
    interp.EncoderLayer(2, encoders="text_encoder", layers="*mid*"),
]


@pytest.mark.parametrize("change", ALL, ids=repr)
def test_round_trip_through_yaml(change):
    again = from_spec(yaml.safe_load(yaml.safe_dump(change.spec())))
    assert again == change and again.spec() == change.spec() and hash(again) == hash(change)
    assert eval(repr(change), {k: getattr(interp, k) for k in interp.__all__ if k[0] in "RE"}) == change


def test_restored_after_an_exception():
    pipe = tiny("sd1")
    base = traced(pipe)

    def fail(tensor, at):
        if at.step == 1:
            raise RuntimeError("stop")

    change = interp.ReplaceTokens(roles="word", side="k", layers="*mid_block*")
    with untouched(pipe), pytest.raises(RuntimeError, match="stop"):
        traced(pipe, change, interp.Edit(fail, "unet.mid_block:out"))
    assert np.array_equal(traced(pipe).final_latents.values, base.final_latents.values)


def test_messages():
    tokens = interp.ReplaceTokens
    expect(said(lambda: tokens()), "names no token", "roles=('word',)")
    expect(said(lambda: tokens(roles="words")), "did you mean 'word'")
    expect(said(lambda: tokens(roles="word", value="zeros")), "did you mean 'zero'", "'repeat'")
    expect(said(lambda: tokens(roles="word", value="zero", prompt=B)), "value='prompt'")
    expect(said(lambda: tokens(roles="word", value="prompt")), "value='prompt'")
    expect(said(lambda: interp.ReplaceEOS({"target": None})), "prompt is a text", "needs quotes")
    expect(said(lambda: tokens(roles="word", scale=-1)), "standard deviations")
    expect(said(lambda: tokens(roles="word", seed=0.5)), "seed is a whole number")
    expect(said(lambda: tokens(roles="word", count=0)), "count one from 1")
    expect(said(lambda: tokens(indices=-1)), "counted from 0")
    expect(said(lambda: tokens(words=("",))), "words are texts")
    expect(said(lambda: tokens(roles="word", occurrence=0)), "needs words")
    expect(said(lambda: tokens(roles="word", value="bos", pooled="replace")), "pooled vector has no bos")
    pipe = tiny("sd1")
    expect(said(lambda: traced(pipe, tokens(words="circel"), prompts=A)), "'circel' is not in the prompt", "'circle'")
    expect(said(lambda: traced(pipe, tokens(words="{wrd}"))), "names the column 'wrd'", "did you mean 'word'")
    expect(said(lambda: traced(pipe, tokens(words="red", occurrence=2), prompts=A)), "appears 2×")
    expect(said(lambda: traced(pipe, tokens(indices=77))), "positions 0–76")
    expect(said(lambda: traced(pipe, tokens(roles="template"))), "has no 'template'", "'bos'")
    expect(said(lambda: traced(pipe, tokens(roles=("word", "eos"), value="repeat"))), "no words to repeat")
    expect(said(lambda: traced(pipe, tokens(roles="word", side="k", layers="*attn3"))), "no cross-attention layer")
    expect(said(lambda: traced(pipe, tokens(value="zero", pooled="only"))), "no pooled vector")
