"""What a family knows of the text: tokens, encoders, and the states that the denoiser is given."""

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from interp.families.described import Described
from interp.families.facts import Arguments, EncodedPrompt
from interp.tokens import Tokens, tokenize


class TextFacts(Described):
    """*kwargs* are those of one denoiser call."""

    ragged: ClassVar[bool] = False
    """Prompts have as many text states as tokens, unlike each other."""
    encodes_padded: ClassVar[bool] = False
    """The encoder reads as many positions as a prompt may have, whatever it has."""
    text_elsewhere: ClassVar[bool] = False
    """Text reaches the denoiser by another way than attention and a pooled vector."""
    text_arguments: ClassVar[Mapping[str, str]] = {"embeddings": "encoder_hidden_states"}
    """Field of `EncodedPrompt` → the denoiser's argument that holds it."""

    def text_length(self, arguments: Arguments | None = None) -> int:
        """Token positions of the text that the denoiser receives, at most: what the call says, or the tokenizer."""
        given = (self._defaults() if arguments is None else arguments).get("max_sequence_length")
        return int(next(iter(self.text_encoders.values()))[0].model_max_length if given is None else given)

    def _defaults(self) -> dict[str, Any]:
        parameters = inspect.signature(type(self.pipe).__call__).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """Tokenise a prompt: its positions are exactly those of the text in the denoiser's attention."""
        return tokenize(next(iter(self.text_encoders.values()))[0], prompt, self.text_length(arguments))

    def negative_arguments(self, arguments: Arguments) -> Arguments:
        """Return the arguments with which negative prompts are tokenised and encoded; some models treat them differently."""
        return arguments

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """Encoder → its positions in the text: encoders may follow each other (Stable Diffusion 3)."""
        return {next(iter(self.text_encoders)): slice(0, None)}

    def encoding_options(self, arguments: Arguments | None) -> dict[str, Any]:
        """What a call says about encoding, as `encode_prompt` takes it: layers of CLIP to skip, scale of a LoRA."""
        given = arguments or {}
        scaled = given.get("cross_attention_kwargs") or given.get("joint_attention_kwargs") or {}
        known = inspect.signature(self.pipe.encode_prompt).parameters
        found = {"clip_skip": given.get("clip_skip"), "lora_scale": scaled.get("scale")}
        return {name: value for name, value in found.items() if name in known and value is not None}

    @property
    def encoder_offset(self) -> int:
        """How many of the encoder's first positions are left out of the text that the denoiser reads."""
        return 0

    @abstractmethod
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode prompts exactly as the pipeline does for the branch with text."""

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """Read the text states out of a denoiser call's keyword arguments (all rows)."""
        return EncodedPrompt(**{field: kwargs[name] for field, name in self.text_arguments.items()})

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Return the denoiser call's keyword arguments with other text states; the given dict is not touched.

        Pooled vector and mask are exchanged if they are given.
        """
        given = {name: getattr(text, field) for field, name in self.text_arguments.items()}
        return {**kwargs, **{name: value for name, value in given.items() if value is not None}}

    def widened(self, text: EncodedPrompt, width: int) -> EncodedPrompt:
        """Return the text states with room for `width` tokens, where prompts have as many states as tokens."""
        return text

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what cross-attention layers make their keys and values of: states, and the mask as a bias.

        The states are (row, token, feature) after the denoiser's own projection of them; the bias is (row, 1, token), 0
        where a token is attended to.
        """
        if text.mask is None:
            return text.embeddings, None
        return text.embeddings, ((1 - text.mask.to(text.embeddings.dtype)) * -10000.0)[:, None]
