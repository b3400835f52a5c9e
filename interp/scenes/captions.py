"""Saying what a scene shows, in many ways: the captions of training, and the prompts of experiments.

About half of the captions are short and plain ("a small blue square left of a large dotted yellow star, on a
navy background"). The others move attributes behind the noun, put the background or the relation first, or
spread one object over several sentences, so that no single word holds what the whole prompt says.
"""

import random
import re
from dataclasses import replace
from typing import Any

from interp.scenes.grammar import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    INVERSE,
    PATTERNS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

VALUES = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS, "size": SIZES, "background": BACKGROUNDS}
# How often a caption names each attribute of an object ("plain" is rarer: one seldom says it).
NAMED = {"size": 0.6, "color": 0.92, "pattern": 0.9, "plain": 0.25}
BACKGROUND_NAMED, RELATION_NAMED, PLAIN_STYLE = 0.65, 0.88, 0.5


def random_for(*seed: int) -> random.Random:
    """Return a generator of choices for a seed of several numbers."""
    return random.Random(" ".join(map(str, seed)))


def drop(scene: Scene, rng: random.Random) -> Scene:
    """Leave some of the scene's attributes unsaid, as captions do; the shape is always said."""
    objects = []
    for thing in scene.objects:
        unsaid = {
            name: None
            for name in ("size", "color", "pattern")
            if rng.random() > NAMED["plain" if getattr(thing, name) == "plain" else name]
        }
        objects.append(replace(thing, **unsaid))
    background = scene.background if rng.random() < BACKGROUND_NAMED else None
    relation = scene.relation if rng.random() < RELATION_NAMED else None
    return Scene(tuple(objects), background, relation)


def caption(scene: Scene, rng: random.Random, plain: float = PLAIN_STYLE) -> str:
    """Say what `scene` names, in one of many ways; `plain` is the share of short plain sentences.

    >>> caption(Scene((Thing("circle", "red"),), "navy"), random.Random(0), plain=1.0)
    'a picture of a red circle on a navy background'
    """
    return re.sub(r"\ba (?=orange)", "an ", _said(scene, rng, plain))


def _said(scene: Scene, rng: random.Random, plain: float) -> str:
    medium = rng.choice(("", "", "", "", "a photo of ", "a painting of ", "a picture of ", "a drawing of "))
    if rng.random() < plain:
        objects = [_phrase(thing) for thing in scene.objects]
        return medium + _joined(objects, scene.relation) + _on(scene.background)
    style = rng.random()
    if style < 0.35 and len({t.shape for t in scene.objects}) == len(scene.objects):
        return medium + _sentences(scene, rng)
    objects = [_phrase(thing, rng) for thing in scene.objects]
    body = _joined(objects, scene.relation, rng)
    if scene.background is None:
        return f"there is {body}" if not medium and style < 0.6 else medium + body
    where = f"a {scene.background} background"
    if medium:
        return f"{medium}{where} with {body}" if style < 0.65 else f"{medium}{body} on {where}"
    if style < 0.5:
        return f"on {where}, {body}"
    if style < 0.65:
        return f"{where} with {body}"
    if style < 0.8:
        return f"there is {body} on {where}"
    return f"on {where} there is {body}"


def _on(background: str | None) -> str:
    return "" if background is None else f" on a {background} background"


def _joined(objects: list[str], relation: str | None, rng: random.Random | None = None) -> str:
    if len(objects) == 1:
        return objects[0]
    first, second = objects
    if relation is None:
        return f"{first} and {second}"
    if rng is not None and rng.random() < 0.4:
        return f"{relation} {second} is {first}"
    return f"{first} {relation} {second}"


def _phrase(thing: Thing, rng: random.Random | None = None) -> str:
    """Return a noun phrase: adjectives before the noun, or, given `rng`, sometimes in another order or behind."""
    order = ["size", "pattern", "color"]
    if rng is not None:
        rng.shuffle(order)
    said = [value for name in order if (value := getattr(thing, name)) is not None]
    if rng is None or rng.random() < 0.4 or not said:
        return " ".join(["a", *said, str(thing.shape)])
    cut = rng.randrange(len(said))
    clause = f"{rng.choice((', which is', ' that is'))} {_listed(said[cut:])}"
    return " ".join(["a", *said[:cut], str(thing.shape)]) + clause


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sentences(scene: Scene, rng: random.Random) -> str:
    """Return several sentences: the objects first, what each is like and where it stands afterwards."""
    bare = [_phrase(replace(t, size=None, pattern=None, color=None)) for t in scene.objects]
    early = rng.random() < 0.5
    parts = [_joined(bare, scene.relation if early else None)]
    later = []
    for thing in scene.objects:
        order = ["size", "pattern", "color"]
        rng.shuffle(order)
        said = [value for name in order if (value := getattr(thing, name)) is not None]
        if said:
            later.append(f"the {thing.shape} is {_listed(said)}")
    if scene.relation is not None and not early:
        first, second = (str(thing.shape) for thing in scene.objects)
        later.append(f"the {first} is {scene.relation} the {second}")
    if scene.background is not None:
        later.append(f"the background is {scene.background}")
    rng.shuffle(later)
    return ". ".join(parts + later)


