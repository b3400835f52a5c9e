"""AuraFlow: joint attention over [registers, text, image] in two-stream and one-stream blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from interp.families.base import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Family, Spans


class AuraFlowFamily(Family):
    """`AuraFlowPipeline`: rows [uncond, cond].

    Eight learned registers lie before the text and are attended to like it; they are no tokens of the prompt, so the
    probabilities of text and image together sum to less than 1, by what the registers get. Padding is not masked.
    """

    name = "auraflow"

    @staticmethod
    def matches(pipe: Any) -> bool:
        """The text-to-image pipeline."""
        return any(c.__name__ == "AuraFlowPipeline" for c in type(pipe).__mro__)

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of latents."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def registers(self) -> int:
        """Positions before the text."""
        return int(self.denoiser.register_tokens.shape[1])

    def attention_sites(self) -> list[AttentionSite]:
        """Two-stream blocks, then one-stream blocks."""
        return [
            AttentionSite(f"transformer.{name}", module, "joint", module.heads)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention)
        ]

    def output_index(self, path: str) -> int:
        """Two-stream blocks give (text, image)."""
        return int(path.rsplit(".", 1)[0] == "transformer.joint_transformer_blocks")

    def default_size(self) -> tuple[int, int]:
        """As the pipeline has it."""
        given = self.arguments()
        return int(given["height"]), int(given["width"])

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """One latent position per `vae_scale_factor`² pixels."""
        scale, (height, width) = self.pipe.vae_scale_factor, self.size(arguments)
        return self.denoiser.config.in_channels, height // scale, width // scale

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is given a thousandth of it, rounded to its dtype: the scheduler knows better."""

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per patch of the latents."""
        _, y, x = self.latent_shape(arguments)
        return y // self.denoiser.config.patch_size, x // self.denoiser.config.patch_size

    def joint_length(self, arguments: Arguments) -> int:
        """Registers, text and image."""
        return self.registers + super().joint_length(arguments)

    def spans(self, site: AttentionSite, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Spans:
        """Registers, text, image; also in one-stream blocks, which see one sequence."""
        image = self.registers + int(kwargs["encoder_hidden_states"].shape[1])
        text, rest = slice(self.registers, image), slice(image, queries)
        return Spans(rest, text, rest, text)

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype = self.denoiser.config, self.denoiser.dtype
        states = torch.empty(1, self.text_length(arguments), config.joint_attention_dim, dtype=dtype)
        latents = torch.empty(1, *self.latent_shape(arguments), dtype=dtype)
        return DenoiserInputs((latents,), {"encoder_hidden_states": states, "timestep": torch.ones(1, dtype=dtype)})

    def text_length(self, arguments: Arguments | None = None) -> int:
        """256 positions, unless the call says otherwise."""
        return int((self.arguments() if arguments is None else arguments)["max_sequence_length"])

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`, which zeroes the padding."""
        embeddings, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.pipe._execution_device,
            max_sequence_length=self.text_length(arguments),
        )  # fmt: skip
        return EncodedPrompt(embeddings)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """The states, without registers."""
        return EncodedPrompt(kwargs["encoder_hidden_states"])

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states."""
        return {**kwargs, "encoder_hidden_states": text.embeddings}
