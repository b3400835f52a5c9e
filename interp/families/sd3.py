"""Stable Diffusion 3 and 3.5: joint attention over [image, text], the text being CLIP's 77 positions and then T5's."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from interp.families.base import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Family, Pass, Spans
from interp.tokens import Tokens, join, tokenize


class SD3Family(Family):
    """`StableDiffusion3Pipeline`: rows [uncond, cond]; 3.5 adds query and key norms and self-attention beside the joint one."""

    name = "sd3"

    @staticmethod
    def matches(pipe: Any) -> bool:
        """The text-to-image pipeline; PAG's has another number of rows."""
        return any(c.__name__ == "StableDiffusion3Pipeline" for c in type(pipe).__mro__)

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of latents."""
        return max(8, self.pipe.vae_scale_factor * self.pipe.patch_size)

    def attention_sites(self) -> list[AttentionSite]:
        """In every block joint attention, then (3.5) self-attention of the image."""
        return [
            AttentionSite(f"transformer.{name}", m, "self" if m.added_kv_proj_dim is None else "joint", m.heads)
            for name, m in self.denoiser.named_modules()
            if isinstance(m, Attention)
        ]

    def output_index(self, path: str) -> int:
        """Blocks give (text, image)."""
        return int(path.rsplit(".", 1)[0] == "transformer.transformer_blocks")

    def branches(self, call: Pass) -> tuple[str, ...]:
        """[uncond, cond] rows under guidance; the third pass of skip-layer guidance is of no branch."""
        if call.kwargs.get("skip_layers") is not None:
            return ()
        return ("uncond", "cond") if self.pipe.do_classifier_free_guidance else ("cond",)

    def default_size(self) -> tuple[int, int]:
        """The transformer's training size."""
        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return size, size

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """One latent position per `vae_scale_factor`² pixels."""
        scale, (height, width) = self.pipe.vae_scale_factor, self.size(arguments)
        return self.denoiser.config.in_channels, height // scale, width // scale

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """3.5 Large Turbo and others shift the noise levels with the size."""
        config, given = self.pipe.scheduler.config, arguments.get("mu")
        if given is not None:
            return {"mu": given}
        if not config.get("use_dynamic_shifting"):
            return {}
        y, x = self.grid(arguments)
        names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.16))
        return {"mu": calculate_shift(y * x, *(config.get(name, default) for name, default in names))}

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per patch of the latents."""
        _, y, x = self.latent_shape(arguments)
        return y // self.pipe.patch_size, x // self.pipe.patch_size

    def spans(self, site: AttentionSite, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Spans:
        """The image first, then the text."""
        if site.kind == "self":
            return super().spans(site, queries, keys, kwargs)
        text = int(kwargs["encoder_hidden_states"].shape[1])
        image, rest = slice(0, queries - text), slice(queries - text, queries)
        return Spans(image, rest, image, rest)

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype = self.denoiser.config, self.denoiser.dtype
        kwargs = {
            "hidden_states": torch.empty(1, *self.latent_shape(arguments), dtype=dtype),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.empty(
                1, self.text_length(arguments), config.joint_attention_dim, dtype=dtype
            ),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim, dtype=dtype),
        }
        return DenoiserInputs((), kwargs)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The scheduler's own, one for all rows."""
        return float(kwargs["timestep"].flatten()[0])

    def _t5_length(self, arguments: Arguments | None) -> int:
        return int((self.arguments() if arguments is None else arguments)["max_sequence_length"])

    def text_length(self, arguments: Arguments | None = None) -> int:
        """CLIP's 77 positions and T5's, 256 unless the call says otherwise."""
        return int(self.pipe.tokenizer_max_length) + self._t5_length(arguments)

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """CLIP's tokens (both CLIP encoders share positions), then T5's; without T5 its positions hold zeros."""
        clip, length = tokenize(self.pipe.tokenizer, prompt, self.pipe.tokenizer_max_length), self._t5_length(arguments)
        if self.pipe.text_encoder_3 is not None:
            return join(clip, tokenize(self.pipe.tokenizer_3, prompt, length))
        return join(clip, Tokens([-1] * length, [""] * length, ["pad"] * length, [-1] * length, clip.words, length))

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """CLIP-L beside CLIP-G (features), then T5."""
        clip = int(self.pipe.tokenizer_max_length)
        t5 = {} if self.pipe.text_encoder_3 is None else {"text_encoder_3": slice(clip, self.text_length(arguments))}
        return {"text_encoder": slice(0, clip), **t5}

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=self.pipe._execution_device,
            do_classifier_free_guidance=False, max_sequence_length=self._t5_length(arguments),
            **self.encoding_options(arguments),
        )  # fmt: skip
        return EncodedPrompt(embeddings, pooled)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """All states, and the pooled vectors of both CLIP encoders."""
        return EncodedPrompt(kwargs["encoder_hidden_states"], kwargs["pooled_projections"])

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states, and the pooled vectors if they are given."""
        changed = {**kwargs, "encoder_hidden_states": text.embeddings}
        return changed if text.pooled is None else {**changed, "pooled_projections": text.pooled}
