"""Patch, Steer, Ablate and AddNoise equal plain torch hooks, to the last bit; their parts, sources and sentences."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

import interp
from interp.interventions import from_spec, steering_vector
from tests.interp.leftovers import untouched
from tests.interp.reference import sample, scheduler_of, states, tiny

STEPS, SCALE, SEEDS = 3, 5.0, [1, 2]
BARE = interp.Capture(attention=None, image=False)
A, B = "a red circle", "a dog on the blue square background"
MID = "unet.mid_block:out"  # (channel, y, x) 32×4×4
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0.attn2:out"  # (position, channel) 16×32
KEYS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k:out"  # (text position, channel) 77×32
SITES = (MID, BLOCK, KEYS)


def traced(pipe, *changes, prompts=A, capture=BARE, steps=STEPS, seeds=SEEDS, **more):
    return interp.trace(
        pipe, prompts, seeds=seeds, steps=steps, guidance_scale=SCALE, capture=capture, batch_size=2,
        interventions=changes, progress=False, **more,
    )  # fmt: skip


def looped(pipe, prompts=(A, A), seeds=SEEDS):
    return sample(pipe, states(pipe, list(prompts)), states(pipe, ["", ""]), seeds, STEPS, SCALE)


@contextmanager
def hooked(pipe, site, edit, steps=range(STEPS)):
    """A plain torch hook: `edit(cond rows (sample, …), call)` replaces the rows with text, which come second."""
    calls = iter(range(1000))

    def hook(module, args, out):
        call = next(calls)
        half = len(out) // 2
        return torch.cat([out[:half], edit(out[half:], call)]) if call in steps else None

    handle = pipe.unet.get_submodule(site.removeprefix("unet.").removesuffix(":out")).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@cache
def source(prompt=B):
    """A run of another prompt that captured the sites in both branches."""
    capture = interp.Capture(attention=None, image=False, sites=SITES, branches=("cond", "uncond"))
    return traced(tiny("sd1"), prompts=prompt, capture=capture)


@cache
def baseline(prompt=A):
    return traced(tiny("sd1"), prompts=prompt)


def kept(site, prompt=B):
    """What passes at a site for another prompt, by a plain hook: one tensor (sample, …) a call, rows with text."""
    pipe, seen = tiny("sd1"), []
    with hooked(pipe, site, lambda x, call: seen.append(x.clone()) or x):
        looped(pipe, (prompt, prompt))
    return seen


def same(run, want):
    assert np.array_equal(run.latents.values, torch.stack(want.latents, 1).numpy())
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    return True


def changed(run, base=None):
    return not np.array_equal(run.final_latents.values, (base or baseline()).final_latents.values)


# Patch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("window", "steps"), [({}, range(STEPS)), ({"start": 1, "stop": 2, "unit": "step"}, [1])])
def test_a_patch_equals_a_hook_that_puts_the_stored_tensor(site, window, steps):
    pipe, there = tiny("sd1"), kept(site)
    with untouched(pipe):
        run = traced(pipe, interp.Patch(source(), site, **window))
    with hooked(pipe, site, lambda x, call: there[call], steps):
        assert same(run, looped(pipe))
    assert changed(run)


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
def test_a_patch_from_itself_changes_nothing(branch):
    pipe = tiny("sd1")
    changes = [interp.Patch(source(A), site, branch=branch) for site in SITES]
    changes += [
        interp.Patch("batch", "*.resnets.1:out", branch=branch),
        interp.Patch("batch", "unet.conv_in:in", row=0),
    ]
    run = traced(pipe, *changes)
    assert not changed(run)
    assert np.array_equal(run.noise_pred.values, baseline().noise_pred.values)


def test_a_patch_of_the_other_branch():
    pipe = tiny("sd1")
    first = {"stop": 1, "unit": "step"}  # when the noise is the same, and so is the branch without text
    assert not changed(traced(pipe, interp.Patch(source(), MID, branch="uncond", **first)))
    assert changed(traced(pipe, interp.Patch(source(), MID, branch="both", **first)))
    assert changed(traced(pipe, interp.Patch(source(), MID, branch="uncond")))


def test_a_fixed_step_and_one_sample_for_all():
    pipe, there = tiny("sd1"), kept(MID)
    number = int(source().samples.index[1])
    run = traced(pipe, interp.Patch(source(), MID, sample=number, source_step=2))
    with hooked(pipe, MID, lambda x, call: there[2][[1, 1]]):
        assert same(run, looped(pipe))


def test_parts_equal_slices(tmp_path):
    """Channels, a part of the picture (both layouts), tokens of the text: torch slices of a plain hook."""
    pipe = tiny("sd1")
    mid, block, keys = (kept(site) for site in SITES)

    def put(new, index):
        def edit(x, call):
            x = x.clone()
            x[index] = new[call][index]
            return x

        return edit

    def grid(x):
        return x.unflatten(1, (4, 4))

    def block_region(x, call):
        x = grid(x).clone()
        x[:, 2:, :2] = grid(block[call])[:, 2:, :2]
        return x.flatten(1, 2)

    # a mask of 8×8 for 4×4 cells: two corners of four quarters each, a cell of which half lies inside, one with a quarter
    mask = np.zeros((8, 8))
    mask[:2, :2] = mask[4:, 6:] = mask[2, 4:6] = mask[7, 1] = 1
    np.save(tmp_path / "mask.npy", mask)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[0, 0] = inside[1, 2] = True
    inside[2:, 3] = True

    def within(x, new):
        return torch.where(inside, new, x)

    every = slice(None)
    cases = [
        (interp.Patch(source(), MID, mask=mask), MID, lambda x, call: within(x, mid[call])),
        (
            interp.Patch(source(), BLOCK, mask=str(tmp_path / "mask.npy"), region=(0, 0, 1, 0.5)),
            BLOCK,
            lambda x, call: torch.where((inside & (torch.arange(4) < 2)).flatten()[:, None], block[call], x),
        ),
        (interp.Steer(MID, [0.5] * 32, mask=mask.astype(bool).tolist()), MID, lambda x, call: within(x, x + 0.5)),
        (interp.Patch(source(), MID, channels=(0, 5)), MID, put(mid, (every, [0, 5]))),
        (interp.Patch(source(), BLOCK, channels=3), BLOCK, put(block, (every, every, [3]))),
        (
            interp.Patch(source(), MID, region=(0, 0.5, 0.25, 1)),
            MID,
            put(mid, (every, every, slice(0, 1), slice(2, 4))),
        ),
        (interp.Patch(source(), BLOCK, region=(0.5, 0, 1, 0.5)), BLOCK, block_region),
        (interp.Patch(source(), KEYS, tokens=("red", "eos", 0)), KEYS, put(keys, (every, [0, 2, 4]))),
        (interp.Patch(source(), KEYS, tokens="pad", channels=1), KEYS, put(keys, (every, slice(5, None), [1]))),
    ]
    for change, site, edit in cases:
        run = traced(pipe, change)
        with hooked(pipe, site, edit):
            assert same(run, looped(pipe)), change
        assert changed(run), change


def test_a_live_sample_of_the_same_batch():
    """Row 0 receives row 1's activation as it passes; row 1 its own: the hook indexes the rows."""
    pipe = tiny("sd1")
    table = [{"prompt": A, "donor": 1}, {"prompt": B, "donor": 1}]
    run = traced(pipe, interp.Patch("batch", MID, row="{donor}"), prompts=table, seeds=[1])
    with hooked(pipe, MID, lambda x, call: x[[1, 1]]):
        assert same(run, looped(pipe, (A, B), [1, 1]))
    with pytest.raises(interp.InterpError, match="does not run in the same batch"):
        interp.plan(pipe, table, steps=STEPS, batch_size=1, interventions=[interp.Patch("batch", MID, row="{donor}")])


