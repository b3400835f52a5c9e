"""Steps, branches and noise levels: what is stored is what an explicit sampling loop sees."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import interp
from tests.interp.leftovers import untouched
from tests.interp.reference import SCALE, noise, sample, scheduler_of, states, tiny

SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "heun": (HeunDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
}
EXPLODING = {"euler", "euler-karras", "euler-a", "heun"}
SEEDS = [11, 12]
BARE = interp.Capture(attention=None, image=False)
PROMPTS = ["a red circle", "a dog on the blue square background"]


def make(name):
    cls, changes = SCHEDULERS[name]
    return cls.from_config(tiny("sd1").scheduler.config, **changes)


def traced(pipe, steps=5, scale=SCALE, capture=BARE, **more):
    """Two samples in one batch: one prompt, two seeds."""
    return interp.trace(
        pipe, PROMPTS[1], seeds=SEEDS, steps=steps, guidance_scale=scale, capture=capture, batch_size=2,
        progress=False, **more,
    )  # fmt: skip


def looped(pipe, steps=5, scale=SCALE, negative="", **more):
    cond, uncond = states(pipe, [PROMPTS[1]] * 2), states(pipe, [negative] * 2)
    return sample(pipe, cond, uncond if scale > 1 else None, SEEDS, steps, scale, **more)


@cache
def of(name):
    """A scheduler's run and its explicit loop."""
    with scheduler_of(tiny("sd1"), make(name)) as pipe, untouched(pipe):
        want = looped(pipe)
        return traced(pipe), want


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trajectory_equals_an_explicit_loop(name):
    run, want = of(name)
    first = slice(None, None, 2) if name == "heun" else slice(None)  # of each step the first evaluation is kept
    calls = len(want.latents)
    assert run.latents.sizes["step"] == len(want.latents[first])
    assert np.array_equal(run.latents.values, torch.stack(want.latents[first], 1).numpy())
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    for branch in ("cond", "uncond"):
        stored = run.noise_pred.sel(branch=branch).values
        assert np.array_equal(stored, torch.stack(want.eps[branch][first], 1).numpy())
    assert (run.nfe.values == calls).all()
    assert calls == {"heun": 9, "pndm": 6}.get(name, 5)
    assert (run.trajectory.guidance_scale.values == SCALE).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_equal_the_schedulers_own(name):
    """`latents = data_scale·x0 + noise_scale·ε`, in the scheduler's own words: `add_noise`."""
    times, own = of(name)[0].trajectory, make(name)
    own.set_timesteps(5)
    first = slice(None, None, 2) if name == "heun" else slice(None)
    assert np.allclose(times.timestep.values, own.timesteps[first].double().numpy())
    data, scale = times.data_scale.values, times.noise_scale.values
    alpha, sigma = times.alpha_bar.values, times.sigma.values
    assert np.allclose(alpha, 1 / (1 + sigma**2), rtol=1e-5)
    assert np.allclose(sigma, scale / data, rtol=1e-5)
    assert (np.diff(sigma)[1:] < 0).all() or name == "pndm"
    if name in EXPLODING:
        assert (data == 1).all() and np.allclose(sigma, own.sigmas[:-1][first].numpy(), rtol=1e-5)
    else:
        assert np.allclose(data**2 + scale**2, 1, atol=1e-6)
    if name in ("ddim", "pndm"):
        assert np.allclose(alpha, own.alphas_cumprod[own.timesteps.long()].numpy(), rtol=1e-5)
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    if name == "heun":  # its add_noise counts evaluations: compare with the table above alone
        return
    for i, t in enumerate(own.timesteps):
        if name != "pndm" or i != 2:
            want = own.add_noise(x0, eps, t.reshape(1))
            assert torch.allclose(want, float(data[i]) * x0 + float(scale[i]) * eps, rtol=1e-4, atol=1e-4)


def test_the_first_latents_are_the_seeds_noise():
    pipe = tiny("sd1")
    run = interp.trace(
        pipe, PROMPTS, seeds=[5, 9], steps=1, guidance_scale=SCALE, capture=BARE, batch_size=3, progress=False
    )
    assert list(run.samples["seed"]) == [5, 9, 5, 9]
    assert np.array_equal(run.latents.values[:, 0], noise(pipe, [5, 9, 5, 9]).numpy())


