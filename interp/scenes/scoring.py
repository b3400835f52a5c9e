"""Scores of pictures: alignment with a prompt by CLIP, and what the judge, which shares no weights with it, sees."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from interp.errors import InterpError
from interp.loading import quiet
from interp.remembering import Memory, picture_keys
from interp.scenes import folder as bundled
from interp.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    Verdict,
    agreement_of,
    parse,
)
from interp.scenes.parts import FULL, Judge

_BATCH = 64
_VERDICTS = Memory()


def alignment(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """Return the cosine between each picture and its prompt, (n,), by the CLIP model of the scenes.

    `images` is uint8 (n, height, width, rgb) or a list of PIL images; `prompts` one text per picture. CLIP pools
    text at the first EOS: a conclusion about EOS must not rest on this score alone, see `agreement`.

    >>> from interp.scenes import draw
    >>> picture = draw(1, seed=3, full=True)
    >>> right = alignment(picture.images, picture.captions)
    >>> wrong = alignment(picture.images, ["two things that are not there"])
    >>> bool(right > wrong)
    True
    """
    pictures = to_tensor(images)
    _check(len(pictures), prompts)
    return Scorer.of(bundled()).alignment(pictures, prompts)


def judge(images: Any) -> list[Verdict]:
    """Say what each picture shows: objects, background, relation, by a network trained on renders alone.

    `images` as in `alignment`. Two objects come from left to right, or from top to bottom, with the relation of
    the first to the second ("left of" or "above"). The judge always answers, also about a picture of nothing.

    >>> from interp.scenes import draw
    >>> picture = draw(1, seed=3)
    >>> judge(picture.images)[0].background == picture.scenes[0].background
    True
    """
    return _seen(to_tensor(images))


def agreement(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """Return the share of the attributes named in each prompt that the judge sees in its picture, (n,), 0 to 1.

    `images` as in `alignment`. Attributes are each object's color, shape, pattern and size, the relation and the
    background. Raises InterpError for a prompt that names none of them.

    >>> from interp.scenes import draw
    >>> picture = draw(1, seed=3, full=True)
    >>> float(agreement(picture.images, picture.captions)[0])
    1.0
    """
    pictures = to_tensor(images)
    _check(len(pictures), prompts)
    named = [parse(prompt) for prompt in prompts]
    seen = _seen(pictures)
    return np.array([agreement_of(a, b) for a, b in zip(named, seen, strict=True)])


def _seen(pictures: Tensor) -> list[Verdict]:
    """What the judge sees, of each picture once: it is asked about the same ones for the prompt and for the target."""
    return _VERDICTS.recall(picture_keys(pictures.numpy()), lambda new: Scorer.of(bundled()).judge(pictures[new]))


def _check(n: int, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or len(prompts) != n:
        found = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise InterpError(f"a prompt for each of {n} pictures was asked for, found {found}: give a list of {n} prompts")


def to_tensor(images: Any) -> Tensor:
    """Turn uint8 pictures (n, height, width, rgb), or PIL images, into (n, rgb, y, x) in [−1, 1] at the model's size."""
    if not isinstance(images, np.ndarray):
        if isinstance(images, str) or not all(hasattr(image, "convert") for image in images):
            raise InterpError(
                f"pictures were given as {type(images).__name__}; give uint8 (n, height, width, rgb) or PIL images"
            )
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise InterpError(
            f"pictures were given as {images.dtype} of shape {images.shape}; the scenes scores take uint8 "
            "(n, height, width, rgb) or a list of PIL images: convert them first"
        )
    pictures = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    if pictures.shape[-2:] != (FULL.pixels, FULL.pixels):
        size = (FULL.pixels, FULL.pixels)
        pictures = nn.functional.interpolate(pictures, size=size, mode="bilinear", antialias=True)
    return pictures


class Scorer:
    """CLIP and the judge of one folder, on one device."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.device = device
        with quiet():
            self.clip = CLIPModel.from_pretrained(folder / "clip", dtype=torch.float32).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.network = Judge()
        weights = load_file(folder / "judge" / "model.safetensors")
        self.network.load_state_dict({name: value.float() for name, value in weights.items()})
        self.network.to(device).eval()

    @staticmethod
    @cache
    def of(folder: Path, device: str = "cpu") -> "Scorer":
        """Return the scorer of a folder, loaded once."""
        return Scorer(folder, device)

    @torch.no_grad()
    def picture_vectors(self, pictures: Tensor) -> Tensor:
        """Return CLIP's unit vectors of pictures, (n, feature)."""
        found = [
            self.clip.visual_projection(self.clip.vision_model(pixel_values=part.to(self.device)).pooler_output)
            for part in pictures.split(_BATCH)
        ]
        return nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def text_vectors(self, prompts: Sequence[str]) -> Tensor:
        """Return CLIP's unit vectors of texts, (n, feature)."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(list(prompts), **settings).input_ids.to(self.device)
        found = [self.clip.text_projection(self.clip.text_model(part).pooler_output) for part in ids.split(_BATCH)]
        return nn.functional.normalize(torch.cat(found), dim=-1)

    def alignment(self, pictures: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Return the cosine of each picture (n, rgb, y, x) with its prompt."""
        return (self.picture_vectors(pictures) * self.text_vectors(prompts)).sum(-1).cpu().numpy()

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> list[Verdict]:
        """Return what each picture (n, rgb, y, x) shows."""
        parts = [self.network(part.to(self.device)) for part in pictures.split(_BATCH)]
        answers = {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}
        place = ((answers.pop("place") + 1) / 2).tolist()
        sure = {name: value.softmax(-1).amax(-1).tolist() for name, value in answers.items()}
        best = {name: value.argmax(-1).tolist() for name, value in answers.items()}
        return [_verdict(i, best, sure, place[i]) for i in range(len(pictures))]


def _verdict(i: int, best: dict[str, list], sure: dict[str, list], place: list[list[float]]) -> Verdict:
    objects = tuple(
        Thing(
            SHAPES[best["shape"][i][k]],
            COLORS[best["color"][i][k]],
            PATTERNS[best["pattern"][i][k]],
            SIZES[best["size"][i][k]],
            *place[k],
        )
        for k in range(1 + best["two"][i])
    )
    relation = ("left of", "above")[best["stacked"][i]] if len(objects) == 2 else None
    scene = Scene(objects, BACKGROUNDS[best["background"][i]], relation)
    names = {"relation": "stacked"}
    confidence = tuple(
        sure[names.get(name, name)][i] if k is None else sure[name][i][k] for k, name, _ in scene.named()
    )
    return Verdict(objects, scene.background, relation, confidence)
