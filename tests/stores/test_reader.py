"""Runs are lazy, selections are runs, shortcuts say what they lack, damage is found."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from interp.stores import StoreError, open_run, synthetic_run, validate, verify

COND = ("baseline", "eos", "late")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    return synthetic_run(samples=3, steps=12, conditions=COND, grids=("8x8", "4x4"), path=path).path


@pytest.fixture(params=["disk", "memory"])
def run(request, stored):
    options = {"samples": 3, "steps": 12, "conditions": COND, "grids": ("8x8", "4x4")}
    return open_run(stored) if request.param == "disk" else synthetic_run(**options)


def test_a_run_is_the_same_each_time():
    a, b, other = synthetic_run(), synthetic_run(), synthetic_run(seed=1)
    np.testing.assert_array_equal(a.latents, b.latents)
    assert not np.array_equal(a.latents, other.latents)
    assert len(synthetic_run(samples=0, scores=False)) == 0


def test_synthetic_attention_and_latents_are_what_they_claim(run):
    p = run.attention("8x8").astype("float32")
    assert abs(p.sum("token") - 1).max() < 4e-3
    assert (p.isnull().any(["step", "query_y", "query_x", "layer", "head", "branch"]) == (p.token_role == "")).all()
    assert (p.token_role == "").any()
    t = run.trajectory
    noise = (t.latents - t.data_scale * t.final_latents) / t.noise_scale
    assert abs(noise - noise.isel(step=0)).max() < 1e-3
    assert validate(run.tree) == []
    assert verify(run) == []


def test_nothing_is_loaded_at_opening(stored):
    run = open_run(stored)
    for name in ("latents", "noise_pred", "images"):
        assert not getattr(run, name).variable._in_memory
    assert run.done.latents.variable._in_memory is False
    assert "Run" in repr(run)
    assert not run.latents.variable._in_memory


def test_the_tree_is_that_of_plain_xarray(stored):
    tree, plain = open_run(stored).tree, xr.open_datatree(stored, engine="zarr", chunks=None)
    assert tree.identical(plain)
    for node in plain.subtree:
        ours, theirs = tree[node.path].to_dataset(inherit=False), node.to_dataset(inherit=False)
        assert [(n, v.dtype) for n, v in ours.variables.items()] == [(n, v.dtype) for n, v in theirs.variables.items()]
        assert [*ours.indexes] == [*theirs.indexes]


def pick(draw, size):
    """Draw something to select along a dim of `size`: a number, a slice either way, or numbers in any order."""
    number = st.integers(-size, size - 1)
    forth = st.builds(slice, number, number, st.integers(1, 3))
    back = st.builds(slice, st.just(None), st.just(None), st.integers(-3, -1))  # xarray fails at empty ones
    return draw(number | forth | back | st.lists(number, max_size=4))


@pytest.fixture(scope="module")
def both(stored):
    """The same run by our reader and, in memory, by xarray's own."""
    return open_run(stored).tree, xr.open_datatree(stored, engine="zarr", chunks=None).load()


