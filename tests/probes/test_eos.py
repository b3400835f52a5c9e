import numpy as np
import pytest
import xarray as xr

from interp.probes.bootstrap import mean_interval
from interp.probes.eos import eos_replacement
from interp.probes.testing import swap_run
from interp.stores import InterpError, Run, synthetic_run
from tests.probes.handmade import make_run, scores, trajectory

# baseline cat and dog (seeds 0, 1), then swaps: words of cat, EOS of dog (seeds 0, 1), and one unfinished
TABLE = {
    "prompt": ["cat", "dog", "cat", "dog", "cat", "cat", "dog"],
    "target": ["dog", "cat", "dog", "cat", "dog", "dog", "cat"],
    "condition": ["baseline"] * 4 + ["eos"] * 3,
    "prompt_id": [0, 1, 0, 1, 0, 0, 1],
    "seed": [0, 0, 1, 1, 0, 1, 1],
    "status": [1, 1, 1, 1, 1, 1, 2],
}
PROMPT = [0.9, 0.8, 0.7, 0.6, 0.2, 0.5, 0.0]  # alignment with the own prompt
TARGET = [0.1, 0.15, 0.25, 0.3, 0.4, 0.5, 0.0]  # alignment with the target


def hand_run(**changes):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((7, 3, 2, 4, 4))
    images = rng.integers(0, 256, (7, 6, 6, 3)).astype("uint8")
    table = {**TABLE, **changes}
    steps = np.array([0.1, 0.5, 0.9])
    nodes = {
        "trajectory": trajectory(latents, latents[:, -1], steps, 1 - steps),
        "scores": scores(clip__prompt=PROMPT, clip__target=TARGET, judge__prompt=PROMPT),
        "images": _images(images),
    }
    return make_run(nodes, **table), latents.astype("float32").astype(float), images.astype(float)


def _images(images):
    return xr.Dataset({"image": (("sample", "height", "width", "rgb"), images)})


def test_pairs_and_numbers_are_those_done_by_hand():
    run, latents, images = hand_run()
    ds = eos_replacement(run)
    assert ds.metric.values.tolist() == ["clip"]
    assert ds.sample_swap.values.tolist() == [4, 5]
    assert ds.sample_source.values.tolist() == [0, 2]
    assert ds.sample_target.values.tolist() == [1, 3]
    clip = ds.alignment.sel(metric="clip")
    assert np.allclose(clip.sel(image="swap"), [[0.2, 0.4], [0.5, 0.5]])
    assert np.allclose(clip.sel(image="source"), [[0.9, 0.1], [0.7, 0.25]])
    assert np.allclose(clip.sel(image="target"), [[0.15, 0.8], [0.3, 0.6]])  # its own prompt is the target
    assert np.allclose(ds.advantage.sel(metric="clip"), [0.2, 0.0])
    assert float(ds.target_wins[0]) == 0.75  # one win and one tie
    for p, (i, *others) in enumerate([(4, 0, 1), (5, 2, 3)]):
        for r, j in enumerate(others):
            for step in range(3):
                gap = np.linalg.norm(latents[i, step] - latents[j, step]) / np.linalg.norm(latents[j, step])
                assert float(ds.latent_distance[p, step, r]) == pytest.approx(gap)
            assert float(ds.image_distance[p, r]) == pytest.approx(np.abs(images[i] - images[j]).mean() / 255)
    assert np.allclose(ds.alignment_mean, ds.alignment.mean("pair"))
    assert ds.attrs["pairs"] == 2


def test_intervals_hold_the_mean_and_need_two_prompts():
    run, *_ = hand_run()
    by_prompt = eos_replacement(run)  # both pairs are one prompt with two seeds: nothing to draw anew
    assert np.isnan(by_prompt.alignment_interval).all()
    ds = eos_replacement(run, unit="pair")
    low, high = (ds.latent_distance_interval.sel(bound=b) for b in ("low", "high"))
    assert ((low <= ds.latent_distance_mean) & (ds.latent_distance_mean <= high)).all() and (low < high).any()
    assert ds.identical(eos_replacement(run, unit="pair"))


def test_target_condition_is_paired_by_prompt_and_seed():
    table = {
        "prompt": ["cat"] * 6,
        "target": ["dog"] * 6,
        "condition": ["baseline", "baseline", "eos", "eos", "other", "other"],
        "prompt_id": [0] * 6,
        "seed": [0, 1, 1, 0, 0, 1],
        "status": [1] * 6,
    }
    latents = np.random.default_rng(0).standard_normal((6, 2, 1, 2, 2))
    nodes = {
        "trajectory": trajectory(latents, latents[:, -1], [0.1, 0.9], [0.9, 0.1]),
        "scores": scores(clip__prompt=np.arange(6) / 10, clip__target=np.arange(6) / 10 + 0.5),
    }
    ds = eos_replacement(make_run(nodes, **table), target_condition="other")
    assert ds.sample_swap.values.tolist() == [2, 3]
    assert ds.sample_source.values.tolist() == [1, 0]
    assert ds.sample_target.values.tolist() == [5, 4]
    assert np.allclose(ds.alignment.sel(image="target", text="target")[:, 0], [1.0, 0.9])
    assert np.allclose(ds.alignment.sel(image="target", text="source")[:, 0], [0.5, 0.4])
    assert "image_distance" not in ds


