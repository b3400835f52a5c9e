"""Metrics as plugins: what they are given, what is written, and what is kept."""

import sys
import tracemalloc

import numpy as np
import pytest

import interp
from interp.scoring import find_metric, list_metrics, mean_scores, score
from interp.scoring.means import table
from interp.stores import InterpError, open_run, synthetic_run
from tests.probes.conftest import write_dist_info

CONDITIONS = ("baseline", "late")

FILE = '''
import numpy as np

def brightness(images, *, scale=1.0):
    """Mean pixel."""
    return images.mean((1, 2, 3)) * scale

def length(images, texts):
    return np.array([len(t) for t in texts])

def same(images, references):
    return (images == references).all((1, 2, 3))

def _hidden(images):
    return images
'''


@pytest.fixture
def stored(tmp_path):
    return synthetic_run(samples=6, conditions=CONDITIONS, scores=False, path=tmp_path / "r.zarr")


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def pixels(run):
    return run.images.values.astype(float)


def test_a_file_has_metrics_of_each_kind(stored, mine):
    run = score(stored.path, [f"{mine}:brightness", f"{mine}:length:prompt", f"{mine}:same:late"])
    assert list(run.scores.metric.values) == ["brightness", "length:prompt", "same:late"]
    np.testing.assert_allclose(run.scores.sel(metric="brightness"), pixels(run).mean((1, 2, 3)), rtol=1e-6)
    assert run.scores.sel(metric="length:prompt").values.tolist() == [len(p) for p in run.samples["prompt"]]
    late = (run.samples["condition"] == "late").to_numpy()
    assert (run.scores.sel(metric="same:late").values[late] == 1).all()
    assert run.tree["scores"].attrs["made_by"]["brightness"]["options"] == {"scale": 1.0}


def test_references_are_of_the_same_prompt_and_seed(stored):
    shuffled = stored.isel(np.random.default_rng(0).permutation(len(stored)))

    def distance(images, references):
        return np.abs(images.astype(float) - references).mean((1, 2, 3))

    score(shuffled, [distance], batch_size=4)
    run = open_run(stored.path)
    found, table_, images = run.scores.sel(metric="distance:baseline").values, run.samples, pixels(run)
    for i, row in table_.iterrows():
        same = (
            (table_["prompt_id"] == row.prompt_id) & (table_["seed"] == row.seed) & (table_["condition"] == "baseline")
        )
        (j,) = np.flatnonzero(same)
        assert found[i] == pytest.approx(np.abs(images[i] - images[j]).mean(), rel=1e-6)


def test_what_is_there_is_kept_until_the_metric_changes(stored, mine, monkeypatch):
    calls = []
    stored.write_scores({"other": np.arange(len(stored))})

    def ask(**options):
        metric = find_metric(f"{mine}:brightness", options)
        monkeypatch.setattr(
            "interp.scoring.metric._Bound.__call__",
            lambda self, *pictures: calls.append(len(pictures[0])) or self.fn(*pictures, **self.options),
        )
        assert metric.wants == ""
        return score(stored.path, [f"{mine}:brightness"], batch_size=5, **options)

    def values(run):
        return run.scores.sel(metric="brightness").values

    n = len(stored)
    first = values(ask())
    assert sum(calls) == n and max(calls) <= 5
    assert np.array_equal(values(ask()), first) and sum(calls) == n
    open_run(stored.path).isel([1]).write_scores({"brightness": [np.nan]})
    assert np.array_equal(values(ask()), first) and sum(calls) == n + 1  # that one alone
    np.testing.assert_allclose(values(ask(scale=2.0)), 2 * first)
    mine.write_text(FILE.replace("* scale", "* scale + 7"))
    np.testing.assert_allclose(values(ask()), first + 7, rtol=1e-6)
    assert sum(calls) == 3 * n + 1
    with pytest.raises(InterpError, match="score the whole run"):
        score(open_run(stored.path).condition("late"), [f"{mine}:brightness"], scale=3.0)
    score(stored.path, [f"{mine}:brightness"], again=True)
    assert sum(calls) == 4 * n + 1
    np.testing.assert_array_equal(open_run(stored.path).scores.sel(metric="other"), np.arange(n))


def test_metrics_finished_before_one_that_fails_are_kept(stored, mine):
    def broken(images):
        raise RuntimeError("no such device\nsecond line")

    with pytest.raises(InterpError, match=r"metric 'broken' failed: RuntimeError: no such device$"):
        score(stored.path, [f"{mine}:brightness", broken])
    assert list(open_run(stored.path).scores.metric.values) == ["brightness"]


