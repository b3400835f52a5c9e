"""Interventions on attention equal eager processors written here, on cross and joint attention; identities are bit-equal."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

import interp
from interp.interventions import from_spec
from interp.interventions.aligning import align
from tests.interp.leftovers import untouched
from tests.interp.reference import scheduler_of, tiny

STEPS = 2
A, B, LONGER = "a red circle", "a blue square", "a photo of a red dog"
SHORT = {"max_sequence_length": 12}
OPTIONS = {
    "sd1": {}, "sdxl": {}, "pixart_alpha": {**SHORT, "use_resolution_binning": False}, "sd3": SHORT,
    "flux": {**SHORT, "true_cfg_scale": 3.0},
}  # fmt: skip
FAMILIES = list(OPTIONS)


def traced(name, changes, prompts=A, capture=None, steps=STEPS, **more):
    capture = capture or interp.Capture(attention=None, image=False)
    return interp.trace(
        tiny(name), prompts, steps=steps, guidance_scale=4.0, height=16, width=16, capture=capture, options=OPTIONS[name],
        interventions=changes, progress=False, **more,
    )  # fmt: skip


def maps(name, changes, prompts=A, attention="cross", **more):
    """What was attended to, by layer: (sample, step, branch, head, token, position), all tokens and heads."""
    capture = interp.Capture(
        attention=attention, heads="all", tokens="all", branches=("cond", "uncond"), dtype="float32", image=False
    )
    run = traced(name, changes, prompts, capture, **more)
    return run, {
        str(layer): group["probs"].sel(layer=layer).values
        for group in run.tree["attention" if attention == "cross" else "self_attention"].children.values()
        for layer in group["probs"].layer.values
    }


def positions(name, word, prompt=A):
    """Where a word is, by the tokenizers alone."""
    pipe = tiny(name)
    own = {
        "sd1": "tokenizer",
        "sdxl": "tokenizer",
        "pixart_alpha": "tokenizer",
        "sd3": "tokenizer",
        "flux": "tokenizer_2",
    }
    tokenizer = getattr(pipe, own[name])
    found = [i for i, t in enumerate(tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)) if word in t]
    if name == "sd3":
        t5 = pipe.tokenizer_3
        found += [77 + i for i, t in enumerate(t5.convert_ids_to_tokens(t5(prompt).input_ids)) if word in t]
    return found


def equal(one, other):
    return np.array_equal(one.final_latents.values, other.final_latents.values)


# Against attention computed eagerly, here ---------------------------------------------------------------------------


@contextmanager
def eagerly(name, edit):
    """Eager attention in place of the denoiser's fused kernels: softmax, an edit of (rows, head, query, key), probs @ value."""
    fused, inside = torch.nn.functional.scaled_dot_product_attention, []
    denoiser = getattr(tiny(name), "unet", None) or tiny(name).transformer

    def kernel(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        if not inside:  # text encoders, autoencoder
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return edit(torch.softmax(scores, -1)) @ value

    handles = [
        denoiser.register_forward_pre_hook(lambda *_: inside.append(1)),
        denoiser.register_forward_hook(lambda *_: inside.clear()),
    ]
    torch.nn.functional.scaled_dot_product_attention = kernel
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused
        for handle in handles:
            handle.remove()


def eager(name, edit, prompts):
    """The pipeline itself with eager attention; no line of interp runs."""
    options = dict(OPTIONS[name])
    if name == "flux":
        options["negative_prompt"] = [""] * len(prompts)
    with eagerly(name, edit):
        return tiny(name)(
            prompts, num_inference_steps=STEPS, guidance_scale=4.0, height=16, width=16, output_type="latent",
            generator=[torch.Generator().manual_seed(0) for _ in prompts], **options,
        ).images.numpy()  # fmt: skip


def text_block(name, probs):
    """Queries of the image and keys of the text in a kernel call, or None where it holds no text. Written per family."""
    queries, keys = probs.shape[-2:]
    image = {"sd1": None, "sdxl": None, "pixart_alpha": None, "sd3": 16, "flux": 16}[name]
    if image is None:
        text = {"sd1": 77, "sdxl": 77, "pixart_alpha": 12}[name]
        return (slice(0, queries), slice(0, keys)) if keys == text else None
    if name == "sd3":  # image, then text
        return slice(0, image), slice(image, keys)
    return slice(keys - image, keys), slice(0, keys - image)


def of_cond(name, probs, calls, change):
    """Apply a change to the rows with text: the second half, or every other call (FLUX)."""
    if name == "flux":
        return change(probs) if calls % 2 == 0 else probs
    half = len(probs) // 2
    return torch.cat([probs[:half], change(probs[half:])])


def close(run, want):
    """Max difference 1e-4 relative to the largest latent: the same formula, other order of operations."""
    got = run.final_latents.values
    want = want if want.ndim == 4 else unpacked(want, got.shape)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), np.abs(got - want).max()


