"""PixArt-α and PixArt-Σ: a diffusion transformer with cross-attention to T5 states, which are masked."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from diffusers.utils import is_bs4_available, is_ftfy_available

from interp.families.facts import Arguments, DenoiserInputs, EncodedPrompt
from interp.families.patches import PatchedFamily
from interp.tokens import Tokens, tokenize


class PixArtFamily(PatchedFamily):
    """Both PixArt pipelines: rows [uncond, cond], self- and cross-attention in every block."""

    name = "pixart"
    pipelines: ClassVar[frozenset[str]] = frozenset({"PixArtAlphaPipeline", "PixArtSigmaPipeline"})  # PAG has more rows
    text_arguments: ClassVar[Mapping[str, str]] = {
        "embeddings": "encoder_hidden_states", "mask": "encoder_attention_mask",
    }  # fmt: skip
    bins: ClassVar[Mapping[int, Mapping[str, Any]]] = {
        256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
    }
    """The transformer's training size in latents → the sizes that a picture may have."""

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

    def next_latents(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """A run of one step goes on with the predicted x_0 (the distilled DMD model)."""
        single = arguments.get("num_inference_steps") == 1 and isinstance(out, tuple)
        return out[1] if single else super().next_latents(out, arguments)

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

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The captions are projected to the transformer's width first."""
        states, bias = super().layer_text(text)
        return (states if self.denoiser.caption_projection is None else self.denoiser.caption_projection(states)), bias
