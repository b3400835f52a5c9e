"""Renders whose masks are known, entered at several noise levels and recorded: the maps that recipes work on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.probes.maps import resize_matrix
from interp.probes.rivals import FLOOR
from interp.probes.words import prompt_words
from interp.scenes.grammar import Scene

LEVELS = (700, 500, 300, 100)
CELL = 4  # pixels of a latent's side
KINDS = ("color", "shape", "span")


@dataclass(frozen=True)
class Picture:
    """What was recorded of one picture, on its device, and what is looked for in it.

    raw (level, unit, token, pixel): attention of each head of each layer, a unit, to the tokens, on the latents' grid; logs:
    its logarithm, resized as such. near (level, pixel, pixel): self-attention on that grid, from each pixel to the others,
    averaged over layers and heads. words: bool (word, token); marks: bool (token), those that are no words (bos, eos,
    padding); wanted: bool (target, token). masks: bool (target, pixel); others, those of the
    other object, empty where there is none; kinds of the targets. layer, grid: (unit,), of each
    unit, the coarsest grid last.
    """

    raw: Tensor
    logs: Tensor
    near: Tensor
    words: Tensor
    marks: Tensor
    wanted: Tensor
    masks: Tensor
    others: Tensor
    kinds: list[str]
    layer: np.ndarray
    grid: np.ndarray

    def part(self, *, levels: Any = slice(None), units: Any = slice(None)) -> "Picture":
        """Return some levels (positions or a mask) and units (a mask) of it."""
        raw, logs = self.raw[levels][:, units], self.logs[levels][:, units]
        return replace(self, raw=raw, logs=logs, near=self.near[levels], layer=self.layer[units], grid=self.grid[units])

    def weighed(self, share: Tensor) -> "Picture":
        """Return it with units that weigh differently; share (unit,), 1 on average."""
        by = share.to(self.raw)[:, None, None]
        return replace(self, raw=self.raw * by, logs=self.logs * by)

    def heads_averaged(self) -> "Picture":
        """Return it as recorded with `Capture(heads="mean")`: a unit is a layer."""
        layers = np.unique(self.layer)
        raw = torch.stack([self.raw[:, self.layer == k].mean(1) for k in layers], 1)
        grid = np.array([self.grid[self.layer == k][0] for k in layers])
        return replace(self, raw=raw, logs=logarithm(raw), layer=layers, grid=grid)


def logarithm(probs: Tensor) -> Tensor:
    """Return the natural logarithm, no less than that of the smallest half-precision number."""
    return probs.clamp(min=FLOOR).log()


def recorded(
    n: int, seed: int, levels: tuple[int, ...] = LEVELS, pipe: Any = None, at_once: int = 16
) -> Iterator[tuple[int, Picture]]:
    """Draw `n` pictures of the world and yield each with its maps, `at_once` recorded together.

    Left out are scenes of two objects of one color or shape: a word would then mean either.
    """
    import interp
    from interp.scenes.world import draw

    drawn = draw(2 * n, seed=seed)
    chosen = [i for i, scene in enumerate(drawn.scenes) if _distinct(scene) and drawn.masks[i].any((1, 2))[0]][:n]
    pipe = interp.load("scenes") if pipe is None else pipe
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        texts = [drawn.captions[i] for i in part]

        def record(**kept: Any) -> Any:
            keep = interp.Capture(latents=False, noise_pred=False, image=False, **kept)
            images = drawn.images[part]  # noqa: B023 (called here)
            return interp.encode_image(pipe, images, levels, prompt=texts, capture=keep, batch_size=at_once)  # noqa: B023

        cross, near = record(heads="all"), record(attention=_finest(pipe), heads="mean")
        for j, i in enumerate(part):
            picture = _picture(cross, near, j, drawn.scenes[i], drawn.masks[i], pipe.device)
            if picture.kinds:
                yield start + j, picture


def _distinct(scene: Scene) -> bool:
    shapes, colors = ({getattr(thing, name) for thing in scene.objects} for name in ("shape", "color"))
    return len(shapes) == len(colors) == len(scene.objects)


def _finest(pipe: Any) -> tuple[str, ...]:
    """Return the self-attention sites of the finest grid."""
    import interp

    sites = [site for site in interp.sites(pipe) if site.kind == "self"]
    largest = max(site.shape for site in sites)[1:]
    return tuple(site.name.removesuffix(":probs") for site in sites if site.shape[1:] == largest)


def _picture(cross: Any, near: Any, sample: int, scene: Scene, masks: np.ndarray, device: torch.device) -> Picture:
    table = cross.tokens().isel(sample=sample)
    text, role, word = (table[f"token_{c}"].values.tolist() for c in ("text", "role", "word"))
    used = np.array([r != "" for r in role])
    found = prompt_words(text, role, word)
    words = np.stack([np.isin(np.arange(len(role)), columns) for _, _, columns in found])[:, used]
    cells = masks.reshape(2, masks.shape[1] // CELL, CELL, -1, CELL).mean((2, 4)) > 0.5
    kinds, wanted, truth, others = [], [], [], []
    texts = [name for name, _, _ in found]
    for thing, mask, other in zip(scene.objects, cells, cells[::-1], strict=False):
        for kind, name in zip(KINDS, ((thing.color,), (thing.shape,), (thing.color, thing.shape)), strict=True):
            at = next((k for k in range(len(texts)) if tuple(texts[k : k + len(name)]) == name), None)
            if at is not None and mask.any():
                kinds.append(kind)
                wanted.append(words[at : at + len(name)].any(0))
                truth.append(mask.ravel())
                others.append(other.ravel())
    raw: list[Tensor] = []
    logs: list[Tensor] = []
    layer: list[int] = []
    grid: list[int] = []
    side = cells.shape[-1]
    for g, name in enumerate(cross.grids):
        probs = cross.attention(name).isel(sample=sample, branch=0, token=used).values
        values = torch.from_numpy(probs).to(device).float()
        to = torch.from_numpy(resize_matrix(values.shape[-1], side)).to(device).float()
        for maps, kept in ((values, raw), (logarithm(values), logs)):
            large = to @ maps @ to.T  # (level, layer, head, token, y, x)
            kept.append(large.reshape(len(large), -1, int(used.sum()), side * side))
        layer += [len(set(layer)) + k // probs.shape[2] for k in range(probs.shape[1] * probs.shape[2])]
        grid += [g] * (probs.shape[1] * probs.shape[2])
    seen = near.tree[f"self_attention/{side}x{side}"]["probs"].isel(sample=sample, branch=0).values
    pairs = torch.from_numpy(seen).to(device).float().mean((1, 2)).reshape(len(seen), side * side, side * side)
    return Picture(
        torch.cat(raw, 1).clamp(min=0), torch.cat(logs, 1), pairs, torch.from_numpy(words).to(device),
        torch.from_numpy(~words.any(0)).to(device), torch.from_numpy(np.array(wanted)).to(device),
        torch.from_numpy(np.array(truth)).to(device), torch.from_numpy(np.array(others)).to(device), kinds,
        np.array(layer), np.array(grid),
    )  # fmt: skip
