"""Scores of word maps against masks, and what the choosing half of the pictures chooses."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp.scenes.attribution.pictures import Picture
from interp.scenes.attribution.recipes import DAAM, EVERY, Recipe, maps_of
from interp.scenes.masks import average_precision, intersection_over_union, own_object, pointing

GEOMETRIC = Recipe("geometric", "the strongest word", "as it is")
WAYS = {"mean": DAAM, "log-odds": GEOMETRIC}
"""By what single layers, noise levels and heads are scored."""
LATE = 300  # timesteps up to it are late


class Whole(NamedTuple):
    """A recipe over all that was recorded, with every head ("all") or heads averaged ("mean")."""

    heads: str
    recipe: Recipe


class Part(NamedTuple):
    """A way over a single layer, level, head, …; at: its numbers."""

    way: str
    what: str
    at: tuple[int, ...]


class Scores:
    """Average precision, pointing, overlap and own object of every target by every name, and its picture."""

    def __init__(self) -> None:
        self.picture: list[int] = []
        self.kind: list[str] = []
        self.chance: list[float] = []
        self.found: dict[Any, list[tuple[np.ndarray, ...]]] = {}

    def add(self, picture: int, p: Picture, maps: dict[Any, Tensor]) -> None:
        """Score the maps of one picture."""
        self.picture += [picture] * len(p.kinds)
        self.kind += p.kinds
        self.chance += p.masks.double().mean(1).tolist()
        both = torch.cat(list(maps.values())), p.masks.repeat(len(maps), 1)
        found = [s(*both) for s in (average_precision, pointing, intersection_over_union)]
        scored = [s.cpu().numpy() for s in (*found, own_object(*both, p.others.repeat(len(maps), 1)))]
        for k, name in enumerate(maps):
            at = slice(k * len(p.kinds), (k + 1) * len(p.kinds))
            self.found.setdefault(name, []).append(tuple(s[at] for s in scored))

    def of(self, name: Any) -> tuple[np.ndarray, ...]:
        """Return average precision (target,), pointing (target,), overlap (target, threshold) and own object (target,)."""
        return tuple(np.concatenate(part) for part in zip(*self.found[name], strict=True))

    def precision(self, name: Any) -> float:
        """Return the mean average precision."""
        return float(self.of(name)[0].mean())

    def best(self, names: Iterable[Any]) -> Any:
        """Return the name of the highest mean average precision, the first of several."""
        return max(names, key=self.precision)


@dataclass
class Choice:
    """What the choosing half chose: by the text of its row, and the weight of each head."""

    rows: dict[str, Any] = field(default_factory=dict)
    weights: np.ndarray = field(default_factory=lambda: np.ones(1))


CROSS, WITH_SELF = "chosen", "chosen, self-attention allowed"
MEAN_CROSS, MEAN_SELF = (
    "chosen, of maps averaged over heads",
    "chosen, of maps averaged over heads, self-attention allowed",
)


def choose(scores: Scores) -> Choice:
    """Choose the recipe with the highest average precision of each kind of capture, the best parts, and weights of heads.

    A head weighs the square of what its average precision is above chance.
    """
    rows: dict[str, Any] = {}
    for text, heads, walks in ((CROSS, "all", False), (WITH_SELF, "all", True), (MEAN_CROSS, "mean", False),
                               (MEAN_SELF, "mean", True)):  # fmt: skip
        rows[text] = scores.best(Whole(heads, r) for r in EVERY if walks or "self-attention" not in r.spread)
    for way in WAYS:
        for what in ("layer", "layer and level", "head"):
            known = [n for n in scores.found if isinstance(n, Part) and n[:2] == (way, what)]
            rows[f"best {what}, {way}"] = scores.best(known)
    single = [n for n in scores.found if isinstance(n, Part) and n[:2] == ("log-odds", "head")]
    above = np.array([scores.precision(n) for n in single]) - np.mean(scores.chance)
    return Choice(rows, np.maximum(above, 0) ** 2 + 1e-12)


def everything(p: Picture) -> dict[Any, Tensor]:
    """Return the maps of every recipe, with heads apart and averaged, of DAAM's own layers, and of every single part."""
    fine = p.part(units=p.grid != p.grid.max()) if len(np.unique(p.grid)) > 1 else p
    found: dict[Any, Tensor] = {Whole("all", r): maps for r, maps in maps_of(p, EVERY).items()}
    found |= {Whole("mean", r): maps for r, maps in maps_of(p.heads_averaged(), EVERY).items()}
    found[Part("mean", "without the coarsest grid", ())] = maps_of(fine, [DAAM])[DAAM]
    return found | _parts(p)


def _parts(p: Picture) -> dict[Any, Tensor]:
    levels, units, layers = range(len(p.raw)), np.arange(p.raw.shape[1]), np.unique(p.layer)
    chosen: dict[tuple[str, tuple[int, ...]], Picture] = {}
    for k in layers:
        chosen["layer", (int(k),)] = mine = p.part(units=p.layer == k)
        chosen |= {("layer and level", (int(k), level)): mine.part(levels=[level]) for level in levels}
    chosen |= {("level", (level,)): p.part(levels=[level]) for level in levels}
    chosen |= {("head", (int(u),)): p.part(units=units == u) for u in units}
    recipes = list(WAYS.values())
    found: dict[Any, Tensor] = {}
    for (what, at), part in chosen.items():
        maps = maps_of(part, recipes)
        found |= {Part(way, what, at): maps[recipe] for way, recipe in WAYS.items()}
    return found


def afterwards(p: Picture, choice: Choice, levels: tuple[int, ...]) -> dict[Any, Tensor]:
    """Return maps that need the choice: the chosen recipe at late noise levels alone, and heads that weigh differently."""
    found: dict[Any, Tensor] = {}
    late = np.flatnonzero(np.array(levels) <= LATE)
    if len(late):
        for text in (CROSS, WITH_SELF):
            recipe = choice.rows[text].recipe
            found[f"{text}, noise levels up to {LATE}"] = maps_of(p.part(levels=late), [recipe])[recipe]
    heavy = p.weighed(torch.from_numpy(choice.weights / choice.weights.mean()))
    for way, recipe in WAYS.items():
        found[f"heads weighted by the choosing half, {way}"] = maps_of(heavy, [recipe])[recipe]
    return found
