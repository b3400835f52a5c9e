"""Branch policies equal an explicitly written sampling loop; rows that are skipped are not computed, sample by sample."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.models.attention_processor import Attention

import interp
from interp.interventions import from_spec
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, sample, scheduler_of, states, tiny

STEPS, SEEDS, A, NEGATIVE = 5, [1, 2], "a red circle", "a green cat"
BARE = interp.Capture(attention=None, image=False)
SHORT = {"max_sequence_length": 16}
FAMILIES = {
    "sd1": {},
    "sdxl": {},
    "pixart_alpha": {"use_resolution_binning": False, **SHORT},
    "sd3": SHORT,
    "flux": {**SHORT, "true_cfg_scale": SCALE},
}


def traced(
    pipe, *changes, options=None, negative=NEGATIVE, capture=BARE, prompts=A, seeds=SEEDS, scale=SCALE, steps=STEPS
):
    return interp.trace(
        pipe, prompts, seeds=seeds, steps=steps, guidance_scale=scale, capture=capture, batch_size=len(seeds), height=16,
        width=16, interventions=changes, progress=False, negative_prompt=negative, options=options,
    )  # fmt: skip


def on(name, *changes, **more):
    """A family's run; FLUX.1 guides with true_cfg_scale."""
    options = {**FAMILIES[name], **more.pop("options", {})}
    if name == "flux" and "scale" in more:
        options["true_cfg_scale"] = more.pop("scale")
    return traced(tiny(name), *changes, options=options, **more)


def equal(one, other):
    return np.array_equal(one.final_latents.values, other.final_latents.values) and np.array_equal(
        one.latents.values, other.latents.values
    )


@contextmanager
def rows_seen(pipe):
    """Rows of every denoiser call, by a plain torch hook."""
    denoiser, seen = getattr(pipe, "unet", None) or pipe.transformer, []

    def look(module, args, kwargs):
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        seen.append(first.shape[0])

    handle = denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def looped(pipe, scales, calls=None):
    """An own loop whose step i is guided with scales[i]; None is the branch with text alone."""
    with_text, without = states(pipe, [A] * 2), states(pipe, [NEGATIVE] * 2)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            scale = scales[i if calls is None else calls[i]]
            text = with_text if scale is None else torch.cat([without, with_text])
            rows = scheduler.scale_model_input(x if scale is None else torch.cat([x, x]), t)
            out = pipe.unet(rows, t, encoder_hidden_states=text).sample
            if scale is not None:
                u, c = out.chunk(2)
                out = u + scale * (c - u)
            x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