def test_rows_of_a_stored_run_and_its_conditions():
    pipe = tiny("sd1")
    capture = interp.Capture(attention=None, image=False, sites=(MID,))
    there = interp.trace(
        pipe, [A, B], seeds=SEEDS, steps=STEPS, guidance_scale=SCALE, capture=capture, batch_size=2, progress=False,
        conditions={"x": [], "y": [interp.Ablate(BLOCK)]},
    )  # fmt: skip
    base = traced(pipe, interp.Patch(source(), MID))
    assert not changed(traced(pipe, interp.Patch(there, MID, condition="x", row=1)), base)
    assert not changed(traced(pipe, interp.Patch(there.condition("x"), MID, row=1)), base)
    assert changed(traced(pipe, interp.Patch(there, MID, condition="y", row=1)), base)
    for change, said in (
        (interp.Patch(there, MID), "say condition="),
        (interp.Patch(there, MID, condition="z"), "no condition 'z'"),
        (interp.Patch(there, MID, condition="x", row=7), "no sample of prompt row 7 with seed 1"),
        (interp.Patch(there, MID, sample=99), "no sample 99"),
        (interp.Patch(there, BLOCK, condition="x"), "did not capture .* it captured 'unet.mid_block:out'"),
        (interp.Patch(there, MID, condition="x", branch="uncond"), "captured .* in the branch 'cond' alone"),
        (interp.Patch(there, MID, condition="x", source_step=3), "did not capture .* in step 3"),
        (interp.Patch("nowhere.zarr", MID), "nowhere.zarr"),
    ):
        with pytest.raises(interp.InterpError, match=said):
            traced(pipe, change)
    with pytest.raises(interp.InterpError, match="step 0 of the source is at timestep"):
        traced(pipe, interp.Patch(there, MID, condition="x"), steps=2)


