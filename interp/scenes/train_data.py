"""What training is fed: drafts and token ids made by worker processes, pictures drawn and degraded on the device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from interp.scenes.bpe import Encoder
from interp.scenes.captions import PLAIN_STYLE, altered, caption, drop, random_for
from interp.scenes.grammar import WORDS
from interp.scenes.world import render, sample

LENGTH = 56  # tokens of the longest caption and more; what follows the first EOS is EOS


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches without end: the numbers of the scenes, `ids` (scene, caption, token), `wrong` (scene, token).

    `captions` is how many captions each scene gets; 0 for a phase that reads no text. `wrong` are hard negatives, `plain`
    the share of short plain captions.
    Workers and resumed runs draw from seeds of their own.
    """

    def __init__(
        self, batch: int, captions: int, seed: tuple[int, ...], wrong: bool = False, plain: float = PLAIN_STYLE
    ) -> None:
        self.batch, self.captions, self.seed, self.wrong, self.plain = batch, captions, seed, wrong, plain

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        seed = (*self.seed, 0 if worker is None else worker.id)
        rng, words, encode = np.random.default_rng(seed), random_for(*seed), Encoder(WORDS)
        while True:
            draft = sample(self.batch, rng)
            batch = draft.tensors()
            said, wrong = [], []
            for scene in draft.scenes() if self.captions else []:
                told = [drop(scene, words) for _ in range(self.captions)]
                said.append([encode(caption(t, words, self.plain), LENGTH) for t in told])
                if self.wrong:
                    wrong.append(encode(caption(altered(told[0], words), words, self.plain), LENGTH))
            if said:
                batch["ids"] = torch.tensor(said, dtype=torch.int32)
            if wrong:
                batch["wrong"] = torch.tensor(wrong, dtype=torch.int32)
            yield batch


def stream(
    batch: int,
    captions: int,
    seed: tuple[int, ...],
    workers: int,
    device: str,
    wrong: bool = False,
    plain: float = PLAIN_STYLE,
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of a Stream as tensors on `device`, made ahead by `workers` processes."""
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        Stream(batch, captions, seed, wrong, plain),
        batch_size=None,
        num_workers=workers,
        pin_memory=device == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for item in loader:
        yield {name: value.to(device, non_blocking=True) for name, value in item.items()}


class Artist:
    """Draws pictures on the device, with noise of its own."""

    def __init__(self, pixels: int, seed: int, device: str, compiled: bool) -> None:
        self.pixels, self.device = pixels, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.render = torch.compile(render) if compiled else render

    def normal(self, *shape: int) -> Tensor:
        """Return normal noise."""
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the pictures of a batch (scene, rgb, y, x) in [−1, 1]."""
        n, size = len(batch["two"]), self.pixels
        draft = {name: value for name, value in batch.items() if name not in ("ids", "wrong")}
        return self.render(draft, self.normal(n, 1, size // 4, size // 4), self.normal(n, 1, size, size))[0]

    def degrade(self, images: Tensor, vae: Any | None) -> Tensor:
        """Return the same pictures, part of them as generated ones may look.

        An eighth is blurred, an eighth noised, and, once there is an autoencoder, a quarter goes through it with
        noise added to the latents: the judges must not be taken in by what only a renderer makes so clean.
        """
        n = len(images)
        part = n // 8
        out = images.clone()
        out[:part] = F.interpolate(F.avg_pool2d(images[:part], 2), scale_factor=2, mode="bilinear")
        fresh = self.normal(*images[part : 2 * part].shape)
        strength = 0.15 * torch.rand(part, 1, 1, 1, generator=self.generator, device=self.device)
        out[part : 2 * part] = images[part : 2 * part] + strength * fresh
        if vae is not None:
            z = vae.encode(images[2 * part : 4 * part]).latent_dist.mean
            amount = 0.35 * torch.rand(len(z), 1, 1, 1, generator=self.generator, device=self.device)
            noise = self.normal(*z.shape) / vae.config.scaling_factor
            out[2 * part : 4 * part] = vae.decode(z + amount * noise).sample.to(out.dtype)
        return out.clamp(-1, 1)