def test_final_latents_decode_to_the_picture():
    pipe = tiny("sd1")
    run = traced(pipe, capture=interp.Capture(attention=None))
    with torch.no_grad():
        x = torch.from_numpy(run.final_latents.values)
        picture = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    picture = ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert np.array_equal(run.images.values, picture.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_guidance_arithmetic_gives_the_next_latents(name):
    """From the stored halves alone, u + w·(c − u) and the scheduler give the stored trajectory."""
    pipe = tiny(name)
    run = traced(pipe)
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(5)
    latents, eps = torch.from_numpy(run.latents.values), run.noise_pred
    following = [*latents[:, 1:].unbind(1), torch.from_numpy(run.final_latents.values)]
    for i, t in enumerate(scheduler.timesteps):
        u, c = (torch.from_numpy(eps.isel(step=i).sel(branch=b).values) for b in ("uncond", "cond"))
        assert torch.equal(scheduler.step(u + SCALE * (c - u), t, latents[:, i]).prev_sample, following[i])


def test_prediction_type_is_told():
    assert traced(tiny("sd2"), steps=1).attrs["prediction_type"] == "v_prediction"
    assert traced(tiny("sd1"), steps=1).attrs["prediction_type"] == "epsilon"


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance(scale):
    pipe = tiny("sd1")
    want, run = looped(pipe, scale=scale), traced(pipe, scale=scale)
    assert np.array_equal(run.latents.values, torch.stack(want.latents, 1).numpy())
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    eps = run.noise_pred
    assert np.isnan(eps.sel(branch="uncond").values).all()  # never evaluated: NaN, not 0
    assert np.array_equal(eps.sel(branch="cond").values, torch.stack(want.eps["cond"], 1).numpy())
    assert run.nfe.sel(branch="cond").values.tolist() == [5, 5]
    assert run.nfe.sel(branch="uncond").values.tolist() == [0, 0]
    assert (run.trajectory.guidance_scale.values == 1).all()  # the branch with text alone


def test_attention_without_guidance_is_that_of_cond():
    pipe = tiny("sd1")
    both = interp.Capture(branches=("cond", "uncond"), image=False, dtype="float32")
    guided, free = traced(pipe, steps=1, capture=both), traced(pipe, steps=1, scale=1.0, capture=both)
    for grid in guided.grids:
        a, b = guided.attention(grid), free.attention(grid)
        assert np.allclose(a.sel(branch="cond").values, b.sel(branch="cond").values, atol=1e-5, equal_nan=True)
        assert np.isnan(b.sel(branch="uncond").values).all()


def test_negative_prompts():
    pipe = tiny("sd1")
    want = looped(pipe, negative="a green cat")
    run = traced(pipe, negative_prompt="a green cat")
    assert np.array_equal(run.final_latents.values, want.final.numpy())
    plain, unlike = of("ddim")
    assert not np.array_equal(plain.final_latents.values, want.final.numpy())
    table = interp.trace(
        pipe, [{"prompt": PROMPTS[1], "negative_prompt": n} for n in ("a green cat", "")], seeds=SEEDS, steps=5,
        guidance_scale=SCALE, capture=BARE, batch_size=2, progress=False,
    )  # fmt: skip
    assert np.array_equal(table.final_latents.values[:2], want.final.numpy())
    assert np.array_equal(table.final_latents.values[2:], unlike.final.numpy())
    assert list(table.samples["negative_prompt"]) == ["a green cat"] * 2 + [""] * 2


def test_record_follows_ordinary_calls():
    """Several calls, longer prompts later, images per prompt: each call appends its samples."""
    pipe = tiny("sd1")
    with interp.record(pipe) as recording:
        first = pipe(PROMPTS[0], num_inference_steps=3, output_type="np", num_images_per_prompt=2,
                     generator=[torch.Generator().manual_seed(s) for s in SEEDS]).images  # fmt: skip
        second = pipe(PROMPTS, num_inference_steps=3, output_type="np").images
    run = recording.run
    assert len(run) == 4 and list(run.samples["status"]) == [1] * 4
    assert list(run.samples["prompt"]) == [PROMPTS[0], PROMPTS[0], *PROMPTS]
    assert list(run.samples["seed"])[:2] == SEEDS
    assert np.array_equal(run.images.values, (np.concatenate([first, second]) * 255).round().astype("uint8"))
    for grid in run.grids:
        sums = np.nansum(run.attention(grid).values.astype("float64"), axis=run.attention(grid).dims.index("token"))
        assert sums == pytest.approx(1, abs=2e-2)
    words = [[str(t) for t in row if t] for row in run.tokens(run.grids[0])["token_text"].values]
    assert words[3][1:-2] == ["a", "dog", "on", "the", "blue", "square", "back", "ground"]


def test_a_second_call_starts_at_step_0():
    pipe, steps = tiny("sd1"), []
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_step(lambda end: steps.append(end.step))
        pipe("a", num_inference_steps=3, output_type="latent")
        pipe("a", num_inference_steps=2, output_type="latent")
        with scheduler_of(pipe, make("euler")):  # even with another scheduler
            pipe("a", num_inference_steps=2, output_type="latent")
    assert steps == [0, 1, 2, 0, 1, 0, 1]


def test_a_copied_scheduler_does_not_count():
    pipe, steps = tiny("sd1"), []
    other = deepcopy(pipe.scheduler)
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_step(lambda end: steps.append(end.step))
        other.set_timesteps(2)
        other.step(torch.zeros(1, 4, 8, 8), other.timesteps[0], torch.zeros(1, 4, 8, 8))
    assert steps == []


def test_noise_added_by_the_scheduler_keeps_its_seed():
    """DDIM with eta draws from the samples' generators: pipelines find out by the signature of `step`."""
    pipe = tiny("sd1")
    run = traced(pipe, options={"eta": 0.8})
    want = pipe(
        [PROMPTS[1]] * 2, num_inference_steps=5, guidance_scale=SCALE, eta=0.8, output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
    ).images  # fmt: skip
    assert np.array_equal(run.final_latents.values, want.numpy())
    assert not np.array_equal(run.final_latents.values, of("ddim")[0].final_latents.values)