def test_heun_keeps_first_evaluations():
    with scheduler_of(tiny("sd1"), HeunDiscreteScheduler.from_config(tiny("sd1").scheduler.config)) as pipe:
        capture = interp.Capture(attention=None, image=False, sites=(MID,))
        base = traced(pipe, capture=capture)
        assert not changed(traced(pipe, interp.Patch(base, MID)), base)


# In the text encoder: causal tracing ----------------------------------------------------------------------------------

EMBEDDED, LAYER = "text_encoder.embeddings:out", "text_encoder.encoder.layers.{}:out"


def test_corrupting_and_restoring_in_the_text_encoder():
    pipe, base = tiny("sd1"), baseline()
    clean = source(A)
    noise = interp.AddNoise(EMBEDDED, scale=3.0, tokens=("red",))
    with untouched(pipe):
        corrupted = traced(pipe, noise)
    assert changed(corrupted)
    # only the branch with text is corrupted
    first = slice(0, 1)
    for branch, equal in (("cond", False), ("uncond", True)):
        one, other = (r.noise_pred.isel(step=first).sel(branch=branch).values for r in (corrupted, base))
        assert np.array_equal(one, other) == equal
    # the state after the last layer is all that the denoiser reads: restoring it brings the very picture back
    assert not changed(traced(pipe, noise, interp.Patch(clean, LAYER.format(1))))
    # one token of the embeddings was changed: restoring it there does too, and restoring another does not
    assert not changed(traced(pipe, noise, interp.Patch(clean, EMBEDDED, tokens=("red",))))
    assert not changed(traced(pipe, noise, interp.Patch(clean, EMBEDDED, tokens=("circle",))), corrupted)
    # a layer's own state at the last token alone restores something, not all
    some = traced(pipe, noise, interp.Patch(clean, LAYER.format(0), tokens=("red",)))
    assert changed(some) and changed(some, corrupted)


