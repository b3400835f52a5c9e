"""Stable Diffusion 1.x, 2.x and XL: UNet with cross-attention, both branches as rows of one batch."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from interp.compiling import plain
from interp.errors import InterpError
from interp.families.base import Family
from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Pass


class UNetFamily(Family):
    """Pipelines around `UNet2DConditionModel` with classifier-free guidance in one batch."""

    name = "unet"
    root: ClassVar[str] = "unet"
    # Their row order [uncond, cond] was read in their source. Others of the same base (InstructPix2Pix and PAG have three
    # chunks) are left out on purpose: a branch is never guessed.
    pipelines: ClassVar[frozenset[str]] = frozenset(
        f"{model}{variant}Pipeline"
        for model in ("StableDiffusion", "StableDiffusionXL")
        for variant in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
    )

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """The UNet, and a ControlNet beside it, whose residuals have the same rows."""
        found = {"unet": plain(self.pipe.unet)}
        if isinstance(getattr(self.pipe, "controlnet", None), torch.nn.Module):
            found["controlnet"] = plain(self.pipe.controlnet)
        return found

    @property
    def needs_picture(self) -> bool:
        """Image-to-image, inpainting and ControlNet are given one."""
        return "image" in inspect.signature(type(self.pipe).__call__).parameters

    def branches(self, call: Pass) -> tuple[str, ...]:
        """[uncond, cond] rows under guidance, else cond alone; in guess mode a ControlNet sees cond alone."""
        if call.kwargs.get("guess_mode"):
            return ("cond",)
        return ("uncond", "cond") if self.pipe.do_classifier_free_guidance else ("cond",)

    def guided(self, arguments: Arguments) -> bool:
        """Guidance is on above 1, unless the scale is an input of the model (LCM-distilled)."""
        return super().guided(arguments) and getattr(self.pipe.unet.config, "time_cond_proj_dim", None) is None

    def applied_guidance(self, arguments: Arguments) -> float:
        """What the pipeline says, which a callback may change between steps."""
        return float(self.pipe.guidance_scale)

    def attention_kind(self, path: str, module: Any) -> str | None:
        """Inside transformer blocks; elsewhere `Attention` is of the middle of small models, or of the autoencoder."""
        return super().attention_kind(path, module) if ".transformer_blocks." in path else None

    def attention_sites(self) -> list[AttentionSite]:
        """Module order is down, up, mid; running order down, mid, up."""
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        return sorted(super().attention_sites(), key=lambda s: order.get(s.name.split(".")[1], 3))

    def without_probabilities(self) -> dict[str, str]:
        """Attention of a ControlNet beside the UNet, which has the same names: a run holds the UNet's."""
        why = "attention of the ControlNet beside the UNet is not kept"
        beside = [(root, m) for root, m in self.denoisers.items() if root != self.root]
        return {
            f"{root}.{path}": why
            for root, model in beside
            for path, module in model.named_modules()
            if isinstance(module, self.attention)
        }

    def default_size(self) -> tuple[int, int]:
        """The UNet's training size."""
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def picture_size(self, arguments: Arguments) -> tuple[int, int]:
        """Where the call names no size: that of the picture it starts from or is controlled by, else the model's own."""
        image = arguments.get("control_image") if arguments.get("control_image") is not None else arguments.get("image")
        inpaints = "Inpaint" in type(self.pipe).__name__ and "ControlNet" not in type(self.pipe).__name__
        if image is None or arguments.get("height") or arguments.get("width") or inpaints:
            return super().picture_size(arguments)
        while isinstance(image, list):
            image = image[0]
        height, width = self.pipe.image_processor.get_default_height_width(image)
        return int(height), int(width)

    def skipped_steps(self, arguments: Arguments) -> int:
        """Image-to-image and inpainting leave out the first 1 − strength of the steps."""
        if arguments.get("strength") is None:
            return 0
        if arguments.get("denoising_start") is not None or arguments.get("denoising_end") is not None:
            raise InterpError(
                "recording follows whole sampling runs; denoising_start and denoising_end are not supported"
            )
        if "Inpaint" in type(self.pipe).__name__ and self.denoiser.config.in_channels == 4:
            raise InterpError(
                "inpainting with a UNet of 4 channels mixes the latents with the picture's after each step, which is not "
                "recorded; use an inpainting model (9 channels), or interp.HookRegistry"
            )
        steps = int(arguments["num_inference_steps"])
        return steps - min(int(steps * float(arguments["strength"])), steps)

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """One latent position per `vae_scale_factor`² pixels."""
        scale, (height, width) = self.pipe.vae_scale_factor, self.size(arguments)
        return self.pipe.vae.config.latent_channels, height // scale, width // scale

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row, 77 tokens."""
        config, (_, y, x) = self.pipe.unet.config, self.latent_shape(arguments)
        dtype = self.pipe.unet.dtype
        text = torch.empty(1, 77, config.cross_attention_dim, dtype=dtype)
        kwargs: dict[str, Any] = {"encoder_hidden_states": text}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            kwargs["added_cond_kwargs"] = {
                "text_embeds": torch.empty(1, pooled, dtype=dtype),
                "time_ids": torch.empty(1, 6, dtype=dtype),
            }
        if config.encoder_hid_dim_type == "ip_image_proj":
            kwargs.setdefault("added_cond_kwargs", {})["image_embeds"] = self._adapter_inputs(dtype)
        return DenoiserInputs((torch.empty(1, config.in_channels, y, x, dtype=dtype), torch.tensor(1)), kwargs)

    def _adapter_inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Embeddings of one picture for each IP-Adapter; those of the plus kind take a sequence."""
        found = []
        for layer in self.denoiser.encoder_hid_proj.image_projection_layers:
            width = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear)).in_features
            shape = (1, 1, 1, width) if "Plus" in type(layer).__name__ else (1, 1, width)
            found.append(torch.empty(shape, dtype=dtype))
        return found

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        device = self.pipe._execution_device
        if "text_encoder_2" in self.text_encoders:
            embeddings, _, pooled, _ = self.pipe.encode_prompt(
                prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False,
                **self.encoding_options(arguments),
            )  # fmt: skip
            return EncodedPrompt(embeddings, pooled)
        embeddings, _ = self.pipe.encode_prompt(prompts, device, 1, False, **self.encoding_options(arguments))
        return EncodedPrompt(embeddings)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """Embeddings, and XL's pooled vector."""
        added = kwargs.get("added_cond_kwargs") or {}
        return EncodedPrompt(kwargs["encoder_hidden_states"], added.get("text_embeds"))

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the embeddings, and XL's pooled vector if one is given."""
        changed = {**kwargs, "encoder_hidden_states": text.embeddings}
        if text.pooled is not None:
            changed["added_cond_kwargs"] = {**kwargs["added_cond_kwargs"], "text_embeds": text.pooled}
        return changed
