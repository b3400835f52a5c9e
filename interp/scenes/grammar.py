"""What a scene is, the words that name it, and reading a prompt back into the attributes that it names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import permutations
from typing import Any

from interp.errors import InterpError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink", "white", "black")
PATTERNS = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("gray", "brown", "navy", "beige")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# What an object is said to be, beside where it is.
ATTRIBUTES = ("size", "pattern", "color", "shape")
_KINDS = {
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(PATTERNS, "pattern"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(BACKGROUNDS, "background"),
}
_FILLERS = [
    "a",
    "an",
    "the",
    "and",
    "on",
    "in",
    "of",
    "is",
    "there",
    "with",
    "which",
    "that",
    "it",
    "photo",
    "painting",
    "picture",
    "drawing",
    "background",
]
WORDS = tuple(dict.fromkeys([*_FILLERS, *" ".join(RELATIONS).split(), *_KINDS]))


@dataclass(frozen=True)
class Thing:
    """One object: what is known or said of it (None: not said), and where its centre is.

    `x` and `y` are fractions of the picture's width and height, from the left and from the top.
    """

    shape: str | None = None
    color: str | None = None
    pattern: str | None = None
    size: str | None = None
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Scene:
    """One or two objects, how the first stands to the second, and the background; None is not known or said."""

    objects: tuple[Thing, ...] = ()
    background: str | None = None
    relation: str | None = None

    def named(self) -> list[tuple[int | None, str, str]]:
        """Return what is said, as (object or None, attribute, value), the objects counted from 0."""
        said: list[tuple[int | None, str, str]] = [
            (i, name, value)
            for i, thing in enumerate(self.objects)
            for name in ATTRIBUTES
            if (value := getattr(thing, name)) is not None
        ]
        if self.relation is not None and len(self.objects) == 2:
            said.append((None, "relation", self.relation))
        if self.background is not None:
            said.append((None, "background", self.background))
        return said

    def seen_from(self, order: tuple[int, ...]) -> "Scene":
        """Return the same scene with its objects in another order, the relation turned to fit."""
        turned = self.relation if order == tuple(sorted(order)) or self.relation is None else INVERSE[self.relation]
        return replace(self, objects=tuple(self.objects[i] for i in order), relation=turned)


@dataclass(frozen=True)
class Verdict(Scene):
    """What the judge sees in a picture: objects from left to right, or from top to bottom when stacked.

    `confidence` holds the probability the judge gives to each answer, in the order of `named()`.
    """

    confidence: tuple[float, ...] = field(default=(), compare=False)


def parse(prompt: str) -> Scene:
    """Read the attributes that `prompt` names, by the world's grammar; words it does not know are passed over.

    Adjectives belong to the noun that follows, or, where an article, a relation or the end comes first, to the
    object last spoken of. "the circle" is the circle already there. Raises InterpError if nothing is named.

    >>> parse("left of a ring is a circle, which is red, on a navy background").named()
    [(0, 'shape', 'ring'), (1, 'color', 'red'), (1, 'shape', 'circle'), (None, 'relation', 'right of'), \
(None, 'background', 'navy')]
    """
    reader = _Reader()
    words = re.findall(r"[a-z]+|[.,;:]", prompt.lower())
    for word, following in zip(words, [*words[1:], ""], strict=True):
        reader.read(word, following)
    scene = reader.scene()
    if not scene.named():
        raise InterpError(
            f"the prompt {prompt!r} names nothing that the scenes judge knows; it knows the shapes "
            f"{', '.join(SHAPES)}, the colors {', '.join(COLORS)}, the patterns {', '.join(PATTERNS)}, the sizes "
            f"{', '.join(SIZES)}, the backgrounds {', '.join(BACKGROUNDS)} and the relations "
            f"{', '.join(RELATIONS)}: name at least one of them"
        )
    return scene


class _Reader:
    """The state of reading one prompt, word by word."""

    def __init__(self) -> None:
        self.things: list[dict[str, str]] = []
        self.background: str | None = None
        self.loose: dict[str, str] = {}  # adjectives whose noun is not yet known
        self.current: int | None = None  # the object last spoken of
        self.definite = False
        self.pending: str | None = None  # a relation whose second object is yet to come
        self.subject: int | None = None  # the object of which it is said; None: it is yet to come as well
        self.links: list[tuple[int, str, int]] = []

    def read(self, word: str, following: str) -> None:
        kind = _KINDS.get(word)
        relation = f"{word} of" if word in ("left", "right") and following == "of" else word
        if kind == "shape":
            self.noun(word)
        elif kind == "background":
            self.background = word
        elif kind is not None:
            self.loose[kind] = word
        elif relation in RELATIONS:
            self.settle()
            self.pending, self.subject = relation, self.current
        elif word in ("a", "an", "the", "on", "."):
            self.settle()
            self.definite = word == "the"
            if word == ".":
                self.current = None

    def settle(self) -> None:
        """Give adjectives that found no noun of their own to the object last spoken of."""
        if self.current is not None:
            self.things[self.current].update(self.loose)
        self.loose = {}

    def noun(self, shape: str) -> None:
        known = [i for i, thing in enumerate(self.things) if thing["shape"] == shape]
        if self.definite and known:
            at = known[0]
        else:
            self.things.append({"shape": shape})
            at = len(self.things) - 1
        self.things[at].update(self.loose)
        self.loose, self.definite, self.current = {}, False, at
        if self.pending is not None and self.subject is None:
            # "left of B is A": B comes first, and the next object is the one of which it is said.
            self.links.append((-1, self.pending, at))
            self.pending = None
        elif self.pending is not None and self.subject is not None:
            self.links.append((self.subject, self.pending, at))
            self.pending = None
        elif self.links and self.links[-1][0] == -1:
            _, relation, other = self.links.pop()
            self.links.append((at, relation, other))

    def scene(self) -> Scene:
        self.settle()
        relation = None
        for first, name, second in self.links:
            if {first, second} == {0, 1}:
                relation = name if first == 0 else INVERSE[name]
        objects = tuple(replace(Thing(), **dict[str, Any](thing)) for thing in self.things)
        return Scene(objects, self.background, relation)


def matched(named: Scene, seen: Scene) -> dict[tuple[int | None, str], bool]:
    """Say of each attribute that `named` names whether it is seen, as (object or None, attribute) → bool.

    The objects of the two are paired in the way that makes most attributes agree; an object that is not seen has
    none of its attributes, and a relation counts only between the paired objects.

    >>> red = Thing("circle", "red", "plain", "large")
    >>> matched(parse("a small red circle"), Scene((red,), "navy"))
    {(0, 'size'): False, (0, 'color'): True, (0, 'shape'): True}
    """
    return _compare(named, paired(named, seen))


def paired(named: Scene, seen: Scene) -> Scene:
    """Return what is seen with its objects in the order of those of `named`, so that most attributes agree.

    >>> both = Scene((Thing("ring"), Thing("star")), relation="above")
    >>> paired(parse("a star and a ring"), both).relation
    'below'
    """
    missing = len(named.objects) - len(seen.objects)
    if missing > 0:
        seen = Scene((*seen.objects, *[Thing()] * missing), seen.background, seen.relation)
    orders: Iterable[tuple[int, ...]] = permutations(range(len(seen.objects)))
    return max((seen.seen_from(order) for order in orders), key=lambda s: sum(_compare(named, s).values()))


def _compare(named: Scene, seen: Scene) -> dict[tuple[int | None, str], bool]:
    found = {(i, name): value for i, name, value in seen.named()}
    return {(i, name): found.get((i, name)) == value for i, name, value in named.named()}


def agreement_of(named: Scene, seen: Scene) -> float:
    """Return the share of the attributes named that are seen: 1.0 is a picture of just what was asked."""
    answer = matched(named, seen)
    return sum(answer.values()) / len(answer)


def thing_names() -> tuple[str, ...]:
    """Return the names of an object's fields, those of its place included.

    >>> thing_names()
    ('shape', 'color', 'pattern', 'size', 'x', 'y')
    """
    return tuple(f.name for f in fields(Thing))
