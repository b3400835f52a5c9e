"""Measuring maps against masks: the measures by other formulas, and that what is measured is what the probe gives."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.errors import InterpError
from interp.probes.rivals import log_odds
from interp.scenes.attribution.__main__ import main
from interp.scenes.attribution.pictures import recorded
from interp.scenes.attribution.recipes import AGAINST, AVERAGES, DAAM, EVERY, SPREAD, Recipe, maps_of, strongest
from interp.scenes.attribution.scores import CROSS, GEOMETRIC, MEAN_CROSS, WITH_SELF, Scores, choose, everything
from interp.scenes.marked import MARK
from interp.scenes.masks import THRESHOLDS, average_precision, intersection_over_union, pointing
from interp.scenes.world import draw


@pytest.fixture(scope="module")
def maps():
    """Hand-made maps with and without ties, and masks of one to many pixels."""
    random = np.random.default_rng(0)
    masks = random.random((40, 64)) < random.uniform(0.05, 0.9, (40, 1))
    masks[:, 0] = True
    smooth = random.normal(size=(40, 64)) + masks
    smooth[20:] = np.round(smooth[20:])  # ties
    return torch.from_numpy(smooth), torch.from_numpy(masks)


def test_average_precision_is_the_sum_over_recall_steps(maps):
    """Σ (R_n − R_{n−1}) P_n over the distinct values as thresholds, from the hottest down."""
    for heat, mask, found in zip(*(m.numpy() for m in (*maps, average_precision(*maps))), strict=True):
        total, before = 0.0, 0.0
        for threshold in sorted(set(heat), reverse=True):
            taken = heat >= threshold
            recall, precision = (taken & mask).sum() / mask.sum(), (taken & mask).sum() / taken.sum()
            total, before = total + (recall - before) * precision, recall
        assert found == pytest.approx(total)


def test_average_precision_of_known_cases():
    mask = torch.tensor([[True, True, False, False]])
    cases = {(4, 3, 2, 1): 1.0, (1, 2, 3, 4): (1 / 3 + 2 / 4) / 2, (1, 1, 1, 1): 0.5}  # right, wrong, no idea: chance
    for heat, wanted in cases.items():
        assert average_precision(torch.tensor([heat]), mask).item() == pytest.approx(wanted)


def test_overlap_and_pointing_are_those_of_sets(maps):
    overlap, points = intersection_over_union(*maps), pointing(*maps)
    for i, (heat, mask) in enumerate(zip(*(m.numpy() for m in maps), strict=True)):
        scaled = (heat - heat.min()) / np.ptp(heat)
        inside = set(np.flatnonzero(mask))
        for k, threshold in enumerate(THRESHOLDS):
            taken = set(np.flatnonzero(scaled >= threshold - 1e-9))
            assert overlap[i, k] == pytest.approx(len(taken & inside) / len(taken | inside))
        assert points[i] == (int(np.argmax(heat)) in inside)


def test_measures_do_not_depend_on_a_map_s_scale(maps):
    heat, mask = maps
    for measure in (average_precision, intersection_over_union, pointing):
        np.testing.assert_allclose(measure(3 * heat - 7, mask), measure(heat, mask))


LEVELS = (500, 100)


def test_what_is_measured_is_what_the_probe_gives():
    """The maps that are scored are those of `token_attribution` on the same pictures, its masks those of the renders."""
    pipe = interp.load("scenes")
    found = list(recorded(2, seed=4, levels=LEVELS, pipe=pipe))
    drawn = draw(4, seed=4)  # twice as many as are wanted: what a seed draws depends on their number
    distinct = [
        i
        for i, scene in enumerate(drawn.scenes)
        if len({t.shape for t in scene.objects}) == len({t.color for t in scene.objects}) == len(scene.objects)
    ]
    keep = interp.Capture(attention="all", heads="all", latents=False, noise_pred=False, image=False)
    texts = [drawn.captions[i] for i in distinct[:2]]
    both = interp.encode_image(
        pipe, drawn.images[distinct[:2]], LEVELS, prompt=texts, capture=keep
    )  # one batch, as there
    for number, m in found:
        i, run = distinct[number], both.isel(number)
        words, kinds, masks = [], [], []
        for thing, mask in zip(drawn.scenes[i].objects, drawn.masks[i], strict=False):
            for kind, text in (
                ("color", thing.color),
                ("shape", thing.shape),
                ("span", f"{thing.color} {thing.shape}"),
            ):
                if text in drawn.captions[i]:
                    two = len(drawn.scenes[i].objects) == 2
                    assert bool(m.others[len(words)].any()) == two and not (m.others & m.masks).any()
                    words.append(text)
                    kinds.append(kind)
                    masks.append(
                        [mask[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean() > 0.5 for y in range(32) for x in range(32)]
                    )
        assert kinds == m.kinds and np.array_equal(masks, m.masks)
        options = {"words": words, "grid": "32x32"}
        walked = GEOMETRIC._replace(spread="self-attention")
        for recipe, spread in ((GEOMETRIC, 0), (walked, None)):
            ours = run.probe("token_attribution", **options, spread=spread).word_map.values[0].reshape(len(words), -1)
            np.testing.assert_allclose(maps_of(m, [recipe])[recipe], ours, atol=1e-3 if spread is None else 1e-4)
        for level in range(
            len(LEVELS)
        ):  # one by one: the probe clamps what a cubic undershoots after its mean over steps
            options |= {"recipe": "daam", "normalize": "none", "steps": level}
            theirs = run.probe("token_attribution", **options).word_map.values[0].reshape(len(words), -1)
            np.testing.assert_allclose(maps_of(m.part(levels=[level]), [DAAM])[DAAM], theirs, atol=1e-6)


@pytest.fixture(scope="module")
def picture():
    return next(p for _, p in recorded(1, seed=4, levels=(300, 100)))


def test_self_attention_is_that_of_a_run_and_spreads_without_gain(picture):
    """Rows sum to one, so an even map stays as it is; walking twice is walking once, twice."""
    near = picture.near.mean(0)
    assert near.shape == (1024, 1024) and torch.allclose(near.sum(1), torch.ones(1024), atol=2e-3)
    even, maps = torch.ones(1, 1024), torch.randn(2, 1024)
    for name, spread in SPREAD.items():
        assert torch.allclose(spread(picture, even), even, atol=1e-5), name
    once = SPREAD["self-attention"]
    assert torch.allclose(SPREAD["self-attention twice"](picture, maps), once(picture, once(picture, maps)), atol=1e-6)
    by_hand = sum(near[:, k] * maps[0, k] for k in range(1024)) / near.sum(1)
    assert torch.allclose(once(picture, maps)[0], by_hand, atol=1e-5)


def test_rivals_are_those_of_the_probe():
    random = np.random.default_rng(0)
    own, words, shared = random.normal(size=(3, 5)), random.normal(size=(4, 5)), random.random((3, 4)) < 0.4
    found = strongest(*map(torch.from_numpy, (own, words, shared)))
    assert np.allclose(found, log_odds(own, words, shared))


def test_heads_that_see_nothing_have_no_say_in_an_average_of_logarithms(picture):
    """A head of even attention shifts every word alike: against other words, nothing changes but the scale."""
    flat = torch.full_like(picture.raw[:, :1], 0.01)
    more = replace(
        picture, raw=torch.cat([picture.raw, flat], 1), logs=torch.cat([picture.logs, flat.log()], 1),
        layer=np.append(picture.layer, 99), grid=np.append(picture.grid, 0),
    )  # fmt: skip
    units = picture.raw.shape[1]
    for average, scale in (("geometric", units / (units + 1)), ("geometric, by contrast", 1)):
        recipe = Recipe(average, "the strongest word", "as it is")
        assert torch.allclose(maps_of(more, [recipe])[recipe], scale * maps_of(picture, [recipe])[recipe], atol=1e-4)


def test_the_choosing_half_chooses(picture):
    """Among all recipes the one with the highest average precision, with self-attention only where that is allowed."""
    scores = Scores()
    found = everything(picture)
    recipes = {n.recipe for n in found if hasattr(n, "recipe")}
    assert recipes == set(EVERY) and len(recipes) == len(AVERAGES) * len(AGAINST) * len(SPREAD)
    scores.add(0, picture, found)
    rows = choose(scores).rows
    for text, heads, walks in ((CROSS, "all", False), (WITH_SELF, "all", True), (MEAN_CROSS, "mean", False)):
        precision = {
            n: scores.of(n)[0].mean()
            for n in found
            if getattr(n, "heads", "") == heads and (walks or "self" not in n.recipe.spread)
        }
        assert precision[rows[text]] == max(precision.values())
    heads = {n: scores.of(n)[0].mean() for n in found if n[:2] == ("mean", "head")}
    assert heads[rows["best head, mean"]] == max(heads.values()) and len(heads) == picture.raw.shape[1]


def test_the_program_writes_its_tables(tmp_path):
    """As a page and as numbers, every mean inside its interval; what was measured once fills another page."""
    main(["--n", "4", "--levels", "100", "--out", str(tmp_path / "tables.md")])
    text, found = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "tables.json").read_text())
    assert "2 pictures chose, 2 with" in text and "n = 4, seed 0" in text
    assert set(MARK.findall(text)) == {"settings", "summary", *found["tables"]}
    rows = {name: {row[0]: row[1:] for row in table["rows"]} for name, table in found["tables"].items()}
    assert {
        "DAAM: mean of all", "heads weighted by the choosing half, mean",
        "chosen, self-attention allowed, noise levels up to 300",
    } < set(rows["recipes"])  # fmt: skip
    assert rows["kinds"].keys() == rows["recipes"].keys()
    cells = [cell for table in rows.values() for row in table.values() for cell in row if not isinstance(cell, str)]
    told = [c for c in cells if c["low"] is not None]
    assert len(told) > 400 and all(0 <= c["low"] <= c["value"] <= c["high"] <= 1 for c in told)
    alone = {id(row[3]) for row in rows["recipes"].values()}  # own object, where a single picture has two
    assert all(id(c) in alone for c in cells if c["low"] is None)
    for measure in ("average precision", "pointing", "mIoU"):
        assert len(rows[f"levels, log-odds, {measure}"]) == 10 + 1 and len(rows[f"heads, {measure}"]) == 10
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- measured: heads, mIoU -->\nold\n<!-- end -->\nAfter.\n")
    with pytest.raises(InterpError, match="no place '<!-- measured: settings -->'; it has heads, mIoU"):
        main(["--measured", str(tmp_path / "tables.json"), "--page", str(page)])
    page.write_text(re.sub(r"(?s)(measured: [^>]* -->\n).*?(<!-- end)", r"\1\2", text))
    assert page.read_text() != text
    main(["--measured", str(tmp_path / "tables.json"), "--page", str(page)])
    assert page.read_text() == text


def test_scores_of_perfect_maps_are_one(picture):
    scores, truth = Scores(), picture.masks.double()
    scores.add(0, picture, {"truth": truth, "untruth": -truth})
    precision, point, overlap, own = scores.of("truth")
    assert (precision == 1).all() and (point == 1).all() and (overlap == 1).all()
    assert (own[np.isfinite(own)] == 1).all() and np.isfinite(own).all() == picture.others.any()
    assert not (scores.of("untruth")[3] == 1).any()
    assert scores.precision("untruth") < 0.5
