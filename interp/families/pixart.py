"""PixArt-α and PixArt-Σ: a diffusion transformer with cross-attention to T5 states, which are masked."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.utils import is_bs4_available, is_ftfy_available

from interp.families.base import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Family
from interp.tokens import Tokens, tokenize


class PixArtFamily(Family):
    """Both PixArt pipelines: rows [uncond, cond], self- and cross-attention in every block."""

    name = "pixart"
    bins: ClassVar[Mapping[int, Mapping[str, Any]]] = {
        256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    }
    """The transformer's training size in latents → the sizes that a picture may have."""

    @staticmethod
    def matches(pipe: Any) -> bool:
        """The two pipelines by class; PAG's has another number of rows."""
        return any(c.__name__ in ("PixArtAlphaPipeline", "PixArtSigmaPipeline") for c in type(pipe).__mro__)

    def attention_sites(self) -> list[AttentionSite]:
        """In every block self-attention, then cross-attention."""
        return [
            AttentionSite(f"transformer.{name}", module, "cross" if module.is_cross_attention else "self", module.heads)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention)
        ]

    def default_size(self) -> tuple[int, int]:
        """The transformer's training size."""
        size = self.denoiser.config.sample_size * self.pipe.vae_scale_factor
        return size, size

    def size(self, arguments: Arguments) -> tuple[int, int]:
        """With `use_resolution_binning` the nearest size of the training's; the picture is resized afterwards."""
        height, width = super().size(arguments)
        if not arguments.get("use_resolution_binning"):
            return height, width
        bins = self.bins.get(self.denoiser.config.sample_size)
        if bins is None:  # the pipeline will refuse it
            return height, width
        return self.pipe.image_processor.classify_height_width_bin(height, width, ratios=bins)

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """One latent position per `vae_scale_factor`² pixels."""
        height, width = self.size(arguments)
        scale = self.pipe.vae_scale_factor
        return self.denoiser.config.in_channels, height // scale, width // scale

    def next_latents(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """A run of one step goes on with the predicted x_0 (the distilled DMD model)."""
        single = arguments.get("num_inference_steps") == 1 and isinstance(out, tuple)
        return out[1] if single else super().next_latents(out, arguments)

    def prediction(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """Without the learned variance, the second half of the channels."""
        return super().prediction(out, arguments)[:, : self.denoiser.config.in_channels]

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per patch of the latents."""
        _, y, x = self.latent_shape(arguments)
        return y // self.denoiser.config.patch_size, x // self.denoiser.config.patch_size

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype, length = self.denoiser.config, self.denoiser.dtype, self.text_length(arguments)
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == 128:
            added = {"resolution": torch.empty(1, 2, dtype=dtype), "aspect_ratio": torch.empty(1, 1, dtype=dtype)}
        width = config.caption_channels or config.cross_attention_dim
        kwargs = {
            "encoder_hidden_states": torch.empty(1, length, width, dtype=dtype),
            "encoder_attention_mask": torch.ones(1, length, dtype=torch.int64),
            "timestep": torch.ones(1),
            "added_cond_kwargs": added,
        }
        return DenoiserInputs((torch.empty(1, *self.latent_shape(arguments), dtype=dtype),), kwargs)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The scheduler's own, one for all rows."""
        return float(torch.as_tensor(kwargs["timestep"]).flatten()[0])

    def text_length(self, arguments: Arguments | None = None) -> int:
        """120 (α) or 300 (Σ), unless the call says otherwise."""
        return int((self.arguments() if arguments is None else arguments)["max_sequence_length"])

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The pipeline lower-cases the prompt, or cleans it."""
        cleaned = self.pipe._text_preprocessing(prompt, clean_caption=self._clean(arguments))[0]
        return tokenize(self.pipe.tokenizer, cleaned, self.text_length(arguments))

    def _clean(self, arguments: Arguments | None) -> bool:
        asked = (self.arguments() if arguments is None else arguments).get("clean_caption")
        return bool(asked) and is_bs4_available() and is_ftfy_available()  # else the pipeline does not clean either

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.pipe._execution_device,
            clean_caption=self._clean(arguments), max_sequence_length=self.text_length(arguments),
        )  # fmt: skip
        return EncodedPrompt(embeddings, mask=mask)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """T5 states and their mask."""
        return EncodedPrompt(kwargs["encoder_hidden_states"], mask=kwargs["encoder_attention_mask"])

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states, and the mask if one is given."""
        changed = {**kwargs, "encoder_hidden_states": text.embeddings}
        return changed if text.mask is None else {**changed, "encoder_attention_mask": text.mask}

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The captions are projected to the transformer's width first."""
        states, bias = super().layer_text(text)
        return (states if self.denoiser.caption_projection is None else self.denoiser.caption_projection(states)), bias
