"""FLUX.1: joint attention over [text, image] in two-stream and one-stream blocks, packed latents, one call per branch."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention

from interp.families.facts import Arguments, DenoiserInputs, EncodedPrompt, Pass
from interp.families.packing import PackedFamily
from interp.tokens import Tokens, tokenize


class FluxFamily(PackedFamily):
    """FLUX.1 pipelines: guidance-distilled (one call a step), or true guidance (`true_cfg_scale` and a negative prompt).

    `guidance_scale` is then an input of the model; the scale w of u + w·(c − u) is `true_cfg_scale`, an option.
    """

    name = "flux"
    # Text-to-image, image-to-image and control (Canny, Depth): in all three the call with text comes first, which was read
    # in their source. Others (Kontext, Fill, ControlNet, inpainting) give the transformer more than the latents, or change
    # them.
    pipelines: ClassVar[frozenset[str]] = frozenset({"FluxPipeline", "FluxImg2ImgPipeline", "FluxControlPipeline"})
    sequential: ClassVar[bool] = True
    needs_negative: ClassVar[bool] = True
    attention: ClassVar[tuple[type[torch.nn.Module], ...]] = (FluxAttention,)
    text_first_blocks: ClassVar[frozenset[str]] = frozenset({"transformer_blocks", "single_transformer_blocks"})
    text_arguments: ClassVar[Mapping[str, str]] = {
        "embeddings": "encoder_hidden_states", "pooled": "pooled_projections",
    }  # fmt: skip

    def asked_guidance(self, arguments: Arguments) -> float:
        """The scale of true guidance."""
        return float(arguments.get("true_cfg_scale") or 1)

    def branches(self, call: Pass) -> tuple[str, ...]:
        """As `cache_context` names the call; where the pipeline does not, first the one with text, then the one without."""
        if call.context is not None:
            return super().branches(call)
        return ("cond",) if call.index == 0 else ("uncond",)

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

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, kwargs = self.denoiser.config, self.packed_inputs(arguments)
        states, patches = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        more = {
            "guidance": torch.ones(1) if config.guidance_embeds else None,
            "pooled_projections": states.new_empty(1, config.pooled_projection_dim),
            "txt_ids": states.new_zeros(states.shape[1], 3),
            "img_ids": states.new_zeros(patches.shape[1], 3),
        }
        return DenoiserInputs((), {**kwargs, **more})

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
