"""Interventions equal an explicitly written sampling loop, to the last bit; their windows, claims and specs."""

from functools import cache

import numpy as np
import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

import interp
from interp.interventions import from_spec
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, sample, scheduler_of, states, tiny

STEPS = 5
SEEDS = [1, 2]
BARE = interp.Capture(attention=None, image=False)
A, B = "a red circle", "a dog on the blue square background"


def words_of(pipe, prompt):
    """Position of the first EOS: bos, the words' tokens, eos."""
    return 1 + len(pipe.tokenizer(prompt, add_special_tokens=False).input_ids)


def traced(pipe, *changes, prompts=A, steps=STEPS, scale=SCALE, capture=BARE, seeds=SEEDS, **more):
    return interp.trace(
        pipe, prompts, seeds=seeds, steps=steps, guidance_scale=scale, capture=capture, batch_size=2,
        interventions=changes, progress=False, **more,
    )  # fmt: skip


@cache
def unchanged(name="sd1", steps=STEPS):
    return traced(tiny(name), steps=steps)


def looped(pipe, *, prompt=A, steps=STEPS, **more):
    return sample(pipe, states(pipe, [prompt] * 2), states(pipe, [""] * 2), SEEDS, steps, SCALE, **more)


def same(run, want, first=slice(None)):
    """Bit-equal: latents, what was predicted (NaN where nothing was), final latents."""
    assert np.array_equal(run.latents.values, torch.stack(want.latents[first], 1).numpy())
    for branch in ("cond", "uncond"):
        stored = run.noise_pred.sel(branch=branch).values
        assert np.array_equal(stored, torch.stack(want.eps[branch][first], 1).numpy(), equal_nan=True)
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    return True


# Removing a branch ----------------------------------------------------------------------------------------------------

REMOVE = {"uncond": interp.RemoveText, "cond": interp.RemoveGuidance}
WINDOWS = [
    ({"start": 0.6}, {3, 4}),
    ({"stop": 0.2}, {0}),
    ({}, {0, 1, 2, 3, 4}),
    ({"start": 1, "stop": 3, "unit": "step"}, {1, 2}),
    ({"start": 1, "unit": "step"}, {1, 2, 3, 4}),
    ({"start": 0, "stop": 1}, {0, 1, 2, 3, 4}),
    ({"start": 600.0, "stop": 201.0, "unit": "timestep"}, {2}),
]


@pytest.mark.parametrize(("window", "steps"), WINDOWS, ids=str)
@pytest.mark.parametrize("kept", ["uncond", "cond"])
def test_removing_a_branch_equals_a_loop_that_runs_one(kept, window, steps):
    pipe = tiny("sd1")
    with untouched(pipe):
        run = traced(pipe, REMOVE[kept](**window))
    want = looped(pipe, keep=lambda i: (kept,) if i in steps else ("uncond", "cond"))
    assert same(run, want)
    other = "cond" if kept == "uncond" else "uncond"
    assert run.nfe.sel(branch=kept).values.tolist() == [STEPS] * 2
    assert run.nfe.sel(branch=other).values.tolist() == [STEPS - len(steps)] * 2
    applied = [{"uncond": 0.0, "cond": 1.0}[kept] if i in steps else SCALE for i in range(STEPS)]
    assert run.trajectory.guidance_scale.values.tolist() == [applied] * 2


def test_the_rows_really_leave_the_batch():
    pipe, rows = tiny("sd1"), []
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    try:
        traced(pipe, interp.RemoveText(start=0.4))
    finally:
        handle.remove()
    assert rows == [4, 4, 2, 2, 2]


def test_removing_a_branch_on_sdxl():
    """XL has more inputs with rows (pooled states, sizes). The reference runs one branch through the pipeline itself."""
    pipe = tiny("sdxl")
    with untouched(pipe):
        run = traced(pipe, interp.RemoveGuidance(), steps=3)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    want = pipe([A] * 2, num_inference_steps=3, guidance_scale=1.0, generator=generators, output_type="latent").images
    assert np.array_equal(run.final_latents.values, want.numpy())
    zeros, pooled = torch.zeros(2, 77, 64), torch.zeros(2, 32)
    ids = torch.tensor([[16, 16, 0, 0, 16, 16.0]] * 2)
    added = {b: {"text_embeds": pooled, "time_ids": ids} for b in ("cond", "uncond")}
    want = sample(pipe, zeros, zeros, SEEDS, 3, keep=lambda i: ("uncond",), added=added)
    run = traced(pipe, interp.RemoveText(), steps=3)
    assert np.array_equal(run.final_latents.values, want.final.numpy())


