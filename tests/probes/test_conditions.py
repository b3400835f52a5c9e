"""Probes that compare conditions of one run: pairs, windows, distances and intervals worked out by hand."""

import numpy as np
import pytest
import xarray as xr

from interp.probes.ablation import token_ablation
from interp.probes.causal import causal_tracing
from interp.probes.comparing import compare, relative
from interp.probes.conditions import describe, pair_up, steps_of
from interp.probes.lens import diffusion_lens
from interp.probes.testing import changed_run
from interp.probes.windows import acceleration, text_window
from interp.stores import InterpError, synthetic_run
from tests.probes.handmade import make_run, scores, trajectory


def off(start=None, stop=None, unit="fraction", name="remove_text"):
    return [{"name": name, "start": start, "stop": stop, "unit": unit}]


def hand_run(conditions, prompts=3, steps=10, metrics=("clip:prompt",), missing=(), status=None):
    """Each condition of `conditions` (after baseline) over prompts; numbers drawn at random, returned by condition."""
    names = ["baseline", *conditions]
    rows = [(c, p) for c in names for p in range(prompts)]
    rng = np.random.default_rng(0)
    final = rng.standard_normal((len(rows), 2, 4, 4)).astype("float32")
    images = rng.integers(0, 256, (len(rows), 6, 6, 3)).astype("uint8")
    score = {m: rng.uniform(size=len(rows)).astype("float32") for m in metrics}
    levels = np.linspace(0.1, 0.9, steps)
    node = trajectory(np.repeat(final[:, None], steps, 1), final, levels, 1 - levels)
    node = node.assign_coords(sigma=("step", np.linspace(10, 0.1, steps)))
    nodes = {"trajectory": node, "images": xr.Dataset({"image": (("sample", "height", "width", "rgb"), images)})}
    if metrics:
        nodes["scores"] = scores(**{m.replace(":", "__"): v for m, v in score.items()})
    table = {
        "prompt": [f"prompt {p}" for _, p in rows],
        "condition": [c for c, _ in rows],
        "prompt_id": [p for _, p in rows],
        "seed": [7] * len(rows),
        "status": [0 if row in missing else 1 for row in rows] if status is None else status,
    }
    run = make_run(nodes, **table)
    run.tree.attrs |= {"conditions": {"baseline": [], **conditions}, "steps": steps}
    return run, final.astype(float), images.astype(float), score, rows


def l1(a, b):
    return np.abs(a - b).mean() / 255


def l2(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("start", "stop", "unit", "steps"),
    [
        (0.6, None, "fraction", [6, 7, 8, 9]),
        (None, 0.25, "fraction", [0, 1, 2]),  # 2.5 steps: the third begins before the window ends
        (None, 0.2, "fraction", [0, 1]),
        (3, 7, "step", [3, 4, 5, 6]),
        (0, 1, "step", [0]),
        (5.0, 2.0, "sigma", [5, 6, 7]),  # falls: 10, 9, …, 1; the start counts, the stop does not
        (None, 8.5, "sigma", [0, 1]),
        (300, None, "timestep", [7, 8, 9]),
        (None, None, "fraction", list(range(10))),
    ],
)
def test_windows_are_half_open_in_every_unit(start, stop, unit, steps):
    levels = {"timestep": np.arange(1000, 0, -100.0), "sigma": np.arange(10, 0, -1.0)}
    run = xr.Dataset(coords={"step": np.arange(10), **{k: ("step", v) for k, v in levels.items()}})
    assert np.flatnonzero(steps_of({"start": start, "stop": stop, "unit": unit}, run)).tolist() == steps


def test_pairs_hold_prompt_and_seed_together():
    run, *_, _rows = hand_run({"a": off(0.5), "b": off(0.2)}, missing={("a", 1), ("baseline", 2)})
    pairs = pair_up(run, "baseline", ["a", "b"])
    assert pairs.conditions == ["baseline", "a", "b"]
    assert pairs.positions.tolist() == [[0, 1], [3, -1], [6, 7]]
    assert np.isnan(pairs.of(np.arange(9))[1, 1]) and pairs.of(np.arange(9))[2].tolist() == [6, 7]


def test_seeds_of_one_prompt_are_pairs_of_their_own():
    table = {
        "condition": ["baseline", "baseline", "a", "a", "a"],
        "prompt": ["cat", "cat", "cat", "dog", "cat"],
        "prompt_id": [0, 0, 0, 0, 0],
        "seed": [1, 2, 2, 1, 1],
    }
    run = make_run({"scores": scores(clip__prompt=np.arange(5))}, **table)
    assert pair_up(run, "baseline", ["a"]).positions.tolist() == [[0, 1], [4, 2]]


