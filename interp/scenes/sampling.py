"""A plain sampling loop for measuring: DDIM written out, text that can change with the step, nothing hooked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What of the text a step uses: 1 both branches with guidance, 0 the unconditional branch alone.
Uses = Callable[[float], bool]


@dataclass(frozen=True)
class Text:
    """Prompts as the UNet reads them: embeddings (n, token, feature) and where each prompt's first EOS is (n,)."""

    embedding: Tensor
    eos: Tensor

    def roles(self) -> tuple[Tensor, Tensor]:
        """Return two masks (n, token): the prompt's words, and the first EOS with all padding after it."""
        at = torch.arange(self.embedding.shape[1], device=self.eos.device)[None]
        return (at > 0) & (at < self.eos[:, None]), at >= self.eos[:, None]

    def only(self, words: bool, eos: bool) -> "Text":
        """Return the text with the embeddings of words, or of EOS and padding, set to zero; BOS stays."""
        is_word, is_eos = self.roles()
        keep = ~((is_word & (not words)) | (is_eos & (not eos)))
        return Text(self.embedding * keep[:, :, None], self.eos)

    def with_eos_of(self, other: "Text") -> "Text":
        """Return BOS and words of this text, then the first EOS and padding of the other, laid edge to edge.

        Where the other's tail is too short, its last token is repeated.
        """
        tokens = self.embedding.shape[1]
        at = torch.arange(tokens, device=self.eos.device)[None]
        source = (at - self.eos[:, None] + other.eos[:, None]).clamp(0, tokens - 1)
        tail = other.embedding.gather(1, source[:, :, None].expand_as(self.embedding))
        return Text(torch.where((at >= self.eos[:, None])[:, :, None], tail, self.embedding), self.eos)


class Generator:
    """The pipeline's parts from one folder, on one device, driven by a loop written out."""

    def __init__(self, folder: Path, device: str) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.device = device
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(device).eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.alphas, self.final = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
        self.side = self.unet.config.sample_size

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Text:
        """Encode prompts."""
        settings: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(list(prompts), **settings).input_ids.to(self.device)
        eos = (ids == self.tokenizer.eos_token_id).int().argmax(-1)
        return Text(self.encoder(ids).last_hidden_state, eos)

    @torch.no_grad()
    def __call__(
        self,
        text: Text,
        steps: int,
        guidance: float,
        seed: int = 0,
        uses: Uses = lambda part: True,
        batch: int = 128,
        spacing: str = "leading",
    ) -> Tensor:
        """Return pictures (n, rgb, y, x) in [−1, 1] on the CPU, one per prompt.

        Picture i starts from the noise of seed + i, so conditions can be compared picture by picture. `uses` gets
        the share of the steps that are done and says whether the step is guided by the text or ε(∅) alone. `spacing`
        is that of diffusers: "leading", as shipped, or "trailing", which begins with the noisiest timestep of all.
        """
        parts = []
        for start in range(0, len(text.eos), batch):
            rows = slice(start, start + batch)
            embedding = text.embedding[rows]
            noise = [
                torch.randn(4, self.side, self.side, generator=torch.Generator().manual_seed(seed + start + i))
                for i in range(len(embedding))
            ]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                latents = self._denoise(torch.stack(noise).to(self.device), embedding, steps, guidance, uses, spacing)
                images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            parts.append(images.float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def _denoise(self, x: Tensor, embedding: Tensor, steps: int, guidance: float, uses: Uses, spacing: str) -> Tensor:
        empty = self.read([""]).embedding.expand(len(x), -1, -1)
        stride = len(self.alphas) // steps
        first = len(self.alphas) - 1 if spacing == "trailing" else (steps - 1) * stride + 1
        for i, time in enumerate(range(first, first - steps * stride, -stride)):
            at = torch.tensor(time, device=self.device)
            if uses(i / steps):
                both = self.unet(torch.cat([x, x]), at, torch.cat([empty, embedding])).sample.float()
                without, given = both.chunk(2)
                noise = without + guidance * (given - without)
            else:
                noise = self.unet(x, at, empty).sample.float()
            here, before = self.alphas[time], time - stride
            after = self.alphas[before] if before >= 0 else self.final
            clean = (x - (1 - here) ** 0.5 * noise) / here**0.5
            x = after**0.5 * clean + (1 - after) ** 0.5 * noise
        return x