def test_removing_a_branch_with_two_evaluations_a_step():
    with scheduler_of(tiny("sd1"), HeunDiscreteScheduler.from_config(tiny("sd1").scheduler.config)) as pipe:
        run = traced(pipe, interp.RemoveText(start=3, unit="step"), steps=4)
        # calls 0 1 | 2 3 | 4 5 | 6: the window is of steps, not of calls
        want = looped(pipe, steps=4, keep=lambda i: ("uncond",) if i >= 6 else ("uncond", "cond"))
        assert same(run, want, slice(None, None, 2))
        assert run.nfe.values.tolist() == [[6, 7]] * 2


def test_attention_of_a_branch_that_was_removed_is_nan():
    capture = interp.Capture(branches=("cond", "uncond"), image=False, sites=("unet.mid_block:out",))
    run = traced(tiny("sd1"), interp.RemoveText(start=0.6), capture=capture)
    base = traced(tiny("sd1"), capture=capture)
    for got, plain in ((run.attention("4x4"), base.attention("4x4")),
                       (run.tree["sites/unet.mid_block"]["value"], base.tree["sites/unet.mid_block"]["value"])):  # fmt: skip
        assert np.isnan(got.isel(step=slice(3, None)).sel(branch="cond").values).all()
        kept = got.isel(step=slice(3, None)).sel(branch="uncond")
        assert not np.isnan(kept.values[:, :, :, :, :5] if "token" in got.dims else kept.values).any()
        early = slice(0, 3)
        assert np.array_equal(got.isel(step=early).values, plain.isel(step=early).values, equal_nan=True)


def test_guided_again_after_the_window():
    pipe = tiny("sd1")
    run = traced(pipe, interp.RemoveText(stop=0.2), interp.RemoveGuidance(start=0.8))
    want = looped(pipe, keep=lambda i: {0: ("uncond",), 4: ("cond",)}.get(i, ("uncond", "cond")))
    assert same(run, want)
    assert run.nfe.values.tolist() == [[4, 4]] * 2


# Exchanging text ------------------------------------------------------------------------------------------------------


def swapped(pipe, align):
    """[BOS] + A + [EOS]_B by hand: states (token, feature) of A with B's run of EOS."""
    (a, b), (m, n) = states(pipe, [A, B]), (words_of(pipe, A), words_of(pipe, B))
    assert m != n
    if align == "position":
        start = max(m, n)
        return torch.cat([a[:start], b[start:]])
    tail = b[n:]
    if len(tail) < 77 - m:
        tail = torch.cat([tail, tail[-1:].expand(77 - m - len(tail), -1)])
    return torch.cat([a[:m], tail[: 77 - m]])


@pytest.mark.parametrize("align", ["first_eos", "position"])
@pytest.mark.parametrize(("window", "steps"), [({}, range(STEPS)), ({"start": 0.4, "stop": 0.8}, (2, 3))], ids=str)
def test_replace_eos_equals_edited_embeddings(align, window, steps):
    pipe = tiny("sd1")
    edited = torch.stack([swapped(pipe, align)] * 2)
    with untouched(pipe):
        run = traced(pipe, interp.ReplaceEOS(B, align=align, **window))
    assert same(run, looped(pipe, text=lambda i, c: edited if i in steps else c))
    assert not np.array_equal(run.final_latents.values, unchanged().final_latents.values)


def test_a_longer_prompt_receives_a_shorter_ones_eos():
    pipe = tiny("sd1")
    run = traced(pipe, interp.ReplaceEOS(A), prompts=B)
    (b, a), (n, m) = states(pipe, [B, A]), (words_of(pipe, B), words_of(pipe, A))
    edited = torch.stack([torch.cat([b[:n], a[m:][: 77 - n]])] * 2)
    assert same(run, looped(pipe, prompt=B, text=lambda i, c: edited))


