"""The model organism with its two judges, and how pictures are held against their prompts."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.probes.bootstrap import mean_interval
from interp.scenes.grammar import BACKGROUNDS, COLORS, Scene, agreement_of, matched, parse
from interp.scenes.marked import Cell, Figures
from interp.scenes.sampling import Generator
from interp.scenes.scoring import Scorer
from interp.scenes.world import BACKGROUND_INK, COLOR_INK


def told(values: Any, pictures: Any = None) -> Cell:
    """Return the mean of what was measured, with its 95 % bootstrap interval over pictures.

    `values` (row,) is one figure a picture; where a picture has several rows, or none, `pictures` (row,) says whose they are.

    >>> told([True, True, False, True])
    {'value': 0.75, 'low': 0.25, 'high': 1.0}
    """
    values = np.asarray(values, dtype=float)
    mean, (low, high) = mean_interval(values, np.arange(len(values)) if pictures is None else np.asarray(pictures))
    return {"value": float(mean), "low": float(low), "high": float(high)}


class Bench:
    """A generator with its two judges, and what is measured with them."""

    def __init__(self, source: Path, device: str, n: int, steps: int, guidance: float) -> None:
        self.model, self.scorer = Generator(source, device), Scorer.of(source, device)
        self.device, self.n, self.steps, self.guidance = device, n, steps, guidance

    def generate(self, text: Any, **options: Any) -> Tensor:
        """Return pictures at the bench's steps and guidance, or those of `options`."""
        return self.model(text, **{"steps": self.steps, "guidance": self.guidance, **options})

    def agreement(self, images: Tensor, asked: Sequence[str]) -> np.ndarray:
        """Return for each picture the share of the attributes named that the judge sees, (picture,)."""
        seen = self.scorer.judge(images)
        return np.array([agreement_of(parse(p), s) for p, s in zip(asked, seen, strict=True)])

    def by_attribute(self, images: Tensor, asked: Sequence[str]) -> Figures:
        """Return for each attribute how often it is seen where it is named, and how often all of them are."""
        answers: dict[str, list[tuple[bool, int]]] = defaultdict(list)
        for picture, (prompt, seen) in enumerate(zip(asked, self.scorer.judge(images), strict=True)):
            found = matched(parse(prompt), seen)
            for (_, name), right in found.items():
                answers[name].append((right, picture))
            named = [right for (_, name), right in found.items() if name in ("color", "shape")]
            answers["color and shape of all objects"].append((all(named), picture))
            answers["everything named"].append((all(found.values()), picture))
        return {name: told(*zip(*rows, strict=True)) for name, rows in answers.items()}

    def alignment(self, images: Tensor, asked: Sequence[str]) -> Cell:
        """Return CLIP's alignment of pictures with prompts."""
        return told(self.scorer.alignment(images, asked))

    def scenes(self, images: Tensor, asked: Sequence[str]) -> list[Scene]:
        """Return what is asked, with the judge's background where none is asked."""
        seen = self.scorer.judge(images)
        named = [parse(p) for p in asked]
        return [Scene(a.objects, a.background or s.background) for a, s in zip(named, seen, strict=True)]


def stains(images: Tensor, scenes: Sequence[Scene]) -> np.ndarray:
    """Return (picture,), the share of pixels whose color is that of neither background nor objects, in any of their shades."""
    shares = []
    pixels = (images.permute(0, 2, 3, 1) + 1) / 2
    for picture, scene in zip(pixels, scenes, strict=True):
        inks = [(BACKGROUND_INK[BACKGROUNDS.index(str(scene.background))], 0.65, 1.35)]
        for thing in scene.objects:
            if thing.color is not None:
                ink = COLOR_INK[COLORS.index(thing.color)]
                inks.append(([0.51] * 3, 0.0, 1.1) if thing.color == "black" else (ink, 0.25, 1.2))
        far = []
        for ink, low, high in inks:
            color = torch.tensor(ink)
            shade = (picture @ color / (color @ color)).clamp(low, high)
            far.append((picture - shade[..., None] * color).norm(dim=-1))
        shares.append(float((torch.stack(far).amin(0) > 0.2).float().mean()))
    return np.array(shares)
