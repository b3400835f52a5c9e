"""Stable Diffusion 3 and 3.5: joint attention over [image, text], the text being CLIP's 77 positions and then T5's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Pass, Spans
from interp.families.patches import PatchedFamily, level_shift
from interp.tokens import Tokens, join, tokenize


class SD3Family(PatchedFamily):
    """`StableDiffusion3Pipeline`: rows [uncond, cond]; 3.5 adds query and key norms and self-attention beside the joint one."""

    name = "sd3"
    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusion3Pipeline"})  # PAG's has another number of rows
    text_first_blocks: ClassVar[frozenset[str]] = frozenset({"transformer_blocks"})
    text_arguments: ClassVar[Mapping[str, str]] = {
        "embeddings": "encoder_hidden_states", "pooled": "pooled_projections",
    }  # fmt: skip

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of latents."""
        return max(8, self.pipe.vae_scale_factor * self.pipe.patch_size)

    def attention_kind(self, path: str, module: Any) -> str:
        """In every block joint attention, then (3.5) self-attention of the image."""
        return "self" if module.added_kv_proj_dim is None else "joint"

    def branches(self, call: Pass) -> tuple[str, ...]:
        """[uncond, cond] rows under guidance; the third pass of skip-layer guidance is of no branch."""
        if call.kwargs.get("skip_layers") is not None:
            return ()
        return ("uncond", "cond") if self.pipe.do_classifier_free_guidance else ("cond",)

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """3.5 Large Turbo and others shift the noise levels with the size."""
        config, given = self.pipe.scheduler.config, arguments.get("mu")
        if given is not None:
            return {"mu": given}
        if not config.get("use_dynamic_shifting"):
            return {}
        return {"mu": level_shift(config, self.grid(arguments), most=1.16)}

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