def test_replace_prompt_equals_the_other_prompt():
    pipe = tiny("sd1")
    other = states(pipe, [B] * 2)
    run = traced(pipe, interp.ReplacePrompt(B, start=0.6))
    assert same(run, looped(pipe, text=lambda i, c: other if i >= 3 else c))
    assert np.array_equal(
        traced(pipe, interp.ReplacePrompt(B)).final_latents.values, traced(pipe, prompts=B).final_latents.values
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", interp.ReplaceEOS),
        ("sd2", interp.ReplaceEOS),
        ("sdxl", interp.ReplaceEOS),
        ("sdxl", interp.ReplacePrompt),
    ],
)
def test_the_same_prompt_changes_nothing(name, kind):
    pipe, base = tiny(name), unchanged(name, 2)
    for change in (kind(A), kind(A, layers="*"), kind("{prompt}", side="v")):
        assert np.array_equal(traced(pipe, change, steps=2).final_latents.values, base.final_latents.values), change


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", [interp.ReplaceEOS, interp.ReplacePrompt])
def test_all_layers_equal_the_whole_prompt(name, kind):
    pipe = tiny(name)
    whole, layers = (traced(pipe, change, steps=2) for change in (kind(B), kind(B, layers="*")))
    assert np.array_equal(whole.final_latents.values, layers.final_latents.values)
    assert not np.array_equal(whole.final_latents.values, unchanged(name, 2).final_latents.values)


def test_replace_prompt_on_sdxl_equals_the_other_prompt():
    pipe = tiny("sdxl")
    run, other = traced(pipe, interp.ReplacePrompt(B), steps=3), traced(pipe, prompts=B, steps=3)
    assert np.array_equal(run.final_latents.values, other.final_latents.values)
    kept = traced(pipe, interp.ReplacePrompt(B, pooled="keep"), steps=3)
    assert not np.array_equal(kept.final_latents.values, run.final_latents.values)


@pytest.mark.parametrize("side", ["k", "v"])
def test_one_side_equals_hooks_on_the_projection(side):
    """Keys (or values) alone read the other prompt: the same done by hand with plain torch hooks on the modules."""
    pipe = tiny("sd1")
    site = "mid_block.attentions.0.transformer_blocks.0.attn2"
    run = traced(pipe, interp.ReplacePrompt(B, side=side, layers=f"unet.{site}"))
    other = states(pipe, [B] * 2)
    module = getattr(pipe.unet.get_submodule(site), f"to_{side}")
    handle = module.register_forward_pre_hook(lambda m, args: (torch.cat([args[0][:2], other]),))
    try:
        want = looped(pipe)
    finally:
        handle.remove()
    assert same(run, want)
    both = traced(pipe, interp.ReplacePrompt(B, layers=f"unet.{site}"))
    assert not np.array_equal(run.final_latents.values, both.final_latents.values)


def test_one_side_in_all_layers_differs_from_the_other():
    pipe = tiny("sd1")
    runs = [traced(pipe, interp.ReplacePrompt(B, side=s), steps=2).final_latents.values for s in ("k", "v", "kv")]
    assert not any(np.array_equal(runs[i], runs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_columns_fill_the_prompt_sample_by_sample():
    pipe = tiny("sd1")
    table = [{"prompt": A, "target": B}, {"prompt": B, "target": "a cat"}]
    run = traced(pipe, interp.ReplacePrompt("{target}"), prompts=table, seeds=[7])
    want = traced(pipe, prompts=[B, "a cat"], seeds=[7])
    assert np.array_equal(run.final_latents.values, want.final_latents.values)
    assert list(run.samples["target"]) == [B, "a cat"]


def test_text_and_branch_together():
    """Two interventions of different claims: the text is exchanged, then removed."""
    pipe = tiny("sd1")
    run = traced(pipe, interp.ReplacePrompt(B), interp.RemoveText(start=0.6))
    other = states(pipe, [B] * 2)
    want = looped(pipe, text=lambda i, c: other, keep=lambda i: ("uncond",) if i >= 3 else ("uncond", "cond"))
    assert same(run, want)


# Windows, claims, specs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    interp.RemoveText(start=1.0), interp.RemoveGuidance(start=0.5, stop=0.5), interp.ReplaceEOS(B, start=1.0),
    interp.ReplacePrompt(B, start=2, stop=2, unit="step", layers="*"), interp.ReplacePrompt(B, stop=0.0, side="k"),
], ids=repr)  # fmt: skip
def test_an_empty_window_changes_nothing(change):
    run, base = traced(tiny("sd1"), change), unchanged()
    assert np.array_equal(run.latents.values, base.latents.values)
    assert np.array_equal(run.final_latents.values, base.final_latents.values)
    assert np.array_equal(run.nfe.values, base.nfe.values)


