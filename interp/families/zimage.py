"""Z-Image: one stream of [image, text], each padded to a multiple of 32 by learned tokens; lists instead of batches."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from interp.branches import keep_rows
from interp.families.base import Family
from interp.families.chat import around
from interp.families.facts import Arguments, AttentionSite, DenoiserInputs, EncodedPrompt, Pass, Spans
from interp.families.patches import level_shift
from interp.families.ragged import apart, lengthened, stacked
from interp.tokens import Tokens, tokenize


class ZImageFamily(Family):
    """`ZImagePipeline`: rows [cond, uncond], c + g·(c − u) of the pipeline's `guidance_scale` g, so w = 1 + g.

    The transformer predicts the negative of the flow that the scheduler is given. Attention of the refiners of the image
    is self-attention, that of the refiners of the caption goes from text to text.
    """

    name = "zimage"
    pipelines: ClassVar[frozenset[str]] = frozenset({"ZImagePipeline"})
    ragged: ClassVar[bool] = True
    encodes_padded: ClassVar[bool] = True
    image_lies: ClassVar[Literal["first", "last"]] = "first"

    @property
    def multiple(self) -> int:  # type: ignore[override]
        """A side holds whole patches of 2×2 latents."""
        return 2 * int(self.pipe.vae_scale_factor)

    def attention_kind(self, path: str, module: Any) -> str | None:
        """The image's refiners, the caption's, then the joint layers."""
        return {"noise_refiner": "self", "context_refiner": "text", "layers": "joint"}.get(path.partition(".")[0])

    def guided(self, arguments: Arguments) -> bool:
        """Guidance is on above 0."""
        return float(arguments.get("guidance_scale") or 0) > 0

    def applied_guidance(self, arguments: Arguments) -> float:
        """1 + g."""
        return 1 + float(arguments.get("guidance_scale") or 0)

    def combine(
        self, uncond: torch.Tensor, cond: torch.Tensor, scale: float, arguments: Arguments | None = None
    ) -> torch.Tensor:
        """With `cfg_normalization` the norm of each sample's prediction is limited by that of the branch with text."""
        guided = super().combine(uncond, cond, scale)
        limit = float((arguments or {}).get("cfg_normalization") or 0)
        if limit <= 0:
            return guided
        most, norm = (torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (cond, guided))
        return torch.where(norm > most * limit, guided * (most * limit / norm), guided)

    def branches(self, call: Pass) -> tuple[str, ...]:
        """[cond, uncond] rows, but cond alone where `cfg_truncation` ends the guidance."""
        if super().branches(call) == ("cond",):
            return ("cond",)
        assert call.arguments is not None
        truncation = call.arguments.get("cfg_truncation")
        if (
            truncation is not None
            and float(truncation) < 1
            and float(call.kwargs["t"].flatten()[0]) > float(truncation)
        ):
            return ("cond",)
        return ("cond", "uncond")

    def default_size(self) -> tuple[int, int]:
        """1024 pixels."""
        return 1024, 1024

    def grid(self, arguments: Arguments) -> tuple[int, int]:
        """One position per 2×2 latents."""
        height, width = self.size(arguments)
        return height // self.multiple, width // self.multiple

    def latent_shape(self, arguments: Arguments) -> tuple[int, int, int]:
        """Two latent positions a patch of the transformer, each way."""
        y, x = self.grid(arguments)
        return self.denoiser.in_channels, 2 * y, 2 * x

    def schedule(self, arguments: Arguments) -> dict[str, Any]:
        """Evenly spaced noise levels, shifted with the size."""
        shift = level_shift(self.pipe.scheduler.config, self.grid(arguments))
        return {"sigmas": get_default_z_image_sigmas(int(arguments["num_inference_steps"])), "mu": shift}

    # One denoiser call: lists with an entry a row

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The pipeline passes latents, time and captions by position."""
        return (), {**dict(zip(("x", "t", "cap_feats"), args, strict=False)), **kwargs}

    def rows(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """An entry a row."""
        return len(kwargs["x"] if "x" in kwargs else args[0])

    def timestep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is given 1 − t/1000."""

    def keep_rows(self, inputs: DenoiserInputs, rows: int, index: Sequence[int]) -> DenoiserInputs:
        """Choose the entries of lists, the rows of the times."""
        kwargs = {
            **inputs.kwargs,
            "x": [inputs.kwargs["x"][i] for i in index],
            "t": keep_rows(inputs.kwargs["t"], rows, index),
            "cap_feats": [inputs.kwargs["cap_feats"][i] for i in index],
        }
        return DenoiserInputs(inputs.args, kwargs)

    def output_rows(self, out: Any) -> torch.Tensor:
        """Stack the entries of the list, without the dimension of frames."""
        return torch.stack(list(super().output_rows(out))).squeeze(2)

    def with_rows(self, out: Any, rows: torch.Tensor, kwargs: Mapping[str, Any]) -> Any:
        """An entry a row."""
        entries = list(rows.unsqueeze(2))
        return (entries, *out[1:]) if isinstance(out, tuple) else type(out)(sample=entries)

    def prediction(self, out: Any, arguments: Arguments) -> torch.Tensor:
        """Turned around, in float32, as the pipeline does; without the dimension of frames."""
        first = out[0] if isinstance(out, tuple) else out.sample
        return -torch.stack([x.float() for x in first]).squeeze(2)

    def spans(self, site: AttentionSite, queries: int, keys: int, kwargs: Mapping[str, Any]) -> Spans:
        """The image first, then the text; what pads the image to a multiple belongs to neither."""
        if site.kind == "text":
            return super().spans(site, queries, keys, kwargs)
        _, _, height, width = kwargs["x"][0].shape
        length = (height // 2) * (width // 2)
        image = slice(0, length)
        if site.kind == "self":
            return Spans(image_queries=image, image_keys=image)
        text = slice(_padded(length), queries)
        return Spans(image, text, image, text)

    def joint_length(self, arguments: Arguments) -> int:
        """Both padded."""
        y, x = self.grid(arguments)
        return _padded(y * x) + self.text_length(arguments)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """The rotary tables are made at the first call: those without data must not be kept."""
        rotary = self.denoiser.rope_embedder
        own = rotary.freqs_cis
        with super().rehearsing():
            rotary.freqs_cis = None
            try:
                yield
            finally:
                rotary.freqs_cis = own

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row, with as many tokens as it may have."""
        dtype, (channel, y, x) = self.denoiser.dtype, self.latent_shape(arguments)
        kwargs = {
            "x": [torch.empty(channel, 1, y, x, dtype=dtype)],
            "t": torch.ones(1),
            "cap_feats": [torch.empty(self.text_length(arguments), self.denoiser.config.cap_feat_dim, dtype=dtype)],
        }
        return DenoiserInputs((), kwargs)

    # Text

    def text_length(self, arguments: Arguments | None = None) -> int:
        """512 positions at most, unless the call says otherwise, in multiples of 32."""
        return _padded(int((self.arguments() if arguments is None else arguments)["max_sequence_length"]))

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The prompt within its template; then learned tokens up to a multiple of 32, which are attended to."""
        prefix, text, suffix = around(self._render, prompt)
        most = int((self.arguments() if arguments is None else arguments)["max_sequence_length"])
        own = self.pipe.tokenizer
        length = len(tokenize(own, text, most, prefix=prefix, suffix=suffix, pad=False).ids)
        tokens = tokenize(own, text, length, prefix=prefix, suffix=suffix)
        count = _padded(length) - length
        return Tokens(
            [*tokens.ids, *[-1] * count], [*tokens.text, *["<cap_pad>"] * count], [*tokens.role, *["pad"] * count],
            [*tokens.word, *[-1] * count], tokens.words, tokens.eos,
        )  # fmt: skip

    def _render(self, prompt: str) -> str:
        return str(
            self.pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`, which writes into the list that it is given."""
        most = int((self.arguments() if arguments is None else arguments)["max_sequence_length"])
        states, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe._execution_device, do_classifier_free_guidance=False, max_sequence_length=most
        )
        return stacked(states)

    def text_inputs(self, kwargs: Mapping[str, Any]) -> EncodedPrompt:
        """The states before they are padded."""
        return stacked(list(kwargs["cap_feats"]))

    def widened(self, text: EncodedPrompt, width: int) -> EncodedPrompt:
        """Gaps at the end."""
        return lengthened(text, width)

    def with_text(self, kwargs: Mapping[str, Any], text: EncodedPrompt) -> dict[str, Any]:
        """Exchange the states."""
        return {**kwargs, "cap_feats": apart(text)}


def _padded(length: int) -> int:
    return math.ceil(length / SEQ_MULTI_OF) * SEQ_MULTI_OF