def unpacked(want, shape):
    n, c, h, w = shape
    return want.reshape(n, h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(shape)


class Edits:
    """Counts the denoiser's calls, and applies a change to the block image → text of the rows with text."""

    def __init__(self, name, change):
        self.name, self.change, self.calls, self.kernels = name, change, 0, 0

    def __call__(self, probs):
        block = text_block(self.name, probs)
        if block is None:
            return probs
        layers = {"flux": 2}.get(self.name)
        call = 0 if layers is None else self.kernels // layers
        self.kernels += 1
        return of_cond(self.name, probs, call, lambda rows: self.change(rows.clone(), *block))


@pytest.mark.parametrize("name", FAMILIES)
def test_scaling_a_word_equals_eager_attention(name):
    columns = positions(name, "red")
    assert columns

    def change(rows, queries, keys):
        start = keys.start
        for p in columns:
            rows[:, :, queries, start + p] *= 3
        return rows

    with untouched(tiny(name)) if name != "pixart_alpha" else torch.no_grad():
        run = traced(name, [interp.ScaleAttention("red", scale=3.0)], [A, "a red dog"])
    close(run, eager(name, Edits(name, change), [A, "a red dog"]))
    assert not equal(run, traced(name, [], [A, "a red dog"]))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_injection_equals_eager_attention(name):
    """A word swap: the second sample attends to the text as the first does (its own softmax in the rest)."""

    def change(rows, queries, keys):
        rows[1, :, queries, keys] = rows[0, :, queries, keys]
        return rows

    run = traced(name, [interp.InjectAttention("batch", row=0)], [A, B])
    close(run, eager(name, Edits(name, change), [A, B]))
    base = traced(name, [], [A, B])
    assert np.array_equal(run.final_latents.values[0], base.final_latents.values[0])  # the source is left alone
    assert not np.array_equal(run.final_latents.values[1], base.final_latents.values[1])


# What is attended to --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_after_scaling_and_setting(name):
    columns = positions(name, "red")
    _, base = maps(name, [])
    for change, formula in (
        (interp.ScaleAttention("red", scale=3.0), lambda p, c: np.where(c, 3 * p, p)),
        (interp.SetAttention(words="red", value=0.25), lambda p, c: np.where(c, 0.25, p)),
    ):
        _, after = maps(name, [change])
        first = next(iter(base))
        chosen = np.isin(np.arange(base[first].shape[4]), columns)[:, None, None]
        # in the first step the first layer sees the same input, so its probabilities are the formula's
        assert np.abs(after[first][:, 0, 0] - formula(base[first][:, 0, 0], chosen)).max() <= 1e-6
        assert np.array_equal(after[first][:, 0, 1], base[first][:, 0, 1])  # the branch without text


@pytest.mark.parametrize("name", ["sd1", "pixart_alpha"])
def test_renormalised_rows_sum_to_one(name):
    columns = positions(name, "red")
    for change in (
        interp.ScaleAttention(roles="eos", words="red", scale=5.0, renormalise=True),
        interp.SetAttention(words="red", value=0.25, renormalise=True),
        interp.SetAttention(words="red", value=0.0, renormalise=True, heads=(1,)),
    ):
        _, after = maps(name, [change])
        for probs in after.values():
            assert np.allclose(probs.sum(4), 1, atol=1e-5)
            if isinstance(change, interp.SetAttention):
                heads = slice(1, 2) if change.heads else slice(None)
                assert np.allclose(probs[:, :, 0, heads][:, :, :, columns], change.value, atol=1e-6)
    _, kept = maps(name, [interp.SetAttention(words="red", value=0.25)])
    assert any(not np.allclose(p.sum(4), 1, atol=1e-3) for p in kept.values())


def test_scaling_renormalised_is_a_change_of_logits():
    """p·s / Σ p·s is the softmax of log p + log s."""

    def change(rows, queries, keys):
        logits = rows.log()
        logits[..., positions("sd1", "red")] += math.log(4.0)
        return torch.softmax(logits, -1)

    run = traced("sd1", [interp.ScaleAttention("red", scale=4.0, renormalise=True)])
    close(run, eager("sd1", Edits("sd1", change), [A]))


@pytest.mark.parametrize("name", FAMILIES)
def test_ablated_heads(name):
    """Zero, uniform (1/keys, of the keys that are not masked) and mean probabilities, in the chosen heads alone."""
    _, base = maps(name, [])
    layer = next(iter(base))
    for value in ("zero", "uniform", "mean"):
        _, after = maps(name, [interp.AblateHeads(layer, value, heads=(1,))])
        got, plain = after[layer][:, 0, 0], base[layer][:, 0, 0]
        others = [h for h in range(plain.shape[1]) if h != 1]
        assert np.array_equal(got[:, others], plain[:, others])
        if value == "zero":
            assert not got[:, 1].any()
        elif value == "uniform":
            keys = plain.shape[2] + (16 if name in ("sd3", "flux") else 0)
            if name == "pixart_alpha":
                keys = len(tiny(name).tokenizer(A).input_ids)
                assert not got[:, 1, keys:].any()
            assert np.allclose(got[:, 1, :keys], 1 / keys, atol=1e-7)
        else:
            assert np.allclose(got[:, 1], got[:, 1, :, :1, :1], atol=1e-7)  # the same for every query
            if name not in ("sd3", "flux"):  # in joint attention the text's queries take part in the mean
                assert np.allclose(got[:, 1, :, 0, 0], plain[:, 1].mean((-1, -2)), atol=1e-6)


def test_an_ablated_head_puts_out_nothing():
    pipe, site = tiny("sd1"), "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    seen = []
    handle = (
        pipe.unet.get_submodule(site.removeprefix("unet."))
        .to_out[0]
        .register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    )
    try:
        traced("sd1", [], steps=1)
        traced("sd1", [interp.AblateHeads(site, heads=(2,))], steps=1)
    finally:
        handle.remove()
    plain, ablated = (x.unflatten(-1, (4, -1)) for x in seen)
    assert torch.equal(ablated[0], plain[0]) and not ablated[1, :, 2].any()
    rest = [0, 1, 3]
    assert torch.equal(ablated[1][:, rest], plain[1][:, rest]) and plain[1, :, 2].any()


# Prompt-to-Prompt -----------------------------------------------------------------------------------------------------


def test_replace_and_refine_pair_the_words():
    """By hand: bos a red circle eos …; bos a photo of a red dog eos …; letters of words that are not in the vocabulary."""
    pipe = tiny("sd1")
    family = interp.families.find_family(pipe)
    a, b, longer, spelt = (family.tokenize(p) for p in (A, B, LONGER, "a cow circle"))
    whole = [range(77)]
    swap = align(a, b, "auto", whole)
    assert not swap.own and sorted(swap.pairs) == [(p, p, 1.0) for p in range(77)]
    refined = align(a, longer, "auto", whole)  # common: a, red (and no circle)
    pairs = {(p, q) for p, q, _ in refined.pairs}
    assert {(0, 0), (1, 1), (2, 5)} <= pairs
    assert sorted(refined.own) == [2, 3, 4, 6]  # photo of a … dog
    assert (4, 7) in pairs and (5, 8) in pairs  # first EOS, padding
    assert {p for p, q, _ in refined.pairs if q == 76} == {73, 74, 75, 76}  # what has no place goes to the last
    split = align(a, spelt, "replace", whole)  # red → c, o, w: evenly
    assert [(p, q, w) for p, q, w in split.pairs if p == 2] == [(2, q, pytest.approx(1 / 3)) for q in (2, 3, 4)]
    source = torch.rand(3, 77).softmax(-1)
    assert torch.allclose(split.carry(source, torch.rand(3, 77)).sum(-1), source.sum(-1))
    with pytest.raises(interp.InterpError, match="refine"):
        align(a, longer, "replace", whole)


@pytest.mark.parametrize("name", ["sd1", "pixart_alpha", "sd3", "flux"])
def test_what_is_injected_is_the_sources(name):
    _, after = maps(name, interp.prompt_to_prompt(cross_replace=0.5, self_replace=0), [A, B])
    for probs in after.values():
        assert np.array_equal(probs[1, 0, 0], probs[0, 0, 0])  # step 0, branch cond
        assert not np.array_equal(probs[1, 1, 0], probs[0, 1, 0])  # after the window
        assert not np.array_equal(probs[1, 0, 1], probs[0, 0, 0])
    if name == "sd1":
        _, after = maps(name, interp.prompt_to_prompt(cross_replace=0, self_replace=0.5), [A, B], "self")
        for probs in after.values():
            assert np.array_equal(probs[1, 0, 0], probs[0, 0, 0]) and not np.array_equal(probs[1, 1, 0], probs[0, 1, 0])


def test_reweighting_and_refinement():
    """Equal prompts: all columns are the source's, the word's times the scale. A longer one: the new words keep their own."""
    columns = positions("sd1", "red")
    _, base = maps("sd1", [], [A, A], seeds=0, steps=1)
    _, after = maps("sd1", [interp.InjectAttention("batch", row=0, words="red", scale=2.0)], [A, A], steps=1)
    for layer, probs in after.items():
        want = base[layer][0, :, 0].copy()
        want[:, :, columns] *= 2
        if layer == next(iter(after)):
            assert np.allclose(probs[1, :, 0], want, atol=1e-6)
        factor = np.where(np.isin(np.arange(77), columns), 2, 1)[:, None, None]
        assert np.allclose(probs[1, :, 0], factor * probs[0, :, 0], atol=1e-6)
    _, refined = maps("sd1", [interp.InjectAttention("batch", row=0)], [A, LONGER], steps=1)
    _, plain = maps("sd1", [], [A, LONGER], steps=1)
    first = next(iter(refined))
    got, own, source = refined[first][1, 0, 0], plain[first][1, 0, 0], plain[first][0, 0, 0]
    red = positions("sd1", "red", LONGER)
    dog = positions("sd1", "dog", LONGER)
    assert np.allclose(got[:, red], source[:, columns], atol=1e-6) and np.array_equal(got[:, dog], own[:, dog])


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_a_stored_source_is_a_live_one(name, tmp_path):
    """In float32 the stored probabilities are those that pass: bit-equal, in the same batch."""
    capture = interp.Capture(
        attention="all", heads="all", tokens="all", branches=("cond", "uncond"), dtype="float32", image=False
    )
    stored = traced(name, [], [A, B], capture, store=tmp_path / "run.zarr")
    own = [interp.InjectAttention(str(tmp_path / "run.zarr"), part=part) for part in ("cross", "self")]
    assert equal(traced(name, own, [A, B]), stored)  # its own, from the run: nothing changes
    for part in ("cross", "self"):
        live = traced(name, [interp.InjectAttention("batch", row=0, part=part)], [A, B])
        kept = traced(name, [interp.InjectAttention(stored, row=0, part=part)], [A, B])
        assert np.array_equal(kept.final_latents.values[1], live.final_latents.values[1])


# Identities, order, windows -------------------------------------------------------------------------------------------

SAME = [
    interp.ScaleAttention("red", scale=1.0),
    interp.ScaleAttention("red", scale=1.0, renormalise=True),
    interp.ScaleAttention("red", scale=9.0, stop=0.0),
    interp.SetAttention(words="red", value=0.9, start=1.0),
    interp.AblateHeads("cross", start=1.0),
    interp.InjectAttention("batch"),
    interp.InjectAttention("batch", row=0, part="self"),
]


@pytest.mark.parametrize("change", SAME, ids=str)
def test_identities_are_bit_equal(change):
    for name in ("sd1", "sd3") if not isinstance(change, interp.AblateHeads) else ("sd1",):
        assert equal(traced(name, [change]), traced(name, []))


def test_the_same_prompt_injected_is_bit_equal():
    """The two samples are equal, so that what comes from the other is what was there."""
    run = traced("sd1", interp.prompt_to_prompt(), [A, A])
    base = traced("sd1", [], [A, A])
    assert np.array_equal(run.final_latents.values[0], base.final_latents.values[0])
    assert np.abs(run.final_latents.values[1] - base.final_latents.values[1]).max() <= 1e-5


def test_order_of_the_list():
    scale, take = interp.ScaleAttention("red", scale=3.0), interp.SetAttention(words="red", value=0.2)
    columns, layer = positions("sd1", "red"), "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    for changes, value in (([take, scale], 0.6), ([scale, take], 0.2)):
        _, after = maps("sd1", changes, steps=1)
        assert np.allclose(after[layer][:, :, 0][:, :, :, columns], value, atol=1e-6)
    # ablated heads stay nothing, whatever is multiplied later
    _, after = maps("sd1", [interp.AblateHeads("cross", heads=(0,)), interp.ScaleAttention("red", scale=2.0)], steps=1)
    assert not after[layer][:, :, 0, 0].any() and after[layer][:, :, 0, 1].any()


def test_branches_and_both_evaluations_of_heun():
    pad = interp.SetAttention(roles="pad", value=0.0, branch="both")
    _, after = maps("sd1", [pad], steps=1)
    for probs in after.values():
        assert not probs[:, :, 0, :, 6:].any() and not probs[:, :, 1, :, 3:].any()  # a prompt, an empty one
        assert probs[:, :, 1, :, :2].any()
    with scheduler_of(tiny("sd1"), HeunDiscreteScheduler.from_config(tiny("sd1").scheduler.config)) as pipe:
        evaluations = []
        with interp.HookRegistry(pipe) as hooks:
            hooks.read("*mid_block*attn2:probs", lambda p, at: evaluations.append((at.step, at.evaluation)), steps=[0])
            pipe(A, num_inference_steps=2, height=16, width=16, output_type="latent")
        assert {*evaluations} == {(0, 0), (0, 1)}
        reads = []

        def watch(probs, at):
            reads.append((at.evaluation, bool(probs[:, :, :, positions("sd1", "red")].any())))

        traced("sd1", [interp.SetAttention(words="red", branch="cond"), interp.Edit(watch, "*mid_block*attn2:probs")])
        assert (0, False) in reads and (1, False) in reads


def test_specs_come_back():
    for change in (
        interp.ScaleAttention(words=("red", "{word}"), scale=2.0, layers=("*attn2",), heads=(0, 1), renormalise=True),
        interp.SetAttention(roles=("eos", "pad"), indices=(1, 2), value=0.1, branch="both", start=0.2),
        interp.AblateHeads("re:.*attn1", "uniform", heads=(3,), stop=5, unit="step"),
        interp.InjectAttention("run.zarr", "{row}", words=("red",), scale=0.5, mode="refine", condition="baseline"),
        *interp.prompt_to_prompt(words="red", scale=3.0),
    ):
        assert from_spec(change.spec()) == change and hash(from_spec(change.spec())) == hash(change)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_messages(tmp_path):
    def refused(match, *changes, name="sd1", prompts=(A, B), **more):
        with pytest.raises(interp.InterpError, match=match) as caught:
            interp.plan(
                tiny(name), list(prompts), steps=STEPS, guidance_scale=4.0, height=16, width=16, interventions=changes, **more
            )  # fmt: skip
        assert "\n" not in str(caught.value)

    refused("'green' is not in the prompt 'a red circle'", interp.ScaleAttention("green", scale=2.0))
    refused("positions 0–76", interp.SetAttention(indices=(77,)))
    refused("no head 4 in", interp.AblateHeads("cross", heads=(4,)))
    refused("matches no attention layer by 'attn9'", interp.AblateHeads("attn9"))
    refused("would have 1.5 together", interp.SetAttention(roles="bos", indices=(1, 2), value=0.5, renormalise=True))
    refused("does not run in the same batch", interp.InjectAttention("batch", row=0), batch_size=1)
    refused("refine", interp.InjectAttention("batch", row=0, mode="replace"), prompts=(A, LONGER))
    refused("both decide about", interp.InjectAttention("batch", row=0), interp.InjectAttention("batch", row=1))
    refused("both decide about 'cross_attention", interp.CacheCrossAttention(), interp.ScaleAttention("a", scale=2.0))
    refused("no layer with self-attention by", interp.InjectAttention("batch", row=0, part="self", layers="*attn2"))
    stored = traced("sd1", [], [A, B])
    refused(
        "did not capture 'unet.*Capture\\(attention='cross', heads='all', tokens='all'", interp.InjectAttention(stored)
    )
    some = traced("sd1", [], [A, B], interp.Capture(image=False))
    refused("has the heads 'mean' alone", interp.InjectAttention(some))
    part = traced("sd1", [], [A, B], interp.Capture(image=False, heads="all", tokens="all", steps=[0]))
    refused("did not capture step 1", interp.InjectAttention(part))
    words = traced("sd1", [], [A, B], interp.Capture(image=False, heads="all"))
    refused("holds the tokens 'prompt' alone", interp.InjectAttention(words))
    for bad, match in (
        (lambda: interp.ScaleAttention(scale=2.0), "names no token"),
        (lambda: interp.ScaleAttention("red", scale=-1), "a number from 0"),
        (lambda: interp.SetAttention(roles="pads"), "did you mean 'pad'"),
        (lambda: interp.SetAttention(words="red", value=2), "a probability"),
        (lambda: interp.AblateHeads("cross", "zeros"), "did you mean 'zero'"),
        (lambda: interp.InjectAttention("batch", part="text"), "part is"),
        (lambda: interp.InjectAttention("batch", scale=2.0), "which words"),
        (lambda: interp.InjectAttention("batch", part="self", words="red"), "about text"),
    ):
        with pytest.raises(interp.InterpError, match=match):
            bad()


def test_nothing_is_left_after_an_exception():
    pipe = tiny("sd1")
    base = traced("sd1", [], [A, B])

    def fail(probs, at):
        raise ZeroDivisionError

    with untouched(pipe), pytest.raises(ZeroDivisionError):
        traced("sd1", [*interp.prompt_to_prompt(), interp.Edit(fail, "*mid_block*attn2:probs", start=0.5)], [A, B])
    assert equal(traced("sd1", [], [A, B]), base)
    assert not [n for n in pipe.unet.state_dict() if "hook_probs" in n]
