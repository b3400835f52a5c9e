"""Tiny pipelines of known models with something beside the text: pictures, a ControlNet, adapters."""

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from peft import LoraConfig
from PIL import Image

from tests.families.pipelines import _flux, _quiet, _unet, flux, sd1, sdxl


def pictures(height: int, width: int) -> list[Image.Image]:
    """Four pictures of noise."""
    draws = (np.random.default_rng(i) for i in range(4))
    return [Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)) for draw in draws]


def controlled() -> StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.x with ControlNet: residuals of a second network that sees a picture."""
    parts = sd1().components
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(parts["unet"], conditioning_channels=3, conditioning_embedding_out_channels=(4, 4))
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.3)
    return _quiet(StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False))


def with_ip_adapter():
    """Stable Diffusion 1.x with IP-Adapter: weights as its file has them, a projection, and keys and values a layer."""
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


def with_lora():
    """Stable Diffusion 1.x with LoRA: loaded before, in the UNet."""
    pipe = sd1()
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return pipe


def image_to_image() -> StableDiffusionImg2ImgPipeline:
    """Stable Diffusion 1.x, image to image: begins at a picture that was noised."""
    return _quiet(StableDiffusionImg2ImgPipeline(**sd1().components, requires_safety_checker=False))


def image_to_image_xl() -> StableDiffusionXLImg2ImgPipeline:
    """Stable Diffusion XL, image to image: the same with two encoders."""
    return _quiet(StableDiffusionXLImg2ImgPipeline(**sdxl().components, add_watermarker=False))


def inpainting() -> StableDiffusionInpaintPipeline:
    """Stable Diffusion inpainting: nine channels, of latents, mask and picture."""
    parts = sd1().components
    torch.manual_seed(2)
    parts["unet"] = _unet(in_channels=9, out_channels=4)
    return _quiet(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False))


def _parts(pipe) -> dict:
    return {n: c for n, c in pipe.components.items() if n not in ("image_encoder", "feature_extractor")}


def flux_image_to_image() -> FluxImg2ImgPipeline:
    """FLUX.1 image to image: makes its own latents."""
    pipe = _quiet(FluxImg2ImgPipeline(**_parts(flux())))
    pipe.default_sample_size = 16
    return pipe


def flux_control() -> FluxControlPipeline:
    """FLUX.1 control: as many channels again, of a picture."""
    parts = _parts(flux())
    parts["transformer"] = _flux(guidance_embeds=True, in_channels=32, out_channels=16).transformer
    pipe = _quiet(FluxControlPipeline(**parts))
    pipe.default_sample_size = 16
    return pipe