@settings(max_examples=150, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_selection_reads_what_zarr_reads(both, data):
    """Numbers, slices, lists, also repeated and backwards, of arrays in shards, whole files, shared chunks and tables."""
    names = ["attention/8x8/probs", "trajectory/latents", "images/thumb", "attention/4x4/token_text", "scores/score"]
    name = data.draw(st.sampled_from(names))
    ours, theirs = (tree[name] for tree in both)
    key = {d: pick(data.draw, n) for d, n in ours.sizes.items() if data.draw(st.booleans())}
    found = ours.copy(deep=False).isel(key).values  # the tree itself would keep what was read
    np.testing.assert_array_equal(found, theirs.isel(key).values, err_msg=str(key))


def test_an_opened_run_travels_and_tells_of_damage(tmp_path):
    run = synthetic_run(path=tmp_path / "r.zarr", samples=2)
    file = next(p for p in (tmp_path / "r.zarr/trajectory/latents/c").rglob("*") if p.is_file())
    travelled, whole = pickle.dumps(open_run(run.path).tree), file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(StoreError, match=r"latents/c/\d/.* cannot be read: .*checksum.* interp verify"):
        run.latents.load()
    file.write_bytes(whole)
    there = pickle.loads(travelled)["trajectory/latents"]  # noqa: S301  our own
    np.testing.assert_array_equal(there, run.latents)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_arrays_in_another_encoding_are_read_by_xarray(tmp_path):
    run = synthetic_run(path=tmp_path / "r.zarr", samples=2)
    xr.Dataset({"theirs": ("x", [1.0])}).to_zarr(run.path, group="extra", mode="w", consolidated=False)
    zarr.consolidate_metadata(run.path)
    assert open_run(run.path).tree["extra/theirs"].item() == 1
    np.testing.assert_array_equal(open_run(run.path).latents, run.latents)


def test_selections_are_runs(run):
    eos = run.condition("eos")
    assert len(eos) == 3
    assert eos.conditions == ["eos"]
    assert list(eos.latents.sample.values) == [3, 4, 5]
    np.testing.assert_array_equal(eos.sel(prompt_id=[2, 0]).latents, run.latents.isel(sample=[3, 5]))
    assert len(run.sel(condition=["baseline", "late"], seed=0)) == 6
    np.testing.assert_array_equal(run.isel([5, 0]).latents.sample, [5, 0])
    np.testing.assert_array_equal(run.isel(-1).images.sample, [8])
    np.testing.assert_array_equal(run.isel([True] + [False] * 8).attention("4x4"), run.attention("4x4")[:1])
    assert set(run.latents.coords) >= {"condition", "prompt_id", "seed"}


def test_unstack_puts_every_sample_in_its_place(run):
    tree = run.unstack()
    latents = tree["trajectory/latents"]
    assert latents.chunks is not None
    assert dict(latents.sizes) == {
        "condition": 3,
        "prompt_id": 3,
        "seed": 1,
        "step": 12,
        "channel": 4,
        "y": 16,
        "x": 16,
    }
    shuffled = run.isel([4, 8, 0, 1, 2, 3, 5, 6, 7]).unstack()["trajectory/latents"]
    for i in range(len(run)):
        row = run.samples.iloc[i]
        where = {"condition": row["condition"], "prompt_id": row["prompt_id"], "seed": row["seed"]}
        np.testing.assert_array_equal(latents.sel(where), run.latents[i])
        np.testing.assert_array_equal(shuffled.sel(where), run.latents[i])
    assert tree["prompt"].sel(condition="eos", prompt_id=1, seed=0) == run.samples["prompt"][4]
    assert "timestep" in latents.coords


def test_unstack_of_an_incomplete_grid_is_nan_where_nothing_is(run):
    tree = run.isel([0, 1, 2, 3]).unstack()
    latents = tree["trajectory/latents"]
    assert np.isnan(latents.sel(condition="eos", prompt_id=[1, 2])).all()
    np.testing.assert_array_equal(latents.sel(condition="eos", prompt_id=0, seed=0), run.latents[3])
    assert tree["attention/8x8"]["token_role"].sel(condition="eos", prompt_id=1).values.ravel()[0] == ""


def test_unstack_of_twins_is_refused(run):
    with pytest.raises(StoreError, match="two have condition 'baseline', prompt_id 0 and seed 0"):
        run.isel([0, 0]).unstack()


@pytest.mark.parametrize(
    ("omit", "ask", "says"),
    [
        (
            "latents",
            lambda r: r.latents,
            r"latents was asked.*noise_pred.*Capture\(latents=True\)",
        ),
        ("noise_pred", lambda r: r.noise_pred, r"Capture\(noise_pred=True\)"),
        ("attention", lambda r: r.attention(), r'Capture\(attention="cross"\)'),
        ("attention", lambda r: r.tokens(), r'Capture\(attention="cross"\)'),
        ("images", lambda r: r.images, r"Capture\(image=True\)"),
    ],
)
def test_what_was_not_captured_is_named_with_the_field_to_set(omit, ask, says):
    with pytest.raises(StoreError, match=says):
        ask(synthetic_run(omit=(omit,), scores=False))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda r: r.attention(), "name one of: 8x8, 4x4"),
        (lambda r: r.attention("16x16"), "it has: 8x8, 4x4"),
        (lambda r: r.condition("eoss"), "did you mean 'eos'"),
        (lambda r: r.sel(prompt_ids=3), "did you mean 'prompt_id'"),
        (lambda r: r.isel(9), "sample 9 was asked for, but there are 9"),
        (lambda r: r.isel([True]), "mask of 1"),
        (lambda r: r.write_scores({"a": [1.0]}), "shape"),
    ],
)
def test_mistakes_in_asking(run, ask, says):
    with pytest.raises(StoreError, match=says):
        ask(run)


def test_no_scores_yet():
    with pytest.raises(StoreError, match="interp score"):
        _ = synthetic_run(scores=False).scores


def test_scores_are_added_and_replaced(tmp_path):
    run = synthetic_run(samples=4, scores=False, path=tmp_path / "r.zarr")
    run.write_scores({"clip:prompt": np.arange(4)})
    run.isel([1, 3]).write_scores({"clip:prompt": [10, 30], "judge:prompt": [1, 2]})
    for read in (open_run(run.path),):
        np.testing.assert_array_equal(read.scores.sel(metric="clip:prompt"), [0, 10, 2, 30])
        np.testing.assert_array_equal(read.scores.sel(metric="judge:prompt"), [np.nan, 1, np.nan, 2])
        assert validate(read.tree) == []
        assert verify(read) == []
    np.testing.assert_array_equal(zarr.open_group(run.path)["scores/score"][:, 0], [0, 10, 2, 30])


