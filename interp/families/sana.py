"""Sana: linear self-attention, and cross-attention to the states of a language model, which is given an instruction."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.sana.pipeline_sana import (
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
    ASPECT_RATIO_2048_BIN,
    ASPECT_RATIO_4096_BIN,
)

from interp.families.base import Family
from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt
from interp.families.pixart import PixArtFamily
from interp.tokens import Tokens, padded, tokenize

_INSTRUCTION = "complex_human_instruction"


class SanaFamily(PixArtFamily):
    """`SanaPipeline`: rows [uncond, cond] and binned sizes as PixArt has them.

    Of the instruction before the prompt the denoiser reads nothing: the states of its tokens are cut out.
    """

    name = "sana"
    pipelines: ClassVar[frozenset[str]] = frozenset(
        {"SanaPipeline"}
    )  # Sprint's changes the latents, PAG's has more rows
    multiple = 32
    bins: ClassVar[Mapping[int, Mapping[str, Any]]] = {
        128: ASPECT_RATIO_4096_BIN, 64: ASPECT_RATIO_2048_BIN, 32: ASPECT_RATIO_1024_BIN, 16: ASPECT_RATIO_512_BIN,
    }  # fmt: skip

    def attention_sites(self) -> list[AttentionSite]:
        """The cross-attention of every block."""
        return [s for s in super().attention_sites() if s.kind == "cross"]

    def without_probabilities(self) -> dict[str, str]:
        """Self-attention forms Σ v·relu(k)ᵀ once and multiplies it by relu(q): no softmax, no row that sums to 1."""
        linear = [s.name for s in super().attention_sites() if s.kind == "self"]
        return dict.fromkeys(linear, "Sana's self-attention is linear and has no softmax probabilities")

    def next_latents(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """As the scheduler gives them, also after a single step."""
        return Family.next_latents(self, out, arguments)

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype, length = self.denoiser.config, self.denoiser.dtype, self.text_length(arguments)
        kwargs = {
            "encoder_hidden_states": torch.empty(1, length, config.caption_channels, dtype=dtype),
            "encoder_attention_mask": torch.ones(1, length, dtype=torch.int64),
            "timestep": torch.ones(1),
        }
        return DenoiserInputs((torch.empty(1, *self.latent_shape(arguments), dtype=dtype),), kwargs)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The scheduler's own, which the model is given scaled."""
        return super().timestep(args, kwargs) / self.denoiser.config.timestep_scale

    def negative_arguments(self, arguments: Arguments) -> Arguments:
        """A negative prompt is read without the instruction."""
        return {**arguments, _INSTRUCTION: None}

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The first token, and the last ones of instruction and prompt: as many as the denoiser reads."""
        arguments = self.arguments() if arguments is None else arguments
        length, tokenizer = self.text_length(arguments), self.pipe.tokenizer
        cleaned = self.pipe._text_preprocessing(prompt, clean_caption=self._clean(arguments))[0]
        lines = arguments.get(_INSTRUCTION)
        if not lines:
            return padded(tokenize(tokenizer, cleaned, length, pad=False), tokenizer, length, "right")
        before = "\n".join(lines)
        whole = len(tokenizer.encode(before)) + length - 2
        tokens = padded(tokenize(tokenizer, cleaned, whole, prefix=before, pad=False), tokenizer, whole, "right")
        kept = [0, *range(whole - length + 1, whole)]
        ids, text, role, word = (
            [values[i] for i in kept] for values in (tokens.ids, tokens.text, tokens.role, tokens.word)
        )
        return Tokens(ids, text, role, word, tokens.words, tokens.eos - (whole - length))

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        arguments = self.arguments() if arguments is None else arguments
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.pipe._execution_device,
            clean_caption=self._clean(arguments), max_sequence_length=self.text_length(arguments),
            complex_human_instruction=arguments.get(_INSTRUCTION),
        )  # fmt: skip
        return EncodedPrompt(embeddings, mask=mask)

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The states are projected to the transformer's width, and normed."""
        states, bias = super().layer_text(text)
        return self.denoiser.caption_norm(states), bias
