"""Qwen-Image: joint attention over [text, image], states of a language model without its template's beginning."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from interp.errors import InterpError
from interp.families.base import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt
from interp.families.packing import PackedFamily, pack, unpack
from interp.families.ragged import lengthened, trimmed, with_gaps
from interp.tokens import Tokens, tokenize


class QwenImageFamily(PackedFamily):
    """`QwenImagePipeline`: a call per branch; the guided prediction of each patch gets the norm of the one with text.

    A run's `guidance_scale` is the pipeline's `true_cfg_scale`.
    """

    name = "qwenimage"
    ragged: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    guidance_argument: ClassVar[str] = "true_cfg_scale"

    @staticmethod
    def matches(pipe: Any) -> bool:
        """The text-to-image pipeline by class; others of the model give the transformer pictures or another batch."""
        return any(c.__name__ == "QwenImagePipeline" for c in type(pipe).__mro__)

    def attention_sites(self) -> list[AttentionSite]:
        """One a block."""
        return [
            AttentionSite(f"transformer.{name}", module, "joint", module.heads)
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention)
        ]

    def output_index(self, path: str) -> int:
        """Blocks give (text, image)."""
        return int(path.rsplit(".", 1)[0] == "transformer.transformer_blocks")

    def run_arguments(
        self, guidance_scale: float, negative_prompts: Sequence[str], options: Arguments, any_negative: bool
    ) -> dict[str, Any]:
        """The negative prompt is always given, be it empty, since the pipeline has no guidance without."""
        asked: dict[str, Any] = {"true_cfg_scale": guidance_scale, **options}
        if self.applied_guidance(asked) > 1:
            asked["negative_prompt"] = list(negative_prompts)
        return asked

    def check_call(self, arguments: Arguments) -> None:
        """Several images of prompts of different lengths: the pipeline (diffusers 0.42) gives them each other's masks."""
        prompt, count = arguments.get("prompt"), int(arguments.get("num_images_per_prompt") or 1)
        given = [p for p in (prompt, arguments.get("negative_prompt")) if isinstance(p, list)]
        if count > 1 and any(len({len(self.tokenize(p, arguments).ids) for p in texts}) > 1 for texts in given):
            raise InterpError(
                "with num_images_per_prompt, QwenImagePipeline mixes up the masks of prompts that differ in length, so its "
                "pictures would not be those of their prompts; repeat the prompts in the list instead"
            )

    def guided(self, arguments: Arguments) -> bool:
        """Guidance needs a scale above 1 and a negative prompt, be it empty."""
        negative = arguments.get("negative_prompt") is not None or arguments.get("negative_prompt_embeds") is not None
        return negative and super().guided(arguments)

    def combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments | None = None
    ) -> torch.Tensor:
        """Each patch of the guided prediction is scaled to the norm that it has in the branch with text."""
        with_text, guided = pack(cond), pack(super().combine(uncond, cond, scale))
        norms = (torch.norm(x, dim=-1, keepdim=True) for x in (with_text, guided))
        return unpack(guided * (next(norms) / next(norms)), tuple(cond.shape[1:]))

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """Evenly spaced noise levels, shifted with the size."""
        config, steps = self.pipe.scheduler.config, int(arguments["num_inference_steps"])
        y, x = self.grid(arguments)
        names = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
        shift = calculate_shift(y * x, *(config.get(name, default) for name, default in names))
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift}

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """The rotary tables are cached by size: those without data must not be."""
        rotary = self.denoiser.pos_embed
        cached = [
            n for n in ("_compute_video_freqs", "_get_device_freqs") if hasattr(getattr(rotary, n), "__wrapped__")
        ]
        with super().rehearsing():
            for name in cached:
                vars(rotary)[name] = MethodType(getattr(type(rotary), name).__wrapped__, rotary)
            try:
                yield
            finally:
                for name in cached:
                    del vars(rotary)[name]

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row, with as many tokens as it may have."""
        config, dtype, length = self.denoiser.config, self.denoiser.dtype, self.text_length(arguments)
        y, x = self.grid(arguments)
        kwargs = {
            "hidden_states": torch.empty(1, y * x, config.in_channels, dtype=dtype),
            "timestep": torch.ones(1, dtype=dtype),
            "encoder_hidden_states": torch.empty(1, length, config.joint_attention_dim, dtype=dtype),
            "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, y, x)]],
        }
        return DenoiserInputs((), kwargs)

    def text_length(self, arguments: Arguments | None = None) -> int:
        """512 positions at most, unless the call says otherwise; there is no padding to it."""
        return int((self.arguments() if arguments is None else arguments)["max_sequence_length"])

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The prompt within the template, of which the states of the first tokens are dropped."""
        prefix, suffix = self.pipe.prompt_template_encode.split("{}")
        dropped = self.pipe.prompt_template_encode_start_idx
        length = dropped + self.text_length(arguments)
        whole = tokenize(self.pipe.tokenizer, prompt, length, prefix=prefix, suffix=suffix, pad=False)
        return whole.part(slice(dropped, None))

    @property
    def encoder_offset(self) -> int:
        """Those of the template's beginning."""
        return int(self.pipe.prompt_template_encode_start_idx)

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        embeddings, mask = self.pipe.encode_prompt(
            list(prompts), device=self.pipe._execution_device, max_sequence_length=self.text_length(arguments)
        )
        return with_gaps(embeddings, mask)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """The states; a mask where prompts differ in length."""
        return with_gaps(kwargs["encoder_hidden_states"], kwargs.get("encoder_hidden_states_mask"))

    def widened(self, text: EncodedPrompt, width: int) -> EncodedPrompt:
        """Gaps at the end."""
        return lengthened(text, width)

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states and the mask, which the pipeline leaves out where all prompts are of one length."""
        embeddings, mask = trimmed(text)
        given = None if bool(mask.all()) else mask
        return {
            **kwargs,
            "encoder_hidden_states": embeddings.masked_fill(mask[..., None] == 0, 0),
            "encoder_hidden_states_mask": given,
        }
