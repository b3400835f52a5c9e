"""x̂0 decoded per step, against the schedulers' own prediction and the pipeline's own picture."""

import numpy as np
import pytest
import torch
import xarray as xr
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from typer.testing import CliRunner

import interp
from interp.cli import app
from tests.interp.reference import SCALE, sample, scheduler_of, states, tiny

A, B = "a red circle", "a dog on the blue square background"
SETTINGS = {"steps": 4, "guidance_scale": SCALE, "seeds": [0, 1], "progress": False}


def decoded(pipe, latents):
    """Plain decoding: uint8 (sample, height, width, rgb)."""
    with torch.no_grad():
        x = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return ((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round()


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_equals_the_schedulers_prediction(name, scheduler):
    pipe = tiny(name)
    with scheduler_of(pipe, scheduler.from_config(pipe.scheduler.config)):
        run = interp.score(interp.trace(pipe, A, **SETTINGS), "x0", pipe=pipe)
        prompt = states(pipe, [A] * 2)
        seen = sample(pipe, prompt, states(pipe, [""] * 2), [0, 1])
    assert run.x0.dims == ("sample", "step", "height", "width", "rgb") and run.x0.dtype == np.uint8
    for step, want in enumerate(seen.x0):
        difference = np.abs(run.x0.isel(step=step).values.astype(int) - decoded(pipe, want))
        assert difference.max() <= 1  # a rounding of 1/255
    assert run.x0.timestep.values.tolist() == run.latents.timestep.values.tolist()
    assert np.ptp(run.x0.values) > 50


def test_branch_policies_and_steps(tmp_path):
    """Where a branch was not evaluated the other one is what counts; steps can be chosen; the store stays whole."""
    pipe, path = tiny("sd1"), tmp_path / "run.zarr"
    changes = [interp.RemoveText(start=0.5)]
    run = interp.trace(pipe, [A, B], interventions=changes, store=path, scores=(), **SETTINGS)
    run = interp.score(path, ["x0"], pipe=pipe, steps=[0, 3])
    assert run.x0.step.values.tolist() == [0, 3]
    t = run.trajectory
    text, alone = t.noise_pred.isel(step=0), t.noise_pred.isel(step=3).sel(branch="uncond")
    guided = text.sel(branch="uncond") + SCALE * (text.sel(branch="cond") - text.sel(branch="uncond"))
    for step, out in ((0, guided), (3, alone)):
        clean = (t.latents.isel(step=step) - t.noise_scale[step] * out) / t.data_scale[step]
        found = run.x0.sel(step=step).values.astype(int)
        assert np.abs(found - decoded(pipe, torch.from_numpy(clean.values.astype("float32")))).max() <= 1
    assert interp.stores.verify(run) == [] and interp.stores.validate(run.tree) == []
    plain = xr.open_datatree(path, engine="zarr")
    assert plain["x0/image"].sizes == {"sample": 4, "step": 2, "height": 16, "width": 16, "rgb": 3}
    # again with other steps: replaced; and the same call still resumes the run
    assert interp.score(path, "x0", pipe=pipe, steps=0.25).x0.sizes["step"] == 1
    interp.trace(pipe, [A, B], interventions=changes, store=path, **SETTINGS)
    assert interp.stores.verify(interp.open_run(path)) == []


def test_a_selection_leaves_the_others_black(tmp_path):
    pipe, path = tiny("sd1"), tmp_path / "run.zarr"
    whole = interp.trace(pipe, [A, B], store=path, **SETTINGS)
    interp.score(whole.sel(prompt=B), "x0", pipe=pipe)
    kept = interp.open_run(path).x0
    assert kept.isel(sample=[0, 1]).values.max() == 0 and kept.isel(sample=[2, 3]).values.max() > 0


def test_the_last_picture_is_the_pipelines_own():
    """Decoding the final latents gives the stored picture: the same affine, the same rounding."""
    from interp.autoencoding import to_latents, to_pictures

    pipe = tiny("sdxl")
    run = interp.trace(pipe, A, **SETTINGS)
    mine = to_pictures(pipe, torch.from_numpy(run.final_latents.values))
    assert np.abs(mine.astype(int) - run.images.values).max() <= 1
    with torch.no_grad():
        x = torch.from_numpy(run.images.values).permute(0, 3, 1, 2) / 127.5 - 1
        want = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(to_latents(pipe, run.images.values), want)


def test_on_the_command_line(tmp_path):
    path = tmp_path / "run.zarr"
    capture = interp.Capture(attention=None)
    interp.trace("scenes", A, steps=2, height=64, width=64, progress=False, store=path, capture=capture)
    result = CliRunner().invoke(app, ["score", str(path), "-m", "x0", "--steps", "0:2:2"])
    assert result.exit_code == 0 and "x0: sample 1 × step 1 × height 64" in result.stdout


def test_messages():
    pipe = tiny("sd1")
    run = interp.trace(pipe, A, **{**SETTINGS, "capture": interp.Capture(noise_pred=False)})
    with pytest.raises(interp.InterpError, match="noise_pred was asked for"):
        interp.score(run, "x0", pipe=pipe)
    with pytest.raises(interp.InterpError, match="interp score RUN --metric x0"):
        run.x0  # noqa: B018
    whole = interp.trace(pipe, A, **SETTINGS)
    with pytest.raises(interp.InterpError, match="does not know where its pipeline came from"):
        interp.score(whole, "x0")
