"""The procedural world: scenes of one or two textured shapes on a background, drawn from signed distances.

`Draft` holds every number of a batch of scenes; `render` turns it into pictures and the exact mask of each
object, on any device. Drafts come from NumPy generators, so the same seed is the same scenes everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.scenes.captions import caption, drop, random_for
from interp.scenes.grammar import BACKGROUNDS, COLORS, PATTERNS, RELATIONS, SHAPES, SIZES, Scene, Thing

SIZE = 128  # pixels a side

COLOR_INK = [
    [0.85, 0.12, 0.12], [0.1, 0.65, 0.2], [0.12, 0.25, 0.85], [0.95, 0.85, 0.1], [0.55, 0.15, 0.7],
    [0.95, 0.5, 0.08], [0.1, 0.8, 0.85], [0.97, 0.55, 0.75], [0.95, 0.95, 0.95], [0.06, 0.06, 0.06],
]  # fmt: skip
BACKGROUND_INK = [[0.5, 0.5, 0.5], [0.4, 0.26, 0.13], [0.08, 0.1, 0.3], [0.88, 0.82, 0.68]]
_OFFSET = [[-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]]  # of the first object, per relation
_RADIUS = [0.22, 0.4]  # small, large, in half widths of the picture
ALONE = 1.15  # an object alone is drawn this much larger


@dataclass(frozen=True)
class Draft:
    """A batch of scenes as numbers: indices into the word lists, and what no caption says.

    The first dim of every array is the scene, the second, where there is one, the object. `centre` (x, y) and
    `radius` are in half widths from the picture's middle, `angle` and `light` in radians.
    """

    two: np.ndarray
    background: np.ndarray
    relation: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    pattern: np.ndarray
    size: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    light: np.ndarray

    def __len__(self) -> int:
        return len(self.two)

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the arrays as tensors on `device`, which is what `render` takes."""
        return {name: torch.from_numpy(value).to(device) for name, value in vars(self).items()}

    def scenes(self) -> list[Scene]:
        """Return every scene in words, all attributes and the places of its objects included."""
        columns = (self.shape, self.color, self.pattern, self.size, (self.centre + 1) / 2)
        each = zip(*(column.tolist() for column in columns), strict=True)
        whole = zip(self.two.tolist(), self.relation.tolist(), self.background.tolist(), strict=True)
        found = []
        for (two, relation, background), objects in zip(whole, each, strict=True):
            things = tuple(
                Thing(SHAPES[shape], COLORS[color], PATTERNS[pattern], SIZES[size], *centre)
                for shape, color, pattern, size, centre in list(zip(*objects, strict=True))[: 1 + two]
            )
            found.append(Scene(things, BACKGROUNDS[background], RELATIONS[relation] if two else None))
        return found


