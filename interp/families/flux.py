"""FLUX.1: joint attention over [text, image] in two-stream and one-stream blocks, packed latents, one call per branch."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from interp.families.base import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Pass
from interp.families.packing import PackedFamily
from interp.tokens import Tokens, tokenize

# Text-to-image, image-to-image and control (Canny, Depth): in all three the call with text comes first, which was read in
# their source. Others (Kontext, Fill, ControlNet, inpainting) give the transformer more than the latents, or change them.
_PIPELINES = {"FluxPipeline", "FluxImg2ImgPipeline", "FluxControlPipeline"}


class FluxFamily(PackedFamily):
    """FLUX.1 pipelines: guidance-distilled (one call a step), or true guidance (`true_cfg_scale` and a negative prompt).

    `guidance_scale` is then an input of the model; the scale w of u + w·(c − u) is `true_cfg_scale`, an option.
    """

    name = "flux"
    sequential: ClassVar[bool] = True

    @staticmethod
    def matches(pipe: Any) -> bool:
        """Tell by the pipeline's class or one of its bases."""
        return any(c.__name__ in _PIPELINES for c in type(pipe).__mro__)

    def attention_sites(self) -> list[AttentionSite]:
        """Two-stream blocks, then one-stream blocks."""
        return [
            AttentionSite(f"transformer.{name}", module, "joint", module.heads)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, FluxAttention)
        ]

    def output_index(self, path: str) -> int:
        """Blocks of both kinds give (text, image)."""
        return int(
            path.rsplit(".", 1)[0] in ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
        )

    def run_arguments(
        self, guidance_scale: float, negative_prompts: Sequence[str], options: Arguments, any_negative: bool
    ) -> dict[str, Any]:
        """With `true_cfg_scale` above 1 the negative prompt is always given, since the pipeline has no guidance without."""
        asked: dict[str, Any] = {"guidance_scale": guidance_scale, **options}
        if self.applied_guidance(asked) > 1:
            asked["negative_prompt"] = list(negative_prompts)
        return asked

    def guided(self, arguments: Arguments) -> bool:
        """True guidance needs a scale above 1 and a negative prompt, be it empty."""
        negative = arguments.get("negative_prompt") is not None or arguments.get("negative_prompt_embeds") is not None
        return negative and self.applied_guidance(arguments) > 1

    def branches(self, call: Pass) -> tuple[str, ...]:
        """As `cache_context` names the call; where the pipeline does not, first the one with text, then the one without."""
        if call.context is not None:
            return super().branches(call)
        return ("cond",) if call.index == 0 else ("uncond",)

    def applied_guidance(self, arguments: Arguments) -> float:
        """The scale of true guidance."""
        return float(arguments.get("true_cfg_scale") or 1)

    @property
    def channels(self) -> int:
        """Of what the transformer predicts; a control model is given as many more, of the control picture."""
        config = self.denoiser.config
        return int(config.out_channels or config.in_channels)

    def skipped_steps(self, arguments: Arguments) -> int:
        """Image-to-image leaves out the first 1 − strength of the steps."""
        if arguments.get("strength") is None:
            return 0
        steps = int(arguments["num_inference_steps"])
        return int(max(steps - min(steps * float(arguments["strength"]), steps), 0))

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """Evenly spaced noise levels, shifted with the size."""
        config, steps = self.pipe.scheduler.config, int(arguments["num_inference_steps"])
        y, x = self.grid(arguments)
        names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        shift = {"mu": calculate_shift(y * x, *(config.get(name, default) for name, default in names))}
        if config.get("use_flow_sigmas"):
            return shift
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), **shift}

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype, length = self.denoiser.config, self.denoiser.dtype, self.text_length(arguments)
        y, x = self.grid(arguments)
        kwargs = {
            "hidden_states": torch.empty(1, y * x, config.in_channels, dtype=dtype),
            "timestep": torch.ones(1, dtype=dtype),
            "guidance": torch.ones(1) if config.guidance_embeds else None,
            "pooled_projections": torch.empty(1, config.pooled_projection_dim, dtype=dtype),
            "encoder_hidden_states": torch.empty(1, length, config.joint_attention_dim, dtype=dtype),
            "txt_ids": torch.zeros(length, 3, dtype=dtype),
            "img_ids": torch.zeros(y * x, 3, dtype=dtype),
        }
        return DenoiserInputs((), kwargs)

    def text_length(self, arguments: Arguments | None = None) -> int:
        """T5's 512 positions, unless the call says otherwise."""
        return int((self.arguments() if arguments is None else arguments)["max_sequence_length"])

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The attention sees T5's positions; of CLIP the model reads the pooled vector alone."""
        return tokenize(self.pipe.tokenizer_2, prompt, self.text_length(arguments))

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """T5."""
        return {"text_encoder_2": slice(0, None)}

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        embeddings, pooled, _ = self.pipe.encode_prompt(
            prompt=prompts, device=self.pipe._execution_device, max_sequence_length=self.text_length(arguments),
            **self.encoding_options(arguments),
        )  # fmt: skip
        return EncodedPrompt(embeddings, pooled)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """T5 states, and CLIP's pooled vector."""
        return EncodedPrompt(kwargs["encoder_hidden_states"], kwargs["pooled_projections"])

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states, and the pooled vector if one is given."""
        changed = {**kwargs, "encoder_hidden_states": text.embeddings}
        return changed if text.pooled is None else {**changed, "pooled_projections": text.pooled}
