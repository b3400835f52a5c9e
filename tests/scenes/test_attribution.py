"""Measuring maps against masks: the measures by other formulas, and that what is measured is what the probe gives."""

import numpy as np
import pytest

import interp
from interp.scenes.attribution import Scores, main, of_tokens, recorded, rival
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
    return smooth, masks


def test_average_precision_is_the_sum_over_recall_steps(maps):
    """Σ (R_n − R_{n−1}) P_n over the distinct values as thresholds, from the hottest down."""
    for heat, mask, found in zip(*maps, average_precision(*maps), strict=True):
        total, before = 0.0, 0.0
        for threshold in sorted(set(heat), reverse=True):
            taken = heat >= threshold
            recall, precision = (taken & mask).sum() / mask.sum(), (taken & mask).sum() / taken.sum()
            total, before = total + (recall - before) * precision, recall
        assert found == pytest.approx(total)


def test_average_precision_of_known_cases():
    mask = np.array([[True, True, False, False]])
    cases = {(4, 3, 2, 1): 1.0, (1, 2, 3, 4): (1 / 3 + 2 / 4) / 2, (1, 1, 1, 1): 0.5}  # right, wrong, no idea: chance
    for heat, wanted in cases.items():
        assert average_precision(np.array([heat], float), mask)[0] == pytest.approx(wanted)


def test_overlap_and_pointing_are_those_of_sets(maps):
    overlap, points = intersection_over_union(*maps), pointing(*maps)
    for i, (heat, mask) in enumerate(zip(*maps, strict=True)):
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
    keep = interp.Capture(heads="all", latents=False, noise_pred=False, image=False)
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
                    words.append(text)
                    kinds.append(kind)
                    masks.append(
                        [mask[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean() > 0.5 for y in range(32) for x in range(32)]
                    )
        assert kinds == m.kinds and np.array_equal(masks, m.masks)
        ours = run.probe("token_attribution", words=words, grid="32x32").word_map.values[0].reshape(len(words), -1)
        np.testing.assert_allclose(rival(m, m.logs.mean((0, 1))), ours, atol=1e-4)
        for level in range(
            len(LEVELS)
        ):  # one at a time: the probe clamps what a cubic undershoots after its mean over steps
            options = {"words": words, "grid": "32x32", "recipe": "daam", "normalize": "none", "steps": level}
            theirs = run.probe("token_attribution", **options).word_map.values[0].reshape(len(words), -1)
            np.testing.assert_allclose(of_tokens(m.raw[level].mean(0), m.wanted), theirs, atol=1e-6)


def test_the_program_writes_its_tables(tmp_path):
    main(["--n", "6", "--levels", "300", "100", "--out", str(tmp_path / "tables.md")])
    text = (tmp_path / "tables.md").read_text()
    assert "3 pictures chose, 3 with" in text
    for line in (
        "| mean of all |",
        "| best head, log-odds (",
        "| heads weighted, mean |",
        "| 9 `up_blocks.0.attentions.1` |",
    ):
        assert line in text, line
    numbers = [float(cell) for line in text.splitlines() if line.startswith("| 0 ") for cell in line.split("|")[2:-1]]
    assert len(numbers) == 10 and all(0 <= n <= 1 for n in numbers)


def test_scores_of_perfect_maps_are_one():
    m = next(m for _, m in recorded(1, seed=4, levels=(100,)))
    scores = Scores()
    scores.add(0, m, {"truth": m.masks.astype(float), "untruth": -m.masks.astype(float)})
    precision, point, overlap = scores.of("truth")
    assert (precision == 1).all() and (point == 1).all() and (overlap == 1).all()
    assert scores.precision("untruth") < 0.5