def sample(n: int, rng: np.random.Generator) -> Draft:
    """Draw the numbers of `n` scenes; 6 in 10 show two objects."""
    two = rng.random(n) < 0.6
    relation = rng.integers(len(RELATIONS), size=n)
    size = rng.integers(len(SIZES), size=(n, 2))
    radius = np.asarray(_RADIUS)[size] * (0.93 + 0.14 * rng.random((n, 2))) * np.where(two, 1, ALONE)[:, None]
    offset = np.asarray(_OFFSET)[relation]
    jitter = 2 * rng.random((n, 2, 2)) - 1
    apart = np.stack([offset, -offset], 1) + 0.08 * jitter
    anywhere = (0.92 - radius)[:, :, None] * jitter
    return Draft(
        two=two,
        background=rng.integers(len(BACKGROUNDS), size=n),
        relation=relation,
        shape=rng.integers(len(SHAPES), size=(n, 2)),
        color=rng.integers(len(COLORS), size=(n, 2)),
        pattern=rng.integers(len(PATTERNS), size=(n, 2)),
        size=size,
        centre=np.where(two[:, None, None], apart, anywhere).astype(np.float32),
        radius=radius.astype(np.float32),
        angle=((rng.random((n, 2)) - 0.5) * 0.5).astype(np.float32),
        light=(rng.random(n) * 2 * math.pi).astype(np.float32),
    )


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance to each shape of unit radius, stacked on a new dim 1 in the order of SHAPES."""
    r = (x * x + y * y + 1e-9).sqrt()
    triangle = torch.maximum(y - 0.7, (math.sqrt(3) * x.abs() - y - 1) / 2)
    fifth = 2 * math.pi / 5
    turn = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
    dx, dy = 0.45 * math.cos(fifth / 2) - 1, 0.45 * math.sin(fifth / 2)
    star = ((r * turn.cos() - 1) * dy - r * turn.sin() * dx) / math.hypot(dx, dy)
    bars = (
        torch.maximum(x.abs() - 0.3, y.abs() - 0.95),
        torch.maximum(y.abs() - 0.3, x.abs() - 0.95),
    )
    lobes = ((x.abs() - 0.43) ** 2 + (y + 0.3) ** 2 + 1e-9).sqrt() - 0.53
    point = (x.abs() + (y - 0.1).abs() - 0.87) / math.sqrt(2)
    bite = 0.8 - ((x - 0.45) ** 2 + y * y + 1e-9).sqrt()
    return torch.stack(
        [
            r - 1,
            torch.maximum(x.abs(), y.abs()) - 0.85,
            triangle,
            star,
            (r - 0.75).abs() - 0.25,
            torch.minimum(*bars),
            torch.minimum(lobes, point),
            torch.maximum(r - 1, bite),
        ],
        1,
    )


def _pick(options: Tensor, index: Tensor) -> Tensor:
    """Return for each scene the entry of dim 1 that `index` (scene) names."""
    return options.gather(1, index[:, None, None, None].expand(-1, 1, *options.shape[2:]))[:, 0]


def render(draft: dict[str, Tensor], clouds: Tensor, grain: Tensor) -> tuple[Tensor, Tensor]:
    """Draw scenes: (scene, rgb, y, x) in [−1, 1], and the visible part of each object (scene, object, y, x) in [0, 1].

    `clouds` (scene, 1, y/4, x/4) and `grain` (scene, 1, y, x) are normal noise: soft blotches and film grain.
    An absent second object has an empty mask.
    """
    size, device = grain.shape[-1], grain.device
    line = torch.linspace(-1, 1, size, device=device)
    Y, X = line[:, None], line[None, :]

    def each(value: Tensor) -> Tensor:
        return value[:, None, None]

    base = torch.tensor(BACKGROUND_INK, device=device)[draft["background"]][:, :, None, None]
    slope = X * each(draft["light"].cos()) + Y * each(draft["light"].sin())
    image = base * (1 + 0.18 * slope[:, None])
    blotches = torch.nn.functional.interpolate(clouds, size=size, mode="bilinear", align_corners=False)
    image = image + 0.04 * blotches + 0.015 * grain
    masks: list[Tensor] = []
    for k in range(2):
        radius = each(draft["radius"][:, k])
        cos, sin = each(draft["angle"][:, k].cos()), each(draft["angle"][:, k].sin())
        x0 = (X - each(draft["centre"][:, k, 0])) / radius
        y0 = (Y - each(draft["centre"][:, k, 1])) / radius
        far = _pick(distances(cos * x0 + sin * y0, cos * y0 - sin * x0), draft["shape"][:, k])
        mask = torch.sigmoid(-far * radius * size)
        if k == 1:
            mask = mask * each(draft["two"].float())
        ink = _ink(draft["color"][:, k], draft["pattern"][:, k], X * cos + Y * sin, Y * cos - X * sin)
        ink = ink * (1.1 - 0.18 * (x0 * x0 + y0 * y0).clamp(0, 1.5))[:, None]
        image = image * (1 - mask[:, None]) + ink * mask[:, None]
        masks = [m * (1 - mask) for m in masks] + [mask]
    return image.clamp(0, 1) * 2 - 1, torch.stack(masks, 1)


def _ink(color: Tensor, pattern: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return an object's color everywhere (scene, rgb, y, x): its own, crossed by its pattern in a darker one."""
    light = torch.tensor(COLOR_INK, device=x.device)[color][:, :, None, None]
    dark = torch.where((color == COLORS.index("black"))[:, None, None, None], light + 0.45, light * 0.35)
    f = 10 * math.pi
    stripes = torch.sigmoid(6 * torch.sin(f * x))
    u, v = torch.sin(0.7 * f * x), torch.sin(0.7 * f * y)
    checks, dots = torch.sigmoid(12 * u * v), torch.sigmoid(12 * (0.5 - u * u - v * v))
    marks = _pick(torch.stack([torch.zeros_like(stripes), stripes, checks, dots], 1), pattern)[:, None]
    return light * (1 - marks) + dark * marks


def noise(n: int, rng: np.random.Generator, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Return the clouds and the grain of `n` pictures, the same for the same generator on every device."""
    clouds = rng.standard_normal((n, 1, size // 4, size // 4), dtype=np.float32)
    grain = rng.standard_normal((n, 1, size, size), dtype=np.float32)
    return torch.from_numpy(clouds), torch.from_numpy(grain)


def to_pixels(images: Tensor) -> np.ndarray:
    """Turn pictures (n, rgb, y, x) in [−1, 1] into uint8 (n, height, width, rgb)."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


class Drawing(NamedTuple):
    """What `draw` returns: pictures, the objects' masks, what they show, and a caption of each."""

    images: np.ndarray
    masks: np.ndarray
    scenes: list[Scene]
    captions: list[str]


def draw(n: int, seed: int = 0, *, full: bool = False) -> Drawing:
    """Draw `n` scenes of the world in which the model was trained.

    Returns images uint8 (n, height, width, rgb); masks bool (n, object, height, width), the visible part of each
    object, all False for a second object that is not there; scenes, every attribute of each; and captions, which
    leave some attributes out as in training, or none with `full=True`. Training never uses these seeds.

    >>> picture = draw(1, seed=3)
    >>> picture.images.shape, picture.masks.shape
    ((1, 128, 128, 3), (1, 2, 128, 128))
    """
    rng = np.random.default_rng([HELD_OUT, seed])
    draft = sample(n, rng)
    words = random_for(HELD_OUT, seed)
    scenes = draft.scenes()
    said = [caption(scene if full else drop(scene, words), words) for scene in scenes]
    pictures, masks = [], []
    for start in range(0, n, 64):
        part = slice(start, min(start + 64, n))
        tensors: dict[str, Any] = {name: value[part] for name, value in draft.tensors().items()}
        image, mask = render(tensors, *noise(part.stop - start, rng))
        pictures.append(to_pixels(image))
        masks.append((mask > 0.5).numpy())
    return Drawing(np.concatenate(pictures), np.concatenate(masks), scenes, said)


HELD_OUT = 1_000_003  # the first word of every seed used for measuring; training's begin with another