def test_noise_is_a_samples_own():
    """The noise depends on seed, prompt row, seed of the sample and site, not on the batch; and has its scale."""
    pipe, seen = tiny("sd1"), []
    handle = pipe.text_encoder.embeddings.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    noise = interp.AddNoise(EMBEDDED, scale=2.0)
    try:
        together = traced(pipe, noise)
    finally:
        handle.remove()
    plain, negative = seen[:2]
    module, passed = pipe.text_encoder.encoder.layers[0], []
    handle = module.register_forward_pre_hook(lambda m, args: passed.append(args[0].clone()))
    try:
        alone = interp.trace(
            pipe, A, seeds=[2], steps=STEPS, guidance_scale=SCALE, capture=BARE, interventions=[noise], progress=False
        )
        other = traced(pipe, interp.AddNoise(EMBEDDED, scale=2.0, seed=1))
    finally:
        handle.remove()
    added = passed[0] - plain[:1]
    assert abs(float(added.std() / plain[0].std()) - 2) < 0.1
    assert np.allclose(alone.final_latents.values[0], together.final_latents.values[1], atol=1e-4)
    assert changed(other, together)
    assert torch.equal(passed[1], negative[:1])


def test_a_window_has_no_meaning_in_a_text_encoder():
    pipe = tiny("sd1")
    for change in (
        interp.AddNoise(EMBEDDED, start=0.5),
        interp.Patch(source(), EMBEDDED, stop=0.5),
        interp.Edit(lambda x, at: x * 0, EMBEDDED, stop=0.5),
    ):
        with pytest.raises(interp.InterpError, match="a window has no meaning"):
            traced(pipe, change)
    with pytest.raises(interp.InterpError, match="must be 'cond'"):
        traced(pipe, interp.Patch(source(), EMBEDDED, branch="uncond"))


def test_an_edit_of_a_text_encoder_leaves_other_interventions_prompts_alone():
    pipe = tiny("sd1")
    zero = interp.Edit(lambda x, at: torch.zeros_like(x), EMBEDDED)
    assert changed(traced(pipe, zero))
    whole = traced(pipe, zero, interp.ReplacePrompt(B))
    uncond = whole.noise_pred.sel(branch="uncond").values
    other = traced(pipe, interp.ReplacePrompt(B))
    assert np.array_equal(
        whole.noise_pred.isel(step=0).sel(branch="cond").values, other.noise_pred.isel(step=0).sel(branch="cond").values
    )
    assert not np.array_equal(uncond, other.noise_pred.sel(branch="uncond").values)


# Ablate, Steer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_zeros_and_means_equal_hooks(site):
    pipe = tiny("sd1")
    dims = (2, 3) if site == MID else (1,)
    there = kept(site)
    for change, edit in (
        (interp.Ablate(site), lambda x, call: torch.zeros_like(x)),
        (interp.Ablate(site, "mean"), lambda x, call: x.mean(dims, keepdim=True).expand_as(x)),
        (interp.Ablate(site, "mean", source()), lambda x, call: there[call].mean(0, keepdim=True).expand_as(x)),
    ):
        run = traced(pipe, change)
        with hooked(pipe, site, edit):
            assert same(run, looped(pipe))
        assert changed(run)


def test_steering_equals_a_hook(tmp_path):
    pipe = tiny("sd1")
    vector = torch.linspace(-1, 1, 32)
    whole = torch.randn(32, 4, 4, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "whole.npy", whole.numpy())
    from safetensors.torch import save_file

    save_file({"v": vector}, tmp_path / "v.safetensors")
    column = vector.reshape(-1, 1, 1)
    for change, site, edit in (
        (interp.Steer(MID, vector, 3.0), MID, lambda x, call: x + 3.0 * column),
        (interp.Steer(MID, tmp_path / "v.safetensors", 3), MID, lambda x, call: x + 3.0 * column),
        (interp.Steer(MID, str(tmp_path / "whole.npy"), -2.0), MID, lambda x, call: x + -2.0 * whole),
        (interp.Steer(BLOCK, vector.tolist()), BLOCK, lambda x, call: x + 1.0 * vector),
    ):
        run = traced(pipe, change)
        with hooked(pipe, site, edit):
            assert same(run, looped(pipe)), change
        assert changed(run)
    assert not changed(traced(pipe, interp.Steer(MID, vector, 0.0), interp.AddNoise(MID, scale=0)))