def test_comparison_equals_plain_loops():
    run, final, images, score, rows = hand_run({"a": off(0.5), "b": off(0.2)}, missing={("a", 1)})
    ds = compare(run, "baseline", ["a", "b"])
    assert ds.condition.values.tolist() == ["baseline", "a", "b"]
    for c, name in enumerate(ds.condition.values):
        for p in range(3):
            i, one = rows.index((name, p)), ds.isel(condition=c, pair=p)
            if (name, p) == ("a", 1):
                assert one["sample"] == -1 and all(np.isnan(one[v]).all() for v in ("image_distance", "score"))
                continue
            assert float(one.image_distance) == pytest.approx(l1(images[i], images[p]))
            assert float(one.latent_distance) == pytest.approx(l2(final[i], final[p]))
            assert float(one.score.sel(metric="clip:prompt")) == pytest.approx(score["clip:prompt"][i])
    xr.testing.assert_allclose(ds.image_distance_mean, ds.image_distance.mean("pair"))
    low, high = ds.latent_distance_interval.sel(condition="b")
    assert low < ds.latent_distance_mean.sel(condition="b") < high
    assert ds.changes.values.tolist()[0] == "unchanged"
    assert ds.identical(compare(run, "baseline", ["a", "b"]))
    few = [compare(run, "baseline", ["a", "b"], resamples=5, seed=seed) for seed in (0, 1)]
    assert not few[0].identical(few[1])


def test_comparison_of_what_the_run_holds():
    run, *_ = hand_run({"a": off(0.5)}, metrics=())
    ds = compare(run, "baseline", ["a"])
    assert "score" not in ds and "passes" not in ds and "image_distance" in ds
    bare = run.tree.copy()
    del bare["images"], bare["trajectory"]
    with pytest.raises(InterpError, match="needs images, final latents or scores, of which this run holds none"):
        compare(type(run)(bare), "baseline", ["a"])


def test_text_window_orders_by_length_and_scales_as_the_paper():
    conditions = {"forty": off(stop=0.4), "ten": off(stop=1, unit="step"), "late": off(start=0.5)}
    run, _, images, score, rows = hand_run(conditions)
    ds = text_window(run)
    assert ds.condition.values.tolist() == ["baseline", "ten", "forty"]  # a window at the end is another question
    assert ds.steps_without_text.values.tolist() == [0, 1, 4] and ds.a.values.tolist() == [10, 9, 6]
    means = [np.mean([l1(images[rows.index((c, p))], images[p]) for p in range(3)]) for c in ds.condition.values]
    assert np.allclose(ds.relative_image, 1 - np.array(means) / max(means))
    clip = [np.mean([score["clip:prompt"][rows.index((c, p))] for p in range(3)]) for c in ds.condition.values]
    expected = (np.array(clip) - min(clip)) / (max(clip) - min(clip))
    assert np.allclose(ds.relative_score.sel(metric="clip:prompt"), expected)
    assert text_window(run, conditions="ten").condition.values.tolist() == ["baseline", "ten"]


def test_acceleration_counts_what_was_run():
    late = {
        "text4": off(start=0.6),
        "guidance4": off(6, unit="step", name="remove_guidance"),
        "text2": off(start=8, unit="step"),
    }
    run = changed_run({**late, "early": off(stop=2, unit="step")}, samples=3, steps=10)
    ds = acceleration(run)
    assert ds.condition.values.tolist() == ["baseline", "text2", "text4", "guidance4"]
    assert ds.steps_removed.values.tolist() == [0, 2, 4, 4]
    assert ds.removed.values.tolist() == ["", "text", "text", "guidance"]
    assert np.allclose(ds.passes_mean, [20, 18, 16, 16])
    assert np.allclose(ds.passes_saved, [0, 0.1, 0.2, 0.2]) and np.allclose(ds.passes_saved, ds.passes_saved_expected)


def test_ablations_say_what_they_did():
    conditions = {
        "zero words": [{"name": "replace_tokens", "roles": ["word"], "value": "zero", "start": None, "pooled": "keep"}],
        "noise eos": [{"name": "replace_tokens", "roles": ["eos", "pad"], "value": "random", "scale": 0.5}],
        "other": off(0.5),
    }
    run, *_ = hand_run(conditions)
    ds = token_ablation(run)
    assert ds.condition.values.tolist() == ["baseline", "zero words", "noise eos"]
    assert ds.replaced.values.tolist() == ["", "roles=word", "roles=eos+pad"]
    assert ds.value.values.tolist() == ["", "zero", "random"]
    assert ds.changes.values[2] == "replace_tokens(roles=eos+pad, value=random, scale=0.5)"
    everything = compare(run, "baseline", ["zero words", "noise eos"])
    xr.testing.assert_equal(ds.image_distance_mean, everything.image_distance_mean.assign_coords(
        replaced=ds.replaced, value=ds.value))  # fmt: skip


