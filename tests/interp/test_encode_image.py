"""Real pictures at chosen noise levels, against the formula and a plain call of the denoiser."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

import interp
from tests.interp.leftovers import untouched
from tests.interp.reference import Eager, scheduler_of, states, tiny

LEVELS = [700, 100, 400]
PROMPTS = ["a red circle", "a dog on the blue square background", "the green cat"]


def pictures(n=3, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def by_hand(pipe, images, prompts, seeds, level):
    """x_0, x_t and the model's output for the branch with text, one sample a (picture, seed)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
        clean = clean.repeat_interleave(len(seeds), 0)
        noise = torch.cat([torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
        noise = noise.repeat(len(images), 1, 1, 1)
        alpha = pipe.scheduler.alphas_cumprod[level].double()
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).float()
        text = states(pipe, [p for p in prompts for _ in seeds])
        return clean, noisy, pipe.unet(noisy, level, encoder_hidden_states=text).sample


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_one_pass_a_level(name):
    pipe, images = tiny(name), pictures()
    capture = interp.Capture(attention="all", heads="all", tokens="all", dtype="float32")
    with untouched(pipe), Eager(pipe.unet) as eager:
        run = interp.encode_image(pipe, images, LEVELS, prompt=PROMPTS, seeds=[3, 5], capture=capture, batch_size=6)
        calls = {site: list(probs) for site, probs in eager.probs.items()}
    assert run.latents.timestep.values.tolist() == [700, 400, 100]
    assert run.samples[["prompt_id", "seed"]].values.tolist() == [[i, s] for i in range(3) for s in (3, 5)]
    for step, level in enumerate([700, 400, 100]):
        clean, noisy, out = by_hand(pipe, images, PROMPTS, [3, 5], level)
        np.testing.assert_allclose(run.latents.isel(step=step).values, noisy.numpy(), atol=1e-5)
        np.testing.assert_allclose(run.noise_pred.sel(branch="cond").isel(step=step).values, out.numpy(), atol=1e-4)
        np.testing.assert_allclose(run.final_latents.values, clean.numpy(), atol=1e-5)
        site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
        maps = run.attention("4x4").sel(layer=site, branch="cond").isel(step=step).stack(q=("query_y", "query_x"))
        assert len(calls[site]) == 3  # one forward pass a level
        np.testing.assert_allclose(
            maps.transpose("sample", "head", "q", "token").values, calls[site][step][-6:], atol=1e-5
        )
    assert run.noise_pred.sel(branch="uncond").isnull().all() and run.nfe.values.tolist() == [[3, 0]] * 6
    np.testing.assert_array_equal(run.images.values, images.repeat(2, 0))
    assert run.trajectory.data_scale.values**2 + run.trajectory.noise_scale.values**2 == pytest.approx(1)


def test_the_schedulers_own_steps_do_not_matter():
    """Any scheduler of the same noise schedule gives the same inputs, also those that scale them."""
    pipe, images = tiny("sd1"), pictures(2)
    config = dict(pipe.scheduler.config)
    base = interp.encode_image(pipe, images, LEVELS, prompt="a cat")
    with scheduler_of(pipe, EulerDiscreteScheduler.from_config(config)):
        other = interp.encode_image(pipe, images, LEVELS, prompt="a cat")
    np.testing.assert_allclose(other.latents.values, base.latents.values, atol=1e-5)
    np.testing.assert_allclose(other.noise_pred.values, base.noise_pred.values, atol=1e-4)


def test_both_branches_conditions_and_probes():
    pipe = tiny("sdxl")
    conditions = {"baseline": [], "other": [interp.ReplacePrompt("a blue cat")]}
    capture = interp.Capture(branches=("cond", "uncond"))
    run = interp.encode_image(pipe, pictures(2), 500, prompt="a red circle", capture=capture, conditions=conditions)
    assert len(run) == 4 and run.nfe.values.tolist() == [[1, 1]] * 4
    a, b = (run.condition(name) for name in conditions)
    np.testing.assert_array_equal(a.latents.values, b.latents.values)
    assert not np.allclose(a.noise_pred.sel(branch="cond"), b.noise_pred.sel(branch="cond"))
    np.testing.assert_allclose(a.noise_pred.sel(branch="uncond"), b.noise_pred.sel(branch="uncond"), atol=1e-5)
    maps = run.probe("token_attribution")
    assert maps.token_map.sizes["sample"] == 4 and bool(maps.token_map.notnull().any())


def test_every_kind_of_picture_is_the_same():
    pipe, array = tiny("sd1"), pictures(1)[0]
    kinds = [array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1) / 255, array[None], [array]]
    runs = [interp.encode_image(pipe, kind, 300).latents.values for kind in kinds]
    assert all(np.array_equal(runs[0], other) for other in runs[1:])
    many = interp.encode_image(pipe, array, 300, prompt=PROMPTS)  # one picture, three prompts
    assert many.samples["prompt"].tolist() == PROMPTS and len(many.samples["image_hash"].unique()) == 1


def test_resuming(tmp_path):
    pipe, images, path = tiny("sd1"), pictures(), tmp_path / "run.zarr"
    settings = {"prompt": PROMPTS, "store": path, "batch_size": 2}
    run = interp.encode_image(pipe, images, LEVELS, **settings)
    calls = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    again = interp.encode_image(pipe, images, LEVELS, **settings)
    handle.remove()
    assert not calls and np.array_equal(again.noise_pred.values, run.noise_pred.values, equal_nan=True)
    for changed in ({"image": pictures(seed=1)}, {"timestep": [700, 100, 401]}):
        with pytest.raises(interp.InterpError, match="another plan"):
            interp.encode_image(pipe, **{"image": images, "timestep": LEVELS, **settings, **changed})


def test_messages():
    pipe, images = tiny("sd1"), pictures()
    scheduler = pipe.scheduler
    for call, sentence in (
        ((images, 1000), "from 0 .clean."),
        ((images, []), "one or more timesteps"),
        ((images[0][:, :, :2], 10), "cannot be read"),
        (([images[0], pictures(1, 40)[0]], 10), "different sizes"),
        ((pictures(1, 36), 10), "multiples of 8"),
        ((torch.full((3, 32, 32), 7.0), 10), r"in \[0, 1\]"),
    ):
        with pytest.raises(interp.InterpError, match=sentence):
            interp.encode_image(pipe, *call)
        assert pipe.scheduler is scheduler
    with pytest.raises(interp.InterpError, match="3 pictures were given with 2 prompts"):
        interp.encode_image(pipe, images, 10, prompt=["a", "b"])