def test_windows_name_the_same_steps_in_every_unit():
    scheduler = EulerDiscreteScheduler.from_config(tiny("sd1").scheduler.config, timestep_spacing="leading")
    with scheduler_of(tiny("sd1"), scheduler) as pipe:
        times = interp.plan(pipe, A, steps=8).timeline
    sigma, time = times.sigma, times.timestep

    def steps(**window):
        return sorted(interp.RemoveText(**window).steps(times))

    for a in range(8):
        for b in range(a, 9):
            want = list(range(a, b))
            assert steps(start=a, stop=b, unit="step") == want
            assert steps(start=a / 8, stop=b / 8) == want
            if a < b:
                edge = {"stop": float(sigma[b])} if b < 8 else {}
                assert steps(start=float(sigma[a]), unit="sigma", **edge) == want
                edge = {"stop": float(time[b])} if b < 8 else {}
                assert steps(start=float(time[a]), unit="timestep", **edge) == want
    assert steps(start=1, stop=1) == [] and steps(start=1, stop=2, unit="step") == [1]  # never by int or float
    assert steps(start=1.0, stop=2.0, unit="step") == [1]
    assert steps(start=0.1) == list(range(1, 8))  # half-open: a step that begins before the window is outside


def test_fractions_do_not_drift():
    """Every a/n of n steps is step a, whatever floating point makes of it."""
    from interp.clock import Timeline

    for n in (3, 7, 10, 25, 30, 49, 50, 100):
        times = Timeline(*[np.arange(n, 0, -1.0)] * 5)
        for a in range(n + 1):
            assert min(interp.RemoveText(start=a / n).steps(times), default=n) == a


ALL = [
    interp.RemoveText(start=0.6), interp.RemoveGuidance(start=30, stop=40, unit="step"),
    interp.ReplaceEOS("{target}", side="v", align="position", layers=("*mid*", "*up*"), pooled="keep"),
    interp.ReplacePrompt(B, start=14.0, stop=2.5, unit="sigma"), interp.ReplacePrompt(B, start=1.0, unit="step"),
]  # fmt: skip


@pytest.mark.parametrize("change", ALL, ids=repr)
def test_round_trip_through_yaml(change):
    text = yaml.safe_dump(change.spec())
    again = from_spec(yaml.safe_load(text))
    assert again == change and type(again) is type(change) and hash(again) == hash(change)
    assert again.spec() == change.spec()
    assert eval(repr(change), {k: getattr(interp, k) for k in interp.__all__ if k[0] == "R"}) == change


def test_specs_are_written_into_the_run():
    pipe = tiny("sd1")
    run = traced(pipe, ALL[0], interp.ReplaceEOS(B, stop=0.4), steps=2)
    (specs,) = run.attrs["conditions"].values()
    assert [from_spec(s) for s in specs] == [ALL[0], interp.ReplaceEOS(B, stop=0.4)]


def test_two_owners_of_the_same_thing_are_refused():
    pipe = tiny("sd1")
    for pair in (
        (interp.RemoveText(start=0.4), interp.RemoveGuidance(start=0.8)),
        (interp.ReplaceEOS(A), interp.ReplacePrompt(B)),
        (interp.ReplaceEOS(A, stop=0.6), interp.ReplaceEOS(B, start=0.4)),
    ):
        with pytest.raises(interp.InterpError, match="both decide about"):
            traced(pipe, *pair)
    assert len(traced(pipe, interp.RemoveText(stop=0.4), interp.RemoveGuidance(start=0.4), steps=5)) == 2


def test_frozen():
    with pytest.raises(AttributeError):
        interp.RemoveText(start=0.1).start = 0.2