def test_steering_adds_up_and_both_branches():
    pipe = tiny("sd1")
    vector = np.full(32, 0.5)
    twice = traced(pipe, *[interp.Steer(MID, vector, 2.0)] * 2)
    with hooked(pipe, MID, lambda x, call: x + 1.0 + 1.0):
        assert same(twice, looped(pipe))
    both = traced(pipe, interp.Steer(MID, vector, 2.0, branch="both"))
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: out + 1.0)
    try:
        assert same(both, looped(pipe))
    finally:
        handle.remove()


def test_a_steering_vector_is_a_difference_of_means():
    run = interp.trace(
        tiny("sd1"), [A, B], seeds=SEEDS, steps=2, progress=False,
        capture=interp.Capture(attention=None, image=False, sites=(MID, BLOCK)),
    )  # fmt: skip
    for site, axes in ((MID, (0, 1, 3, 4)), (BLOCK, (0, 1, 2))):
        value = run.site(site).sel(branch="cond").values.astype(float)
        want = value[2:].mean(axes) - value[:2].mean(axes)
        assert np.allclose(steering_vector(run, site, positive=[2, 3], negative=[0, 1]), want, atol=1e-12)
    with pytest.raises(interp.InterpError, match="not in 'uncond'"):
        steering_vector(run, MID, positive=[0], negative=[1], branch="uncond")


# Sentences, claims, specs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "said"), [
    (lambda: interp.Ablate("unet.mid_blok:out"), "no site matches"),
    (lambda: interp.Ablate(BLOCK.replace(":out", ":probs")), "AblateHeads"),
    (lambda: interp.Ablate(MID, "median"), "'zero' or 'mean'"),
    (lambda: interp.Ablate(MID, branch="text"), "branch is"),
    (lambda: interp.Ablate(MID, region=(0, 0, 2, 1)), r"Ablate\(region"),
    (lambda: interp.Ablate(MID, channels=(40,)), "no channel 40"),
    (lambda: interp.Ablate(MID, tokens=("red",)), "not the 77 positions of the text"),
    (lambda: interp.Ablate(KEYS, region=(0, 0, 1, 0.5)), "no picture"),
    (lambda: interp.Ablate(KEYS, tokens=("green",)), "'green' is not in the prompt 'a red circle'"),
    (lambda: interp.Ablate(KEYS, tokens=("red",), branch="both"), "need branch='cond'"),
    (lambda: interp.Ablate("unet.time_embedding:out", "mean"), "no positions"),
    (lambda: interp.Ablate(MID, source="x.zarr"), "value='mean'"),
    (lambda: interp.Steer(MID, [1.0, 2.0]), r"shape \(2,\), where 32 channels pass"),
    (lambda: interp.Steer(MID, "v.pt"), "ends in .npy or .safetensors"),
    (lambda: interp.Steer(MID, "v.npy"), "there is no file"),
    (lambda: interp.Steer(MID, [[1.0]]), "one a channel"),
    (lambda: interp.AddNoise(MID, scale=-1), "at least 0"),
    (lambda: interp.Patch(3, MID), "not a int"),
    (lambda: interp.Patch("batch", MID, row="{nobody}"), "'nobody'"),
    (lambda: interp.Patch("batch", MID, sample=0), "choose by row="),
])  # fmt: skip
def test_one_sentence(change, said, tmp_path):
    store = tmp_path / "run.zarr"
    with pytest.raises(interp.InterpError, match=said) as error:
        traced(tiny("sd1"), change(), store=store)
    assert "\n" not in str(error.value) and not store.exists()  # before anything ran


def test_a_pickle_is_never_read(tmp_path):
    path = tmp_path / "v.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(interp.InterpError, match="cannot be read as numbers"):
        traced(tiny("sd1"), interp.Steer(MID, path))


