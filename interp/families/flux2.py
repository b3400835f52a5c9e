"""FLUX.2: joint attention in two-stream and fused one-stream blocks, and a language model with a chat template as encoder."""

from typing import ClassVar

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input

from interp.errors import InterpError
from interp.families.chat import around
from interp.families.facts import Arguments, DenoiserInputs, EncodedPrompt, Pass
from interp.families.packing import PackedFamily, pack, unpack
from interp.tokens import Tokens, tokenize


class Flux2Family(PackedFamily):
    """`Flux2Pipeline` (guidance is an input of the model, one branch) and `Flux2KleinPipeline` (a call per branch).

    The states are of three layers of the language model, side by side, at all positions: template and padding too.
    """

    name = "flux2"
    # those that keep keys of a picture, and inpainting, are others
    pipelines: ClassVar[frozenset[str]] = frozenset({"Flux2Pipeline", "Flux2KleinPipeline"})
    sequential: ClassVar[bool] = True
    attention: ClassVar[tuple[type[torch.nn.Module], ...]] = (Flux2Attention, Flux2ParallelSelfAttention)

    @property
    def _klein(self) -> bool:
        return "is_distilled" in self.pipe.config

    def guided(self, arguments: Arguments) -> bool:
        """Klein has guidance, unless it is distilled."""
        return self._klein and not self.pipe.config.is_distilled and super().guided(arguments)

    def applied_guidance(self, arguments: Arguments) -> float:
        """Of the larger model `guidance_scale` is an input."""
        return float(arguments["guidance_scale"]) if self.guided(arguments) else 1.0

    def branches(self, call: Pass) -> tuple[str, ...]:
        """As `cache_context` names the call; a pipeline without guidance does not."""
        return super().branches(call) if self._klein else ("cond",)

    def check_call(self, arguments: Arguments) -> None:
        """Reference pictures, whose positions would follow those of the picture that is made, and prompts that change."""
        if arguments.get("image") is not None:
            raise InterpError(
                f"{type(self.pipe).__name__} is recorded for text-to-image; reference pictures (image=…) are not supported"
            )
        if arguments.get("caption_upsample_temperature"):
            raise InterpError(
                "the tokens of an upsampled prompt cannot be labelled; leave out caption_upsample_temperature"
            )

    def level_shift(self, arguments: Arguments) -> float:
        """By the number of patches and of steps."""
        y, x = self.grid(arguments)
        return float(compute_empirical_mu(image_seq_len=y * x, num_steps=int(arguments["num_inference_steps"])))

    def given_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """In patches of 2×2 as channels, a picture still."""
        y, x = latents.shape[-2:]
        return pack(latents).transpose(1, 2).unflatten(-1, (y // 2, x // 2))

    def returned_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Klein undoes the autoencoder's normalisation of patches first."""
        if not self._klein:
            return self.pack(latents)
        norm, shape = self.pipe.vae.bn, tuple(latents.shape[1:])
        mean = norm.running_mean.to(latents.device, latents.dtype)
        std = torch.sqrt(norm.running_var + self.pipe.vae.config.batch_norm_eps).to(latents.device, latents.dtype)
        return unpack(pack(latents) * std + mean, shape)

    def dry_inputs(self, arguments: Arguments) -> DenoiserInputs:
        """One row."""
        kwargs = self.packed_inputs(arguments)
        positions = {"txt_ids": kwargs["encoder_hidden_states"], "img_ids": kwargs["hidden_states"]}
        more = {name: torch.zeros(1, held.shape[1], 4, dtype=torch.int64) for name, held in positions.items()}
        guidance = torch.ones(1) if self.denoiser.config.guidance_embeds else None
        return DenoiserInputs((), {**kwargs, **more, "guidance": guidance})

    def _render(self, prompt: str) -> str:
        if self._klein:
            return str(
                self.pipe.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False, add_generation_prompt=True, enable_thinking=False,
                )
            )  # fmt: skip
        messages = format_input([prompt], system_message=self.pipe.system_message)
        rendered = self.pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        return str(rendered if isinstance(rendered, str) else rendered[0])

    def tokenize(self, prompt: str, arguments: Arguments | None = None) -> Tokens:
        """The prompt within its template, padded."""
        prefix, text, suffix = around(self._render, prompt)
        own = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # of the larger model, within a processor
        return tokenize(own, text, self.text_length(arguments), prefix=prefix, suffix=suffix)

    @torch.no_grad()
    def encode(self, prompts: list[str], arguments: Arguments | None = None) -> EncodedPrompt:
        """Encode through the pipeline's own `encode_prompt`."""
        arguments = self.arguments() if arguments is None else arguments
        embeddings, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.pipe._execution_device, max_sequence_length=self.text_length(arguments),
            text_encoder_out_layers=tuple(arguments["text_encoder_out_layers"]),
        )  # fmt: skip
        return EncodedPrompt(embeddings)
