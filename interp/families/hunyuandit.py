"""HunyuanDiT: cross-attention with rotary embedding of the queries, to CLIP's states and then T5's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import (
    SUPPORTED_SHAPE,
    get_resize_crop_region_for_grid,
    map_to_standard_shapes,
)

from interp.families.facts import Arguments, DenoiserInputs, EncodedPrompt
from interp.families.patches import PatchedFamily
from interp.tokens import Tokens, join, tokenize

_CLIP, _T5 = 77, 256
_ENCODERS = (("text_encoder", _CLIP), ("text_encoder_2", _T5))


class HunyuanDiTFamily(PatchedFamily):
    """`HunyuanDiTPipeline`: rows [uncond, cond]; masked text positions hold a learned state, which is attended to.

    The two encoders' states have different widths: in `EncodedPrompt.embeddings` the narrower ones end in zeros.
    """

    name = "hunyuandit"
    pipelines: ClassVar[frozenset[str]] = frozenset({"HunyuanDiTPipeline"})  # PAG's and the ControlNet's are others
    multiple = 16
    text_elsewhere = True
    shared: ClassVar[frozenset[str]] = frozenset({"image_rotary_emb"})

    def without_probabilities(self) -> dict[str, str]:
        """Attention that pools T5's states into one vector for the time embedding."""
        return {
            "transformer.time_extra_emb.pooler": "HunyuanDiT's pooler attends from the mean of the text to the text"
        }

    def picture_size(self, arguments: Arguments) -> tuple[int, int]:
        """With `use_resolution_binning` one of ten sizes, whatever was asked for."""
        height, width = super().picture_size(arguments)
        if arguments.get("use_resolution_binning") and (height, width) not in SUPPORTED_SHAPE:
            width, height = map_to_standard_shapes(width, height)
        return int(height), int(width)

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is given it rounded to its dtype: the scheduler knows better."""

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        config, dtype, grid = self.denoiser.config, self.denoiser.dtype, self.grid(arguments)
        corners = get_resize_crop_region_for_grid(grid, 512 // 8 // config.patch_size)
        head = self.denoiser.inner_dim // self.denoiser.num_heads
        kwargs = {
            "encoder_hidden_states": torch.empty(1, _CLIP, config.cross_attention_dim, dtype=dtype),
            "text_embedding_mask": torch.ones(1, _CLIP, dtype=torch.int64),
            "encoder_hidden_states_t5": torch.empty(1, _T5, config.cross_attention_dim_t5, dtype=dtype),
            "text_embedding_mask_t5": torch.ones(1, _T5, dtype=torch.int64),
            "image_meta_size": torch.empty(1, 6, dtype=dtype),
            "style": torch.zeros(1, dtype=torch.int64),
            "image_rotary_emb": get_2d_rotary_pos_embed(head, corners, grid, device="cpu", output_type="pt"),
        }
        return DenoiserInputs(
            (torch.empty(1, *self.latent_shape(arguments), dtype=dtype), torch.ones(1, dtype=dtype)), kwargs
        )

    def text_length(self, arguments: Arguments | None = None) -> int:
        """CLIP's 77 positions and T5's 256."""
        return _CLIP + _T5

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """CLIP's tokens (of a BERT tokenizer), then T5's."""
        first, second = (tokenize(self.text_encoders[name][0], prompt, length) for name, length in _ENCODERS)
        return join(first, second)

    def text_segments(self, arguments: Arguments | None = None) -> dict[str, slice]:
        """CLIP, then T5."""
        return {"text_encoder": slice(0, _CLIP), "text_encoder_2": slice(_CLIP, _CLIP + _T5)}

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`, once an encoder."""
        states, masks = [], []
        for index, (_, length) in enumerate(_ENCODERS):
            embeddings, _, mask, _ = self.pipe.encode_prompt(
                prompt=prompts, device=self.pipe._execution_device, dtype=self.denoiser.dtype,
                do_classifier_free_guidance=False, max_sequence_length=length, text_encoder_index=index,
            )  # fmt: skip
            states.append(embeddings)
            masks.append(mask)
        return EncodedPrompt(_level(states), mask=torch.cat(masks, 1))

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """Both encoders' states after each other, and their masks."""
        states = _level([kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states_t5"]])
        return EncodedPrompt(
            states, mask=torch.cat([kwargs["text_embedding_mask"], kwargs["text_embedding_mask_t5"]], 1)
        )

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange both encoders' states, and their masks if they are given."""
        changed = dict(kwargs)
        for name, span in (
            ("encoder_hidden_states", slice(0, _CLIP)),
            ("encoder_hidden_states_t5", slice(_CLIP, None)),
        ):
            changed[name] = text.embeddings[:, span, : kwargs[name].shape[-1]].contiguous()
        if text.mask is not None:
            changed["text_embedding_mask"], changed["text_embedding_mask_t5"] = text.mask.split([_CLIP, _T5], 1)
        return changed

    def layer_text(self, text: EncodedPrompt) -> tuple[torch.Tensor, None]:
        """T5's states are projected to CLIP's width, and a learned state stands where the text is masked."""
        clip = text.embeddings[:, :_CLIP, : self.denoiser.config.cross_attention_dim]
        t5 = text.embeddings[:, _CLIP:, : self.denoiser.config.cross_attention_dim_t5]
        assert text.mask is not None
        states = torch.cat([clip, self.denoiser.text_embedder(t5)], 1)
        return torch.where(text.mask[..., None].bool(), states, self.denoiser.text_embedding_padding), None


def _level(states: list[torch.Tensor]) -> torch.Tensor:
    """Put (sample, token, feature) tensors of different widths after each other, the narrower ones filled with zeros."""
    width = max(s.shape[-1] for s in states)
    return torch.cat([F.pad(s, (0, width - s.shape[-1])) for s in states], 1)