def test_pictures_are_read_batch_by_batch(tmp_path):
    """Peak memory of numpy's arrays is that of a few batches, not of all pictures."""
    run = synthetic_run(
        samples=48, steps=2, scores=False, omit=("attention", "noise_pred", "text", "latents"), path=tmp_path / "r.zarr"
    )
    size = run.images.nbytes
    ours = open_run(tmp_path / "r.zarr")
    score(ours, [lambda images: images[:, 0, 0, 0]], batch_size=2)  # imports and caches
    tracemalloc.start()
    score(ours, [lambda images, references: images[:, 0, 0, 0] + references[:, 0, 0, 0]], batch_size=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < max(size / 4, 600_000), (peak, size)


def test_a_metric_of_whole_conditions(stored):
    class Spread:
        """Largest difference of mean pixels."""

        def __init__(self, *, factor=1.0):
            self.factor, self.seen = factor, []

        def update(self, images, references):
            self.seen += list(images.mean((1, 2, 3)) - references.mean((1, 2, 3)))

        def compute(self):
            return self.factor * np.ptp(self.seen)

    run = score(stored, [Spread], factor=2.0, batch_size=2)
    images, late = pixels(run).mean((1, 2, 3)), (run.samples["condition"] == "late").to_numpy()
    found = run.tree["scores"].attrs["by_condition"]["Spread:baseline"]
    assert found == {"late": {"value": pytest.approx(2 * np.ptp(images[late] - images[~late])), "samples": late.sum()}}
    run.write_scores({"a": np.zeros(len(run))})
    again = open_run(stored.path)
    assert again.tree["scores"].attrs["by_condition"]["Spread:baseline"] == found  # kept when others are written
    assert "Spread:baseline" in table(mean_scores(again), again.tree["scores"].attrs["by_condition"])
    from interp.stores.integrity import check

    assert check(again) == []


def test_unfinished_samples_stay_without_a_score(tmp_path):
    run = synthetic_run(samples=4, scores=False)
    run.tree["status"][:] = [1, 0, 1, 2]
    scored = score(run, [lambda images: np.ones(len(images))])
    assert scored.scores.values[:, 0].tolist() == pytest.approx([1, np.nan, 1, np.nan], nan_ok=True)


def test_plugins_are_found_and_broken_ones_named(stored, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_metrics.py").write_text(FILE + "\nnumber = 3\n")
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('no such device')\n")
    entries = {"brightness": "their_metrics:brightness", "broken": "their_broken:x", "number": "their_metrics:number"}
    write_dist_info(tmp_path, "their-metrics", "interp.metrics", entries)
    try:
        assert {"broken", "brightness", "clip"} <= {
            m.name for m in list_metrics()
        } and "their_broken" not in sys.modules
        run = score(stored, "brightness")
        assert (
            run.tree["scores"].attrs["made_by"]["brightness"]["origin"]
            == "their_metrics:brightness of their-metrics 1.0"
        )
        with pytest.raises(
            InterpError, match=r"'broken'.*their-metrics cannot be loaded: RuntimeError: no such device"
        ):
            score(stored, "broken")
        with pytest.raises(InterpError, match="metric 'number' is int: it must be a function of"):
            score(stored, "number")
    finally:
        sys.modules.pop("their_metrics", None)


@pytest.mark.parametrize(
    ("metrics", "options", "says"),
    [
        ("clp", {}, "no metric named 'clp'.*did you mean 'clip'"),
        ("clip:promt", {}, "scores against the column 'promt'.*did you mean 'prompt'"),
        ("l1:lte", {}, "condition 'lte', where this run has 'baseline', 'late'.*did you mean 'late'"),
        ("l1", {"netwrk": 1}, "no metric asked for has an option 'netwrk'"),
        ("lpips", {"netwrk": 1}, "options of 'lpips' are network; did you mean 'network'"),
        ("lpips", {"network": "resnet"}, "network='resnet' is not possible; it is one of alex, vgg, squeeze"),
        ("judge", {}, "knows the pictures of 'scenes' only"),
        ("mine.py", {}, "no such file"),
        (lambda images: np.zeros(2), {}, "must return one number for each"),
        (lambda images: ["a"] * len(images), {}, "must return one number for each"),
        (lambda pictures: pictures, {}, "must be a function of"),
        ([], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_mistakes_are_one_sentence(metrics, options, says):
    run = synthetic_run(samples=3, conditions=CONDITIONS, scores=False)
    with pytest.raises(InterpError, match=says) as found:
        score(run, metrics, **options)
    assert "\n" not in str(found.value)


def test_files_say_what_they_have(mine, stored):
    for name, says in (
        (f"{mine}:brightnes", "did you mean 'brightness'"),
        (str(mine), "several metrics: ask for one of"),
    ):
        with pytest.raises(InterpError, match=says):
            score(stored, name)
    mine.write_text("x = 1\n")
    with pytest.raises(InterpError, match="a function whose first parameter is 'images'"):
        score(stored, str(mine))


def test_pictures_are_needed():
    with pytest.raises(InterpError, match=r"Capture\(image=True\)"):
        score(synthetic_run(omit=("images",)), "clip")


def test_means_have_intervals_by_condition():
    run = synthetic_run(samples=5, conditions=CONDITIONS, scores=False)
    values = np.random.default_rng(0).normal(size=len(run))
    values[0] = np.nan
    run.write_scores({"a": values})
    ds = mean_scores(run)
    late = (run.samples["condition"] == "late").to_numpy()
    assert ds["mean"].sel(condition="late", metric="a") == pytest.approx(values[late].mean(), abs=1e-6)
    assert ds["mean"].sel(condition="baseline", metric="a") == pytest.approx(np.nanmean(values[~late]), abs=1e-6)
    assert ds["count"].values.ravel().tolist() == [4, 5]
    # an independent bootstrap of the mean agrees to its Monte Carlo error
    draws = np.random.default_rng(1).choice(values[late], (20_000, 5)).mean(1)
    assert ds["interval"].sel(condition="late", metric="a").values == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.08
    )
    assert interp.scoring.mean_scores(run, seed=0).identical(ds)