def test_the_overview_tells_what_is_inside(run):
    text = run.summary()
    for part in (
        "9 samples (9 done)",
        "baseline, eos, late",
        "attention/8x8",
        "probs (sample 9, step 12",
        "KiB",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["attention/8x8/probs", "trajectory/latents", "images/image", "images/thumb"])
def test_a_flipped_bit_is_found_by_zarr_and_by_verify(tmp_path, name):
    run = synthetic_run(path=tmp_path / "r.zarr", samples=2)
    file = next(p for p in sorted((run.path / name / "c").rglob("*")) if p.is_file())
    clean = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(clean), 4):
        broken = bytearray(clean)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        with pytest.raises(Exception, match=r"(?i)checksum"):
            _ = zarr.open_group(run.path, mode="r")[name][0]
        problems = verify(open_run(run.path))
        assert any("sample 0" in p and name in p for p in problems)
    file.write_bytes(clean)
    assert verify(open_run(run.path)) == []
    file.unlink()
    assert any("sample 0" in p and name in p and "missing" in p for p in verify(open_run(run.path)))


def test_verify_finds_what_is_not_finite():
    run = synthetic_run()
    run.tree["trajectory/latents"].values[1, 2] = np.nan
    run.tree["attention/8x8/probs"].values[0, 0] = np.inf
    found = "\n".join(verify(run))
    assert "sample 1: trajectory/latents" in found
    assert "sample 0: attention/8x8/probs" in found


def test_validate_names_what_departs_from_the_table():
    run = synthetic_run()
    tree = run.tree.copy()
    tree["trajectory"] = tree["trajectory"].to_dataset(inherit=False).rename(y="height").drop_vars("timestep")
    tree["attention/8x8/probs"] = tree["attention/8x8/probs"].astype("float64")
    tree.attrs["format"] = "interp.run/0"
    found = "\n".join(validate(tree))
    for part in ("interp.run/0", "trajectory/latents has dims", "lacks timestep", "probs is float64"):
        assert part in found


RECIPES = """
import sys
sys.modules["interp"] = None        # not to be had
import numpy as np, xarray as xr
tree = xr.open_datatree(sys.argv[1], engine="zarr")
p = tree["attention/8x8/probs"]
red = p.where(p.token_text == "red", drop=True)
assert red.sizes["token"] == 1 and bool(red.notnull().any())
assert red.sizes["sample"] == 3
base = p.isel(sample=(tree["condition"] == "baseline").values)
assert list(base.sample.values) == [0, 1, 2]
done = tree.isel(sample=np.flatnonzero(tree["status"].values == 1))
assert done["trajectory/latents"].load().notnull().all()
layer = p.sel(layer="unet.blocks.0.attn2", head="mean", branch="cond")
assert layer.mean("sample").load().sizes["step"] == 12
assert tree["trajectory"]["timestep"].values[0] > tree["trajectory"]["timestep"].values[-1]
assert xr.open_zarr(sys.argv[1], group="trajectory").nfe.values.sum() > 0
print(tree["scores/score"].sel(metric="clip:prompt").mean().item())
"""


def test_the_recipes_work_in_plain_xarray_without_a_warning(stored):
    command = [sys.executable, "-I", "-W", "error", "-c", RECIPES, str(stored)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_reading_needs_no_model_library(stored):
    code = (
        "import sys; from interp.stores import open_run; open_run(sys.argv[1]).latents.load();"
        "print([m for m in ('torch','diffusers','transformers','matplotlib') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(stored)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


def test_opening_reads_the_root_alone(stored, monkeypatch):
    read = []
    real = zarr.storage.LocalStore.get

    async def get(self, key, *args, **kwargs):
        read.append(key)
        return await real(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    xr.open_datatree(stored, engine="zarr")
    assert sum(key.endswith("zarr.json") for key in read) <= 1
    assert not any("probs/c" in key or "latents/c" in key or "status/c" in key for key in read)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stored", [False, True])
def test_half_precision_is_shown_in_single(stored, tmp_path):
    """A mean over more pixels than half precision can count is right; what is read is what was asked for."""
    run = synthetic_run(samples=2, steps=20, heads=8, grids=("32x32",), path=tmp_path / "r.zarr" if stored else None)
    probs, kept = run.attention(), run.tree["attention/32x32/probs"]
    assert (kept.dtype, probs.dtype) == (np.float16, np.float32)
    dims = ["step", "layer", "head", "query_y", "query_x"]
    assert np.isinf(kept.mean(dims)).any()  # as xarray's means of half precision are
    exact = np.nanmean(kept.values.astype("float64"), (1, 3, 4, 6, 7))
    assert np.allclose(probs.mean(dims), exact, rtol=1e-4, equal_nan=True)
    assert np.array_equal(probs.isel(step=3, token=[2, 0]), kept.isel(step=3, token=[2, 0]), equal_nan=True)
    assert np.array_equal(probs[:, 3:5, ..., 1], kept[:, 3:5, ..., 1], equal_nan=True)
    assert np.allclose(probs.chunk(sample=1).mean(dims), exact, rtol=1e-4, equal_nan=True)