def altered(scene: Scene, rng: random.Random) -> Scene:
    """Return a scene that names just as much and is not this one: a hard negative.

    Of two objects, mostly the relation is turned or an attribute exchanged between them, so that the words stay
    the same and only what belongs to what is different; otherwise one attribute takes another value.
    """
    changes: list[Scene] = []
    if len(scene.objects) == 2:
        a, b = scene.objects
        if scene.relation is not None and a != b:
            changes.append(replace(scene, relation=INVERSE[scene.relation]))
        for name in ATTRIBUTES:
            one, other = getattr(a, name), getattr(b, name)
            if one != other and None not in (one, other) and scene.relation is not None:
                changes.append(exchanged(scene, name))
    if changes and rng.random() < 0.6:
        return rng.choice(changes)
    at, name, value = rng.choice(scene.named())
    change: dict[str, Any]
    if name == "relation":
        return replace(scene, relation=rng.choice([r for r in RELATIONS if r != value]))
    change = {name: rng.choice([v for v in VALUES[name] if v != value])}
    if at is None:
        return replace(scene, **change)
    objects = tuple(replace(t, **change) if i == at else t for i, t in enumerate(scene.objects))
    return replace(scene, objects=objects)


def exchanged(scene: Scene, name: str) -> Scene:
    """Return a scene of two objects with one attribute exchanged between them.

    >>> [thing.color for thing in exchanged(Scene((Thing("circle", "red"), Thing("star", "blue"))), "color").objects]
    ['blue', 'red']
    """
    a, b = scene.objects
    return replace(scene, objects=(replace(a, **{name: getattr(b, name)}), replace(b, **{name: getattr(a, name)})))


def prompts(n: int, objects: int = 1, seed: int = 0) -> list[str]:
    """Return `n` plain prompts about one or two objects, from seeds that training never uses.

    Color and shape are always named; size and pattern half of the time each, the background in two thirds, and
    of two objects always the relation. Same arguments, same prompts.

    >>> prompts(2, objects=2)[0] == prompts(1, objects=2)[0]
    True
    """
    rng = random.Random(f"prompts {objects} {seed}")
    return [caption(_asked(objects, rng), rng, plain=1.0) for _ in range(n)]


def pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `n` pairs of prompts (A, B) for exchanging EOS: equally many attributes, every one of them different.

    >>> from interp.scenes.grammar import parse
    >>> a, b = map(parse, pairs(1)[0])
    >>> len(a.named()) == len(b.named()), any(x == y for x, y in zip(a.named(), b.named()))
    (True, False)
    """
    rng = random.Random(f"pairs {seed}")
    found = []
    for _ in range(n):
        first = _asked(1 + rng.randrange(2), rng)
        second = first
        for at, name, value in first.named():
            choices = RELATIONS if name == "relation" else VALUES[name]
            # Two objects of a pair must not merely change places, so B avoids what A says of either.
            taken = {v for _, other, v in first.named() if other == name and len(choices) > 2}
            taken |= {getattr(t, name) for t in second.objects} if name == "shape" and at is not None else set()
            change: dict[str, Any] = {name: rng.choice([v for v in choices if v not in taken and v != value])}
            if at is None:
                second = replace(second, **change)
            else:
                things = [replace(t, **change) if i == at else t for i, t in enumerate(second.objects)]
                second = replace(second, objects=tuple(things))
        state = rng.getstate()
        a = caption(first, rng, plain=1.0)
        rng.setstate(state)  # the same opening for both
        found.append((a, caption(second, rng, plain=1.0)))
    return found


def _asked(objects: int, rng: random.Random) -> Scene:
    shapes = rng.sample(SHAPES, objects)
    colors = rng.sample(COLORS, objects)
    things = tuple(
        Thing(
            shape=shape,
            color=color,
            pattern=rng.choice(PATTERNS[1:]) if rng.random() < 0.5 else None,
            size=rng.choice(SIZES) if rng.random() < 0.5 else None,
        )
        for shape, color in zip(shapes, colors, strict=True)
    )
    background = rng.choice(BACKGROUNDS) if rng.random() < 0.67 else None
    return Scene(things, background, rng.choice(RELATIONS) if objects == 2 else None)