# Scale and interval ---------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": (None, None),
    "euler": (EulerDiscreteScheduler, None),
    "dpm": (DPMSolverMultistepScheduler, None),
    "heun": (HeunDiscreteScheduler, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_of_scales_is_the_formula(name):
    pipe = tiny("sd1")
    cls, calls = SCHEDULERS[name]
    with scheduler_of(pipe, cls.from_config(pipe.scheduler.config) if cls else pipe.scheduler):
        run = traced(pipe, interp.GuidanceScale((1.0, 4.0), start=0.4))
        want = [SCALE, SCALE, 1.0, 2.5, 4.0]
        assert np.array_equal(run.final_latents.values, looped(pipe, want, calls))
        assert np.allclose(run.trajectory.guidance_scale.values, [want] * 2)
        assert (run.nfe.values == (9 if calls else STEPS)).all()


def test_guidance_in_an_interval_of_noise_levels():
    pipe = tiny("sd1")
    with untouched(pipe), rows_seen(pipe) as rows:
        base = traced(pipe)
        sigma = base.trajectory.sigma.values
        rows.clear()
        high, low = float(sigma[:2].mean()), float(sigma[2:4].mean())
        run = traced(pipe, interp.GuidanceInterval(start=high, stop=low, scale=3.0))
    assert rows == [2, 4, 4, 2, 2]
    assert np.array_equal(run.final_latents.values, looped(pipe, [None, 3.0, 3.0, None, None]))
    assert run.nfe.sel(branch="uncond").values.tolist() == [2, 2]
    planned = interp.plan(
        pipe, A, seeds=SEEDS, steps=STEPS, guidance_scale=SCALE, capture=BARE,
        interventions=[interp.GuidanceInterval(start=high, stop=low)],
    )  # fmt: skip
    assert planned.forward_passes == 2 * 7


def test_removed_on_again_and_removed_otherwise():
    """Early, in the middle and late, with both branches in between."""
    pipe = tiny("sd1")
    unit = {"unit": "step"}
    changes = (
        interp.RemoveText(stop=1, **unit), interp.RemoveGuidance(start=2, stop=3, **unit), interp.RemoveText(start=4, **unit),
    )  # fmt: skip
    kept = [("uncond",), ("uncond", "cond"), ("cond",), ("uncond", "cond"), ("uncond",)]
    run = traced(pipe, *changes)
    want = sample(pipe, states(pipe, [A] * 2), states(pipe, [NEGATIVE] * 2), SEEDS, STEPS, SCALE, keep=kept.__getitem__)
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    assert run.nfe.values.tolist() == [[3, 4]] * 2 and list(run.nfe.branch.values) == ["cond", "uncond"]
    assert run.trajectory.guidance_scale.values[0].tolist() == [0, SCALE, 1, SCALE, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scale_of_the_run_changes_nothing(name):
    """Other scales are those of the formula, see test_policy_formulas."""
    assert equal(on(name, interp.GuidanceScale(SCALE), steps=2), on(name, steps=2))


def test_guidance_rescale_is_that_of_the_pipeline():
    pipe = tiny("sd1")
    options = {"guidance_rescale": 0.7}
    # the pipeline mixes X with itself, 0.7·X + 0.3·X, which is X up to rounding; one branch alone stays what it is
    for change, same in (
        ([interp.GuidanceScale(3.0)], traced(pipe, scale=3.0, options=options)),
        ([interp.RemoveText()], traced(pipe, interp.RemoveText())),
    ):
        off = traced(pipe, *change, options=options).final_latents - same.final_latents
        assert np.abs(off).max() <= 1e-5 * np.abs(same.final_latents).max()


# Adaptive -------------------------------------------------------------------------------------------------------------


def cosines(run):
    """(sample, step), in float64."""
    c, u = (run.noise_pred.sel(branch=b).values.astype(float).reshape(len(run), STEPS, -1) for b in ("cond", "uncond"))
    return (c * u).sum(-1) / np.linalg.norm(c, axis=-1) / np.linalg.norm(u, axis=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_adaptive_guidance_at_its_ends(name):
    base = on(name, steps=3)
    never, at_once = (on(name, interp.AdaptiveGuidance(threshold=t), steps=3) for t in (1.5, -1.5))
    assert equal(never, base)
    assert equal(at_once, on(name, interp.RemoveGuidance(start=1, unit="step"), steps=3))
    assert at_once.nfe.values.tolist() == [[3, 1]] * 2


@pytest.mark.parametrize("name", ["sd1", "pixart_alpha", "flux"])
def test_samples_of_a_batch_end_their_guidance_one_by_one(name):
    """Rows leave the batch; each sample is what it is alone, when its guidance is removed where its branches agreed."""
    pipe, seeds = tiny(name), [1, 2, 3]
    base = on(name, seeds=seeds)
    first = cosines(base)[:, 0]
    threshold = float(np.sort(first)[-2:].mean())  # one sample agrees in the first step
    early = int(first.argmax())
    capture = interp.Capture(attention="cross", branches=("cond", "uncond"), image=False)
    with rows_seen(pipe) as rows:
        run = on(name, interp.AdaptiveGuidance(threshold=threshold), seeds=seeds, capture=capture)
    nfe = run.nfe.sel(branch="uncond").values
    assert nfe[early] == 1 and nfe.max() > 1 and (run.nfe.sel(branch="cond") == STEPS).all()
    assert sum(rows) == run.nfe.values.sum()
    for i, seed in enumerate(seeds):
        alone = on(name, interp.RemoveGuidance(start=int(nfe[i]), unit="step"), seeds=[seed])
        off = np.abs(run.final_latents.values[i] - alone.final_latents.values[0]).max()
        assert off <= 1e-5 * np.abs(alone.final_latents.values).max()
        uncond = run.noise_pred.sel(branch="uncond").values[i]
        assert np.isnan(uncond[nfe[i] :]).all() and not np.isnan(uncond[: nfe[i]]).any()
        assert np.isnan(run.latents.values).sum() == 0
        maps = run.attention(run.grids[0]).sel(branch="uncond").values[i]
        assert np.isnan(maps[nfe[i] :]).all() and np.isfinite(maps[: nfe[i]]).any()
        scale = run.trajectory.guidance_scale.values[i]
        assert (scale[nfe[i] :] == 1).all() and (scale[: nfe[i]] == SCALE).all()


def test_where_one_branch_is_short_at_tells_which_samples_it_holds():
    pipe, seen = tiny("sd1"), []
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_call(lambda call: call.leave.update(uncond=frozenset({0})))
        hooks.read("unet.mid_block:out", lambda x, at: seen.append((at.branch, at.members, x.shape[0], at.samples)))
        generators = [torch.Generator().manual_seed(s) for s in SEEDS]
        pipe([A, A], num_inference_steps=1, guidance_scale=SCALE, generator=generators, output_type="latent")
    assert seen == [("uncond", (1,), 1, 1), ("cond", (0, 1), 2, 2)]


def test_a_scale_holds_for_the_samples_that_are_still_guided():
    """A scale and adaptive guidance together, also where guidance is a call per branch."""
    for name in ("sd1", "flux"):
        both = on(name, interp.GuidanceScale(3.0), interp.AdaptiveGuidance(threshold=-1.5))
        want = on(name, interp.RemoveGuidance(start=1, unit="step"), scale=3.0)
        assert equal(both, want)


@pytest.mark.parametrize("name", ["sd1", "flux"])
@pytest.mark.parametrize("record_first", [True, False])
def test_a_scale_that_another_registry_sets_is_recorded_as_it_was(name, record_first):
    """What was predicted stays what was predicted, and the scale is the one that was applied."""
    pipe = tiny(name)
    want = on(name, interp.GuidanceScale(3.0), steps=2)
    hooks, recording = interp.HookRegistry(pipe), interp.record(pipe, capture=BARE)
    hooks.on_call(lambda call: setattr(call, "scale", 3.0))
    first, second = (recording, hooks) if record_first else (hooks, recording)
    with first as one, second as other:
        pipe(
            [A, A], negative_prompt=[NEGATIVE] * 2, num_inference_steps=2, guidance_scale=SCALE, height=16, width=16,
            generator=[torch.Generator().manual_seed(s) for s in SEEDS], output_type="latent", **FAMILIES[name],
        )  # fmt: skip
    run = (one if record_first else other).run
    assert equal(run, want)
    assert np.array_equal(run.noise_pred.values, want.noise_pred.values)
    assert (run.trajectory.guidance_scale == 3.0).all() and (want.trajectory.guidance_scale == 3.0).all()


def test_a_scale_beside_a_third_prediction_is_refused():
    """Skip-layer guidance adds (c − s)·k to what is combined; with X for c that would be another number."""
    options = {**SHORT, "skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with pytest.raises(interp.InterpError, match="combines a third prediction"):
        traced(tiny("sd3"), interp.GuidanceScale(3.0), options=options, steps=2)
    assert equal(*(traced(tiny("sd3"), *c, options=options, steps=2) for c in ([], [interp.GuidanceScale(SCALE)])))


def test_an_interval_that_holds_the_run_changes_nothing():
    assert equal(traced(tiny("sd1"), interp.GuidanceInterval()), traced(tiny("sd1")))


def test_what_the_plan_says_of_passes():
    """All evaluations of each step, and that adaptive guidance may skip more."""

    def planned(*changes):
        return interp.plan(tiny("sd1"), A, seeds=SEEDS, steps=STEPS, guidance_scale=SCALE, capture=BARE,
                           interventions=changes)  # fmt: skip

    adaptive = planned(interp.AdaptiveGuidance())
    assert adaptive.forward_passes == planned().forward_passes == 20
    assert ": at most 20 forward passes" in str(adaptive)
    with scheduler_of(tiny("sd1"), HeunDiscreteScheduler.from_config(tiny("sd1").scheduler.config)):
        assert planned().forward_passes == 2 * 2 * 9
        late = interp.RemoveText(start=0.8)
        assert planned(late).forward_passes == traced(tiny("sd1"), late).nfe.values.sum() == 2 * (2 * 8 + 1)


@pytest.mark.parametrize(
    "change", [interp.GuidanceScale(3.0), interp.AdaptiveGuidance(threshold=-1), interp.CacheCrossAttention(start=0.2)]
)
def test_nothing_is_left_after_an_exception(change):
    def fail(tensor, at):
        if at.step == 2:
            raise ValueError("of the user")

    pipe = tiny("sd1")
    before = traced(pipe, steps=2)
    with untouched(pipe), pytest.raises(ValueError, match="of the user"):
        traced(pipe, change, interp.Edit(fail, "unet.mid_block:out"))
    assert equal(traced(pipe, steps=2), before)


# T-GATE ---------------------------------------------------------------------------------------------------------------


def gated(pipe, gate, value, kept):
    """An own loop: from step `gate` on every cross-attention gives what it gave in step gate − 1."""
    cached, now = {}, {"step": -1}
    modules = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention}

    def freeze(name):
        def hook(module, args, out):
            if now["step"] == gate - 1:
                cached[name] = torch.stack(out.chunk(2)).mean(0).repeat(2, 1, 1) if value == "mean" else out
            if now["step"] < gate:
                return None
            whole = dict(zip(("uncond", "cond"), cached[name].chunk(2), strict=True))
            return torch.cat([whole[b] for b in kept])

        return hook

    def count(module, args):
        now["step"] += 1

    handles = [m.register_forward_hook(freeze(n)) for n, m in modules.items()]
    handles.append(pipe.unet.conv_in.register_forward_pre_hook(count))
    try:
        return sample(
            pipe, states(pipe, [A] * 2), states(pipe, [NEGATIVE] * 2), SEEDS, STEPS, SCALE,
            keep=lambda i: kept if i >= gate else ("uncond", "cond"),
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("value", ["mean", "own"])
@pytest.mark.parametrize("kept", [("uncond", "cond"), ("cond",), ("uncond",)])
def test_cached_cross_attention_is_the_last_output_before_the_window(value, kept):
    pipe = tiny("sd1")
    policy = {("cond",): [interp.RemoveGuidance], ("uncond",): [interp.RemoveText]}.get(kept, [])
    window = {"start": 2, "unit": "step"}
    ran = []
    handle = (
        pipe.unet.mid_block.attentions[0]
        .transformer_blocks[0]
        .attn2.to_k.register_forward_hook(
            lambda module, args, out: (
                ran.append(1) if type(out) is torch.Tensor else None
            )  # not the rehearsal, without data
        )
    )
    with untouched(pipe):
        ran.clear()
        run = traced(
            pipe, interp.CacheCrossAttention(value=value, **window), *(p(**window) for p in policy),
            capture=interp.Capture(image=False),
        )  # fmt: skip
    handle.remove()
    assert len(ran) == 2  # the modules do not run
    assert np.array_equal(run.final_latents.values, gated(pipe, 2, value, kept).final.numpy())
    maps = run.attention(run.grids[0])
    assert np.isnan(maps.isel(step=slice(2, None))).all() and np.isfinite(maps.isel(step=slice(2))).any()


def test_cached_from_the_first_step_on_in_some_layers():
    pipe = tiny("sd1")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    run = traced(pipe, interp.CacheCrossAttention(layers="*mid_block*"), capture=interp.Capture(image=False))
    for grid in run.grids:
        maps = run.attention(grid)
        frozen = maps.isel(layer=[str(s) == layer for s in maps.layer.values])
        others = maps.isel(layer=[str(s) != layer for s in maps.layer.values])
        assert np.isfinite(others.isel(token=0)).all()
        if frozen.sizes["layer"]:
            assert np.isfinite(frozen.isel(step=0, token=0)).all() and np.isnan(frozen.isel(step=slice(1, None))).all()
    assert equal(traced(pipe, interp.CacheCrossAttention(start=1.0)), traced(pipe))


def test_two_caches_in_windows_of_their_own():
    """Off, on, off, on: each window reuses the step before it, and in between the modules run."""
    pipe, unit = tiny("sd1"), {"unit": "step"}
    one, two = interp.CacheCrossAttention(start=1, stop=2, **unit), interp.CacheCrossAttention(start=3, stop=4, **unit)
    run = traced(pipe, one, two, capture=interp.Capture(image=False))
    maps = run.attention(run.grids[0]).isel(token=0)
    assert np.isnan(maps.values).all(axis=tuple(i for i, d in enumerate(maps.dims) if d != "step")).tolist() == [
        False, True, False, True, False,
    ]  # fmt: skip
    alone = traced(pipe, one)
    assert np.array_equal(run.latents.values[:, :4], alone.latents.values[:, :4])  # x_3 is what step 2 made
    assert not np.array_equal(run.latents.values[:, 4], alone.latents.values[:, 4])
    with untouched(pipe), pytest.raises(interp.InterpError, match="did not run in step 1, so it gave nothing to reuse"):
        traced(pipe, one, interp.CacheCrossAttention(start=2, stop=4, **unit))


def test_where_text_enters_by_cross_attention_alone_either_branch_is_t_gate():
    window = {"start": 0.4}
    for name in ("sd1", "pixart_alpha"):
        cached = interp.CacheCrossAttention(**window)
        text, guidance = (
            on(name, cached, kind(**window), steps=4) for kind in (interp.RemoveText, interp.RemoveGuidance)
        )
        assert equal(text, guidance)
        assert text.nfe.sum("branch").values.tolist() == [6, 6]


CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    "change",
    [
        interp.AblateHeads("*attn2", start=0.8), interp.Ablate(CROSS, start=0.8), interp.Ablate(f"{CROSS}.to_v", start=0.8),
        interp.ReplacePrompt("a dog", side="k"), interp.Edit(lambda x, at: x, f"{CROSS}:in", start=0.4, stop=0.8),
    ],
    ids=lambda c: c.name,
)  # fmt: skip
def test_nothing_is_changed_within_a_module_that_does_not_run(change):
    pipe, cached = tiny("sd1"), interp.CacheCrossAttention(start=0.4)
    for order in ([cached, change], [change, cached]):
        with pytest.raises(interp.InterpError, match=r"cannot be changed in steps? \d.*does not run there"):
            interp.plan(pipe, A, steps=STEPS, guidance_scale=SCALE, interventions=order)


def test_changes_beside_the_cache_and_before_it_are_made():
    pipe, cached = tiny("sd1"), interp.CacheCrossAttention(start=0.4)
    alone = traced(pipe, cached)
    for change in (
        interp.AblateHeads("*attn1"),
        interp.Ablate(CROSS, stop=0.4),
        interp.ReplacePrompt("a dog", stop=0.4),
    ):
        assert not equal(traced(pipe, cached, change), alone)


def test_cached_modules_are_known_to_other_registries():
    """A registry of the user's own caches; what records around it keeps NaN, and what it did not cache."""
    pipe, module = tiny("sd1"), CROSS
    kept = {}

    def give(call):
        return torch.cat([kept[b] for b in call.held])

    with interp.record(pipe, capture=interp.Capture(image=False)) as recording, interp.HookRegistry(pipe) as hooks:
        hooks.read(f"{module}:out", lambda x, at: kept.__setitem__(at.branch, x.clone()), {0})
        hooks.stand_in(module, give, {1})
        pipe(A, num_inference_steps=2, guidance_scale=SCALE, output_type="latent")
    maps = map(recording.run.attention, recording.run.grids)
    frozen = [m.isel(layer=[str(s) == module for s in m.layer.values]) for m in maps]
    (frozen,) = [m for m in frozen if m.sizes["layer"]]
    assert np.isnan(frozen.isel(step=1)).all() and np.isfinite(frozen.isel(step=0, token=0)).all()


def test_cross_attention_is_cached_in_pixart_and_sdxl_too():
    for name in ("pixart_alpha", "sdxl"):
        ran = on(name, interp.CacheCrossAttention(start=0.4), capture=interp.Capture(image=False))
        assert np.isnan(ran.attention(ran.grids[0]).isel(step=slice(2, None))).all()
        assert not equal(ran, on(name))


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = [
    ("sd3", [interp.CacheCrossAttention(start=0.5)], "has no cross-attention whose output could be reused"),
    ("sd1", [interp.CacheCrossAttention(layers="*attn9*")], "matches no cross-attention layer"),
    ("sd1", [interp.GuidanceScale(2.0), interp.RemoveText(start=0.5)], "both decide about 'scale' in steps 3"),
    ("sd1", [interp.GuidanceInterval(start=5.0, stop=0.3), interp.RemoveText(start=0.8)], "both decide about"),
    ("sd1", [interp.AdaptiveGuidance(), interp.RemoveGuidance(start=0.8)], "both decide about 'branches'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_one_sentence(name, changes, message):
    with pytest.raises(interp.InterpError, match=message):
        on(name, *changes)


def test_without_guidance_there_is_nothing_to_decide():
    for change in (interp.GuidanceScale(2.0), interp.GuidanceInterval(), interp.AdaptiveGuidance()):
        with pytest.raises(interp.InterpError, match="needs a run with guidance"):
            traced(tiny("sd1"), change, scale=1.0)
    with pytest.raises(interp.InterpError, match="the scale is a number"):
        interp.GuidanceScale("high")


def test_own_outputs_need_both_branches_before():
    changes = [interp.RemoveText(stop=1.0), interp.CacheCrossAttention(start=0.4, value="own")]
    assert traced(tiny("sd1"), *changes).nfe.sel(branch="cond").values.tolist() == [0, 0]
    cosine = float(cosines(traced(tiny("sd1")))[:, 0].mean())  # one of two samples ends in the first step, for a while
    changes = [interp.AdaptiveGuidance(threshold=cosine, stop=0.8), interp.CacheCrossAttention(start=0.4, value="own")]
    with pytest.raises(interp.InterpError, match="was not evaluated for every sample in step 1"):
        traced(tiny("sd1"), *changes)
    changes = [interp.RemoveText(stop=0.4), interp.CacheCrossAttention(start=0.4, value="own")]
    with untouched(tiny("sd1")), pytest.raises(interp.InterpError, match="say value='mean'"):
        traced(tiny("sd1"), *changes)


@pytest.mark.parametrize(
    "change",
    [
        interp.GuidanceScale((1, 7.5), stop=0.5),
        interp.GuidanceScale(3.0),
        interp.GuidanceInterval(start=5.42, stop=0.28, scale=2.0),
        interp.AdaptiveGuidance(threshold=0.9),
        interp.CacheCrossAttention(start=0.4, layers=("*up*",), value="own"),
    ],
)
def test_written_and_read(change):
    assert from_spec(yaml.safe_load(yaml.safe_dump(change.spec()))) == change


def test_heun_in_flow_keeps_its_scale():
    pipe = tiny("sd3")
    with scheduler_of(pipe, FlowMatchHeunDiscreteScheduler()):
        assert equal(on("sd3", interp.GuidanceScale(3.0), steps=2), on("sd3", scale=3.0, steps=2))