def test_without_baseline_b_there_is_nan_not_zero():
    ds = eos_replacement(synthetic_run(samples=3, conditions=("baseline", "eos")))
    assert ds.sample_target.values.tolist() == [-1] * 3
    assert np.isnan(ds.latent_distance.sel(reference="target")).all()
    assert np.isfinite(ds.latent_distance.sel(reference="source")).all()
    assert np.isnan(ds.alignment.sel(image="target")).all() and np.isfinite(ds.alignment.sel(image="swap")).all()


def test_the_same_prompt_with_two_targets_keeps_its_own_scores():
    run, *_ = hand_run(target=["dog", "cat", "dog", "cat", "bird", "dog", "cat"], prompt_id=[0, 1, 0, 1, 7, 0, 1])
    ds = eos_replacement(run)
    assert ds.sample_source.values.tolist() == [0, 2]  # found by the prompt: no baseline has id 7
    assert np.isnan(ds.alignment.sel(image="source", text="target")[0, 0])  # it was scored against dog, not bird
    assert ds.sample_target.values.tolist() == [-1, 3]


def test_several_swaps_stand_side_by_side():
    """The run by hand, with the swaps of seed 0 and of seed 1 as conditions of their own."""
    run, *_ = hand_run(condition=["baseline"] * 4 + ["first", "half", "half"])
    run.tree.attrs["conditions"] = {
        "baseline": [],
        "first": [
            {"name": "replace_eos", "stop": 1, "unit": "step"},
            {"value": "repeat", "name": "replace_tokens", "count": 5},
        ],
        "half": [{"name": "replace_eos", "start": 0.5}],
    }
    ds = eos_replacement(run, swap=["half", "first"], unit="pair")
    assert ds.swap.values.tolist() == ["half", "first"] and ds.pairs.values.tolist() == [1, 1]
    assert ds.first_step.values.tolist() == [2, 0] and ds.steps_exchanged.values.tolist() == [1, 1]
    assert ds.tokens_repeated.values.tolist() == [-1, 5]
    swapped = ds.alignment_mean.sel(metric="clip", image="swap")
    assert np.allclose(swapped.sel(text="source"), [0.5, 0.2]) and np.allclose(swapped.sel(text="target"), [0.5, 0.4])
    assert np.allclose(ds.alignment_relative.sel(metric="clip"), [[1, 1], [0, 0]])
    for name in ("half", "first"):
        one = eos_replacement(run, swap=name, unit="pair")
        assert np.allclose(ds.latent_distance_mean.sel(swap=name), one.latent_distance_mean)
    assert len(eos_replacement.plot(ds).axes) == 1
    with pytest.raises(InterpError, match="names no condition"):
        eos_replacement(run, swap=[])


def test_selection_of_a_run_keeps_sample_labels():
    run, *_ = hand_run()
    ds = eos_replacement(run.isel(sample=[2, 3, 5]))
    assert (ds.sample_swap.item(), ds.sample_source.item(), ds.sample_target.item()) == (5, 2, 3)


def test_mistakes_are_sentences():
    run, *_ = hand_run()
    for kwargs, text in (
        ({"swap": "eso"}, "no condition 'eso'; it has baseline, eos; did you mean 'eos'"),
        ({"baseline": "base"}, "no condition 'base'"),
        ({"target_condition": "x"}, "no condition 'x'.*baseline, eos"),
        ({"target": "targt"}, "no column 'targt'; name the one .*; did you mean 'target'"),
        ({"metrics": "judge"}, "'judge:prompt' and 'judge:target'.*interp score RUN"),
        ({"unit": "seed"}, "unit='seed' is not possible"),
    ):
        with pytest.raises(InterpError, match=text):
            eos_replacement(run, **kwargs)
    with pytest.raises(InterpError, match="interp score RUN"):
        eos_replacement(swap_run(scores=False))
    unfinished, *_ = hand_run(status=[1] * 4 + [2] * 3)
    with pytest.raises(InterpError, match="no sample of condition 'eos' is finished"):
        eos_replacement(unfinished)
    strangers, *_ = hand_run(seed=[0, 0, 0, 0, 8, 8, 8])
    with pytest.raises(InterpError, match="same prompts and seeds"):
        eos_replacement(strangers)
    only_prompt = Run(run.tree.isel())
    only_prompt.tree["scores"] = scores(clip__prompt=PROMPT)
    with pytest.raises(InterpError, match="'clip:prompt' and 'clip:target'"):
        eos_replacement(only_prompt)


def test_bootstrap_equals_a_plain_one_and_keeps_units_together():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 1))
    mean, interval = mean_interval(values, np.arange(200))
    assert mean[0] == pytest.approx(values.mean())
    draws = [values[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert np.allclose(interval[0], np.quantile(draws, [0.025, 0.975]), atol=0.02)
    wide = mean_interval(np.repeat(values[:20], 10, axis=0), np.repeat(np.arange(20), 10))[1][0]
    narrow = mean_interval(np.repeat(values[:20], 10, axis=0), np.arange(200))[1][0]
    assert np.ptp(wide) > 2 * np.ptp(narrow)
    holes = values.copy()
    holes[::2] = np.nan
    assert mean_interval(holes, np.arange(200))[0][0] == pytest.approx(np.nanmean(holes))
    assert np.isnan(mean_interval(np.full((3, 1), np.nan), np.arange(3))[1]).all()