def test_owners_of_one_part_of_a_site():
    plan = lambda *c: interp.plan(tiny("sd1"), A, steps=STEPS, interventions=c)  # noqa: E731
    for pair in (
        (interp.Ablate(MID), interp.Ablate(MID, "mean")),
        (interp.Ablate(MID, branch="both"), interp.Ablate("unet.mid_block")),
        (interp.Ablate(MID), interp.Ablate(MID, channels=(1,), start=0.5)),
        (interp.Patch("batch", MID), interp.Ablate(MID)),
    ):
        with pytest.raises(interp.InterpError, match=r"both decide about 'site unet\.mid_block:out"):
            plan(*pair)
    plan(interp.Ablate(MID, stop=0.5), interp.Ablate(MID, start=0.5))
    plan(interp.Ablate(MID), interp.Ablate(MID, branch="uncond"))
    plan(interp.Ablate(MID, channels=0), interp.Ablate(MID, channels=1))
    plan(interp.Ablate(MID), interp.Steer(MID, [0.0] * 32), interp.AddNoise(MID), interp.Steer(MID, [0.0] * 32))


def test_order_is_that_of_the_list():
    pipe = tiny("sd1")
    steer = interp.Steer(MID, [1.0] * 32)
    first, last = traced(pipe, steer, interp.Ablate(MID)), traced(pipe, interp.Ablate(MID), steer)
    assert not changed(first, traced(pipe, interp.Ablate(MID)))
    with hooked(pipe, MID, lambda x, call: torch.ones_like(x)):
        assert same(last, looped(pipe))
    twice = interp.Edit(lambda x, at: x * 2 if at.branch == "cond" else None, MID)
    run, other = traced(pipe, steer, twice), traced(pipe, twice, steer)
    with hooked(pipe, MID, lambda x, call: (x + 1) * 2):
        assert same(run, looped(pipe))
    with hooked(pipe, MID, lambda x, call: x * 2 + 1):
        assert same(other, looped(pipe))


def test_a_source_on_disk_is_a_path_and_one_in_memory_is_said_so(tmp_path):
    pipe, path = tiny("sd1"), tmp_path / "there.zarr"
    capture = interp.Capture(attention=None, image=False, sites=(MID,))
    there = traced(pipe, prompts=B, capture=capture, store=path)
    patch = interp.Patch(there, MID, start=0.5)
    assert patch.source == str(path) and from_spec(patch.spec()) == patch
    assert not changed(traced(pipe, patch), traced(pipe, interp.Patch(source(), MID, start=0.5)))
    memory = interp.Patch(source(), MID)
    assert repr(memory) == "Patch(source=<a run in memory of 2 samples>, site='unet.mid_block:out')"
    assert memory.spec()["serialisable"] is False and "in memory" in memory.spec()["source"]
    run = traced(pipe, memory)
    with pytest.raises(interp.InterpError, match="edit in Python"):
        from_spec(run.attrs["conditions"]["intervened"][0])


def test_a_sample_that_left_the_call():
    """Rows leave sample by sample: what belongs to a sample follows it."""
    pipe, changes = (
        tiny("sd1"),
        [interp.Patch(source(), MID), interp.AddNoise(BLOCK), interp.Ablate(KEYS, tokens=("red",))],
    )
    whole = traced(pipe, *changes)

    @dataclass(frozen=True)
    class LeaveFirst(interp.Intervention):
        name: ClassVar[str] = "leave_first"
        serialisable: ClassVar[bool] = False

        def spec(self):
            return self.written({})

        def attach(self, hooks, batch):
            hooks.on_call(lambda call: call.leave.update({"cond": frozenset({0})}))

    left = traced(pipe, *changes, LeaveFirst())
    assert np.allclose(left.final_latents.values[1], whole.final_latents.values[1], atol=1e-3)
    assert np.isnan(left.noise_pred.sel(branch="cond").values[0]).all() and changed(left, whole)
