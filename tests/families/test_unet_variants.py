"""The UNet family beyond plain text-to-image: what the conformance suite does not ask of pictures and ControlNets."""

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

import interp
from tests.families.pipelines import _quiet, sd1
from tests.families.variant_pipelines import controlled, image_to_image, pictures

SIZE = (16, 24)
PICTURES = pictures(*SIZE)


def test_image_to_image_begins_later():
    pipe = image_to_image()
    with interp.record(pipe) as recording:
        pipe("a red circle", image=PICTURES[0], strength=0.5, num_inference_steps=6)
    run = recording.run
    whole = interp.plan(sd1(), "a red circle", steps=6).timeline.timestep
    assert run.latents.timestep.values.tolist() == whole[3:].tolist()
    assert (run.images.sizes["height"], run.images.sizes["width"]) == SIZE
    with pytest.raises(interp.InterpError, match=r"starts from a picture.* interp\.record"):
        interp.trace(pipe, "a red circle", steps=6)


def test_inpainting_that_mixes_latents_outside_the_scheduler_is_refused():
    pipe = _quiet(StableDiffusionInpaintPipeline(**sd1().components, requires_safety_checker=False))
    with pytest.raises(interp.InterpError, match="4 channels mixes"), interp.record(pipe):
        pipe("a red circle", image=PICTURES[0], mask_image=PICTURES[1].convert("L"), num_inference_steps=2)


def test_a_controlnet_in_guess_mode():
    pipe, rows = controlled(), []
    arguments = {"image": PICTURES[:2], "guess_mode": True, "num_inference_steps": 3, "output_type": "latent"}

    def call():
        generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
        return pipe(["a red circle"] * 2, guidance_scale=4.0, generator=generators, **arguments).images

    want = call()
    handle = pipe.controlnet.conv_in.register_forward_hook(lambda m, a, out: rows.append(out.shape[0]))
    with interp.record(pipe, capture=interp.Capture(branches=("cond", "uncond"))) as recording:
        assert torch.equal(call(), want)
    assert recording.run.nfe.values.tolist() == [[3, 3]] * 2 and rows == [2] * 3
    with interp.HookRegistry(pipe) as hooks:
        hooks.on_call(lambda c: setattr(c, "keep", ("uncond",)))
        got = call()
    handle.remove()
    assert torch.isfinite(got).all() and not torch.equal(got, want)
