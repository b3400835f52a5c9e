"""AuraFlow: joint attention over [registers, text, image] in two-stream and one-stream blocks."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Spans
from interp.families.patches import PatchedFamily


class AuraFlowFamily(PatchedFamily):
    """`AuraFlowPipeline`: rows [uncond, cond].

    Eight learned registers lie before the text and are attended to like it; they are no tokens of the prompt, so the
    probabilities of text and image together sum to less than 1, by what the registers get. Padding is not masked.
    """

    name = "auraflow"
    pipelines: ClassVar[frozenset[str]] = frozenset({"AuraFlowPipeline"})
    text_first_blocks: ClassVar[frozenset[str]] = frozenset({"joint_transformer_blocks"})

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of latents."""
        return 2 * int(self.pipe.vae_scale_factor)

    @property
    def registers(self) -> int:
        """Positions before the text."""
        return int(self.denoiser.register_tokens.shape[1])

    def attention_kind(self, path: str, module: Any) -> str:
        """Joint, everywhere."""
        return "joint"

    def default_size(self) -> tuple[int, int]:
        """As the pipeline has it."""
        given = self.arguments()
        return int(given["height"]), int(given["width"])

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is given a thousandth of it, rounded to its dtype: the scheduler knows better."""

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

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`, which zeroes the padding."""
        embeddings, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.pipe._execution_device,
            max_sequence_length=self.text_length(arguments),
        )  # fmt: skip
        return EncodedPrompt(embeddings)
