"""Qwen-Image: joint attention over [text, image], states of a language model without its template's beginning."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, ClassVar

import torch

from interp.errors import InterpError
from interp.families.facts import Arguments, DenoiserInputs, EncodedPrompt
from interp.families.packing import PackedFamily, pack, unpack
from interp.families.patches import even_levels
from interp.families.ragged import lengthened, trimmed, with_gaps
from interp.tokens import Tokens, tokenize


class QwenImageFamily(PackedFamily):
    """`QwenImagePipeline`: a call per branch; the guided prediction of each patch gets the norm of the one with text.

    A run's `guidance_scale` is the pipeline's `true_cfg_scale`.
    """

    name = "qwenimage"
    # others of the model give the transformer pictures or another batch
    pipelines: ClassVar[frozenset[str]] = frozenset({"QwenImagePipeline"})
    ragged: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    needs_negative: ClassVar[bool] = True
    guidance_argument: ClassVar[str] = "true_cfg_scale"

    def check_call(self, arguments: Arguments) -> None:
        """Several images of prompts of different lengths: the pipeline (diffusers 0.42) gives them each other's masks."""
        prompt, count = arguments.get("prompt"), int(arguments.get("num_images_per_prompt") or 1)
        given = [p for p in (prompt, arguments.get("negative_prompt")) if isinstance(p, list)]
        if count > 1 and any(len({len(self.tokenize(p, arguments).ids) for p in texts}) > 1 for texts in given):
            raise InterpError(
                "with num_images_per_prompt, QwenImagePipeline mixes up the masks of prompts that differ in length, so its "
                "pictures would not be those of their prompts; repeat the prompts in the list instead"
            )

    def combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments | None = None
    ) -> torch.Tensor:
        """Each patch of the guided prediction is scaled to the norm that it has in the branch with text."""
        with_text, guided = pack(cond), pack(super().combine(uncond, cond, scale))
        norms = (torch.norm(x, dim=-1, keepdim=True) for x in (with_text, guided))
        return unpack(guided * (next(norms) / next(norms)), tuple(cond.shape[1:]))

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """The levels are the pipeline's, whatever the scheduler could do."""
        steps = int(arguments["num_inference_steps"])
        return {"sigmas": even_levels(steps), "mu": self.level_shift(arguments)}

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
        shapes = [[(1, *self.grid(arguments))]]
        more = {"encoder_hidden_states_mask": None, "img_shapes": shapes}
        return DenoiserInputs((), {**self.packed_inputs(arguments), **more})

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
