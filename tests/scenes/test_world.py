"""The drawn world: repeatable, masks that are where the objects are, captions that read back as they were meant."""

import random
from dataclasses import replace

import numpy as np
import pytest

from interp.errors import InterpError
from interp.scenes import captions, draw, pairs, prompts
from interp.scenes.grammar import Scene, Thing, agreement_of, matched, parse
from interp.scenes.world import BACKGROUND_INK, COLOR_INK


@pytest.fixture(scope="module")
def drawn():
    return draw(48, seed=7)


def test_same_seed_same_pictures(drawn):
    again, other = draw(48, seed=7), draw(48, seed=8)
    assert np.array_equal(drawn.images, again.images) and drawn.captions == again.captions
    assert not np.array_equal(drawn.images, other.images)
    assert drawn.images.dtype == np.uint8 and drawn.images.shape == (48, 128, 128, 3)


def test_masks_are_disjoint_and_present(drawn):
    assert drawn.masks.dtype == bool and not (drawn.masks[:, 0] & drawn.masks[:, 1]).any()
    area = drawn.masks.sum((2, 3))
    for scene, pixels in zip(drawn.scenes, area, strict=True):
        assert pixels[0] > 100
        assert (pixels[1] > 100) == (len(scene.objects) == 2)


def test_masks_lie_where_the_color_is(drawn):
    """Inside a plain object's mask pixels are nearer its own color than the background's; outside, the reverse."""
    from interp.scenes.grammar import BACKGROUNDS, COLORS

    checked = 0
    for image, masks, scene in zip(drawn.images / 255.0, drawn.masks, drawn.scenes, strict=True):
        if len(scene.objects) != 1 or scene.objects[0].pattern != "plain":
            continue
        thing = scene.objects[0]
        own = np.abs(image - COLOR_INK[COLORS.index(thing.color)]).sum(-1)
        if (
            np.abs(
                np.subtract(COLOR_INK[COLORS.index(thing.color)], BACKGROUND_INK[BACKGROUNDS.index(scene.background)])
            ).sum()
            < 0.9
        ):
            continue  # black on navy: shading makes them too much alike to tell by the pixel
        behind = np.abs(image - BACKGROUND_INK[BACKGROUNDS.index(scene.background)]).sum(-1)
        assert (own < behind)[masks[0]].mean() > 0.9
        assert (own > behind)[~masks[0]].mean() > 0.9
        y, x = np.argwhere(masks[0]).mean(0) / 128
        assert abs(x - thing.x) < 0.12 and abs(y - thing.y) < 0.12
        checked += 1
    assert checked


def test_captions_read_back_as_what_they_name():
    rng = random.Random(0)
    for scene in draw(1, seed=2).scenes * 50 + draw(200, seed=3).scenes:
        meant = captions.drop(scene, rng)
        read = parse(captions.caption(meant, rng))
        assert len(read.named()) == len(meant.named())
        assert all(matched(meant, read).values())


def test_a_wrong_caption_names_as_much_and_is_wrong():
    rng = random.Random(0)
    for scene in draw(100, seed=4).scenes:
        meant = captions.drop(scene, rng)
        other = captions.altered(meant, rng)
        assert len(other.named()) == len(meant.named()) and other != meant


def test_prompts_and_pairs():
    assert prompts(5, objects=2, seed=1) == prompts(8, objects=2, seed=1)[:5]
    assert all(len(parse(p).objects) == k for k in (1, 2) for p in prompts(20, objects=k))
    for a, b in (map(parse, pair) for pair in pairs(60)):
        assert [n[:2] for n in a.named()] == [n[:2] for n in b.named()]
        assert not any(x == y for x, y in zip(a.named(), b.named(), strict=True))
        assert agreement_of(a, b) < 0.5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a small blue square left of a large dotted yellow star", (("small", "blue"), ("large", "yellow"), "left of")),
        ("below a large yellow star is a small blue square", (("large", "yellow"), ("small", "blue"), "above")),
        (
            "a square and a star. the star is yellow and large. the square is right of the star. the square is small, blue",
            (("small", "blue"), ("large", "yellow"), "right of"),
        ),
        ("small blue square above large yellow star", (("small", "blue"), ("large", "yellow"), "above")),
    ],
)
def test_reading(prompt, expected):
    scene = parse(prompt)
    assert (*((t.size, t.color) for t in scene.objects), scene.relation) == expected


def test_nothing_known():
    with pytest.raises(InterpError, match="names nothing"):
        parse("an oil portrait")


def test_agreement_pairs_objects_in_the_best_way():
    seen = Scene((Thing("star", "red", "plain", "large"), Thing("ring", "blue", "plain", "small")), "navy", "left of")
    named = parse("a blue ring right of a red star on a navy background")
    assert agreement_of(named, seen) == 1
    turned = parse("a blue ring left of a red star on a navy background")
    assert agreement_of(turned, seen) == pytest.approx(5 / 6)
    assert agreement_of(named, replace(seen, objects=seen.objects[:1], relation=None)) == pytest.approx(3 / 6)