def test_lens_goes_from_the_first_layer_to_the_last():
    layers = {f"l{k}": [{"name": "encoder_layer", "layer": k}] for k in (12, 2, 0)}
    run = changed_run(layers, samples=2)
    ds = diffusion_lens(run)
    assert ds.condition.values.tolist() == ["baseline", "l0", "l2", "l12"] and ds.layer.values.tolist() == [
        -1,
        0,
        2,
        12,
    ]
    thumbs = run.tree["images/thumb"].values
    for c in range(4):
        for p in range(2):
            assert np.array_equal(ds.image[c, p], thumbs[int(ds["sample"][c, p])])


def test_recovery_is_a_ratio_of_means():
    noise = {"name": "replace_tokens", "value": "random"}
    run, _final, images, score, rows = hand_run({"corrupted": [noise], "x": [noise], "y": [noise]}, prompts=4)
    ds = causal_tracing(run)
    assert ds.restored.values.tolist() == ["x", "y"]
    assert ds.measure.values.tolist() == ["image_distance", "latent_distance", "clip:prompt"]
    value = {
        c: np.array([score["clip:prompt"][rows.index((c, p))] for p in range(4)])
        for c in ("baseline", "corrupted", "x")
    }
    effect, total = value["x"] - value["corrupted"], value["baseline"] - value["corrupted"]
    one = ds.sel(measure="clip:prompt", restored="x")
    assert np.allclose(one.effect, effect) and np.allclose(one.total_effect, total)
    assert float(one.recovered) == pytest.approx(effect.mean() / total.mean(), rel=1e-5)
    gap = {c: np.mean([l1(images[rows.index((c, p))], images[p]) for p in range(4)]) for c in ("x", "corrupted")}
    got = float(ds.recovered.sel(measure="image_distance", restored="x"))
    assert got == pytest.approx(1 - gap["x"] / gap["corrupted"])


def test_recovery_is_one_for_the_clean_picture_and_nothing_for_the_corrupted():
    run, *_ = hand_run({"corrupted": [], "as clean": [], "as corrupted": []}, prompts=4)
    tree = run.tree.copy(deep=True)
    for node, name in (("images", "image"), ("trajectory", "final_latents"), ("scores", "score")):
        values = tree[node][name].values
        values[8:12], values[12:16] = values[0:4], values[4:8]
    ds = causal_tracing(type(run)(tree))
    assert np.allclose(ds.recovered.sel(restored="as clean"), 1) and np.allclose(ds.recovered_interval[0], 1)
    assert np.allclose(ds.recovered.sel(restored="as corrupted"), 0) and np.allclose(ds.recovered_interval[1], 0)


def test_descriptions_are_short():
    assert describe([]) == "unchanged"
    two = [{"name": "a", "x": None, "y": ["p", "q"], "start": 0.25, "stop": 900.0, "unit": "timestep"}, {"name": "b"}]
    assert describe(two) == "a(y=p+q, start=0.25, stop=900, unit=timestep) + b()"


def test_relative_scores_of_what_does_not_vary_are_nan():
    assert np.isnan(relative(np.array([1.0, 1.0]), best="high")).all()
    assert relative(np.array([1.0, np.nan, 3.0]), best="high")[[0, 2]].tolist() == [0, 1]


@pytest.mark.parametrize("ask", [text_window, acceleration, token_ablation, diffusion_lens])
def test_runs_without_such_conditions_are_told_what_to_trace(ask):
    with pytest.raises(
        InterpError, match=r'needs conditions with .*where this run has baseline: .*conditions=\{"baseline": \[\]'
    ):
        ask(synthetic_run())


def test_mistakes_are_sentences():
    run, *_ = hand_run({"a": off(stop=0.5), "middle": off(0.3, 0.5), "b": []})
    for ask, kwargs, text in (
        (text_window, {"reference": "base"}, "no condition 'base'; it has baseline, a, middle, b"),
        (text_window, {"conditions": "c"}, "no condition 'c'"),
        (text_window, {"conditions": ["b"]}, "condition 'b' has no remove_text; those that have: a, middle"),
        (text_window, {"conditions": ["middle"]}, "window of condition 'middle' is not one that starts with the first"),
        (acceleration, {}, "found no window of the kind it needs"),
        (text_window, {"metrics": "clip:promt"}, "needs the scores 'clip:promt'.*did you mean 'clip:prompt'"),
        (causal_tracing, {}, "no condition 'corrupted'"),
    ):
        with pytest.raises(InterpError, match=text):
            ask(run, **kwargs)
    unfinished, *_ = hand_run({"a": off(stop=0.5)}, status=[1, 1, 1, 0, 0, 2])
    with pytest.raises(InterpError, match="no sample of condition 'a' is finished"):
        text_window(unfinished)
