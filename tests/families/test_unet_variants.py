"""The UNet family beyond plain text-to-image: the same suite with ControlNet, IP-Adapter, LoRA, image-to-image, inpainting."""

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from peft import LoraConfig
from PIL import Image

import interp
from interp.testing import check_family
from tests.families.pipelines import _unet, sd1, sdxl
from tests.families.test_families import controlled

LEFT_OUT = ("layout",)  # these pipelines make their own latents
SIZE = (16, 24)
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (*SIZE, 3), dtype=np.uint8)) for i in range(4)]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_to_image():
    return quiet(StableDiffusionImg2ImgPipeline(**sd1().components, requires_safety_checker=False))


def image_to_image_xl():
    return quiet(StableDiffusionXLImg2ImgPipeline(**sdxl().components, add_watermarker=False))


def inpainting():
    parts = sd1().components
    torch.manual_seed(2)
    parts["unet"] = _unet(in_channels=9, out_channels=4)
    return quiet(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def with_lora():
    pipe = sd1()
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return pipe


def with_ip_adapter():
    """Weights as an adapter's file has them: a projection of the picture's embedding, and keys and values a layer."""
    pipe = sd1()
    unet, draw = pipe.unet, torch.Generator().manual_seed(4)
    text, image = unet.config.cross_attention_dim, 16
    layers, number = {}, 1
    for name in unet.attn_processors:
        module = unet.get_submodule(name.removesuffix(".processor"))
        if "attn2" in name:
            for side in ("k", "v"):
                layers[f"{number}.to_{side}_ip.weight"] = torch.randn(module.inner_dim, text, generator=draw) * 0.2
        number += "attn2" in name and 2
    projection = {
        "proj.weight": torch.randn(4 * text, image, generator=draw), "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text), "norm.bias": torch.zeros(text),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


EMBEDDING = [torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(5))]
VARIANTS = {
    "controlnet": (controlled, {"image": PICTURES[:2]}),
    "image to image": (image_to_image, {"image": PICTURES[:2], "strength": 0.7, "height": None, "width": None}),
    "image to image XL": (image_to_image_xl, {"image": PICTURES[:2], "strength": 0.7, "height": None, "width": None}),
    "inpainting": (inpainting, {"image": PICTURES[:2], "mask_image": [p.convert("L") for p in PICTURES[2:]]}),
    "lora": (with_lora, {}),
    "ip-adapter": (with_ip_adapter, {"ip_adapter_image_embeds": EMBEDDING}),
}


def cases():
    for name, (make, options) in VARIANTS.items():
        for check in check_family(make, options=options, steps=4, size=SIZE):
            if str(check) not in (*LEFT_OUT, "images per prompt", "batch of two"):  # options are for two samples
                yield pytest.param(check, id=f"{name}: {check}")


@pytest.mark.parametrize("check", list(cases()))
def test_conformance(check):
    check()


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
    pipe = quiet(StableDiffusionInpaintPipeline(**sd1().components, requires_safety_checker=False))
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
