"""Both writers keep the rules; what they write is the same tree; a stock reader agrees, for all shapes."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp.stores import Array, Group, Layout, StoreError, attention_group, create_run, open_run, synthetic_run, verify
from interp.stores.background import Background
from interp.stores.chunks import CHUNK_BYTES, batch_rows, place
from interp.stores.testing import RunStoreTests, small_layout, small_tokens, small_values, write_sample


class TestDisk(RunStoreTests):
    @pytest.fixture
    def make_writer(self, tmp_path):
        made = iter(range(9))
        return lambda layout: create_run(tmp_path / f"{next(made)}.zarr", layout)


class TestMemory(RunStoreTests):
    @pytest.fixture
    def make_writer(self):
        return lambda layout: create_run(None, layout)


def test_disk_and_memory_hold_the_same_tree(tmp_path):
    options = {"samples": 3, "conditions": ("baseline", "eos"), "heads": 2, "grids": ("8x8", "4x4")}
    options |= {"branches": ("cond", "uncond")}
    disk, memory = synthetic_run(**options, path=tmp_path / "r.zarr"), synthetic_run(**options)
    assert set(disk.tree.groups) == set(memory.tree.groups)
    for node in disk.tree.subtree:
        a, b = node.to_dataset(inherit=False), memory.tree[node.path].to_dataset(inherit=False)
        assert set(a.coords) == set(b.coords)
        assert set(a.data_vars) == set(b.data_vars)
        for name in a.variables:
            assert a[name].dtype == b[name].dtype
            assert a[name].dims == b[name].dims
            assert a[name].attrs == b[name].attrs
            np.testing.assert_array_equal(a[name].values, b[name].values)


dims = st.integers(1, 5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 3), steps=st.integers(1, 23), branch=st.integers(1, 2), token=st.integers(1, 16),
       y=dims, x=dims, how=st.sampled_from(["put", "append", "together"]), node=st.sampled_from(["attention/2x2", "sites/s"]),
       dtype=st.sampled_from(["float16", "float32"]), steady=st.booleans())  # fmt: skip
def test_every_shape_is_read_back_by_stock_zarr(
    tmp_path_factory, n, steps, branch, token, y, x, how, node, dtype, steady
):
    name = "probs" if node.startswith("attention") else "value"
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    array = Array(dims, (n, steps, branch, 2, 1, token, y, x), dtype, steady=steady)
    layout = Layout({"prompt": ["p"] * n, "seed": list(range(n))}, {node: Group({name: array})})
    values = np.random.default_rng(steps).standard_normal(array.shape).astype(dtype)
    values[:, steps // 2 :] = values[:, :1]  # steps that come back, as keys of the text do
    path = tmp_path_factory.mktemp("h") / "r.zarr"
    with create_run(path, layout) as writer:
        for i in range(n):
            writer.begin(i)
        if how == "together":
            for step in range(steps):
                writer.append_together(range(n), f"{node}/{name}", values[:, step])
        for i in range(n):
            if how == "append":
                for block in values[i]:
                    writer.append(i, f"{node}/{name}", block)
            elif how == "put":
                writer.put(i, f"{node}/{name}", values[i])
            writer.commit(i)
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")[f"{node}/{name}"][:], values)
    np.testing.assert_array_equal(zarr.open_group(path, mode="r", use_consolidated=False)[f"{node}/{name}"][:], values)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_no_chunk_of_statuses_holds_two_batches(sizes):
    batch = [b for b, size in enumerate(sizes) for _ in range(size)]
    rows = batch_rows(batch)
    for first in range(0, len(batch), rows):
        assert len(set(batch[first : first + rows])) == 1
    assert rows <= 64


@given(steps=st.integers(1, 100), layers=st.integers(1, 16), heads=st.sampled_from([1, 8, 20]),
       token=st.integers(1, 77), grid=st.sampled_from([8, 16, 64, 128]))  # fmt: skip
def test_inner_chunks_divide_shards_and_stay_small(steps, layers, heads, token, grid):
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    array = Array(dims, (4, steps, 2, layers, heads, token, grid, grid), "float16")
    found = place("attention/8x8/probs", array, 4)
    assert all(o % i == 0 for o, i in zip(found.outer, found.inner, strict=True))
    assert all(o >= s for o, s in zip(found.outer[1:], array.shape[1:], strict=True))
    assert found.inner[1] <= 10
    assert found.inner[2] == 1
    assert np.prod(found.inner) * 2 <= CHUNK_BYTES or found.inner[3:5] == (1, 1)


def test_samples_that_part_within_a_chunk_are_refused(tmp_path):
    layout = small_layout()
    with create_run(tmp_path / "r.zarr", layout) as writer:
        writer.begin(0), writer.begin(1)
        writer.append_together((0, 1), "trajectory/latents", np.zeros((2, 2, 4, 4)))
        with pytest.raises(StoreError, match=r"samples \[1\] were not appended together before step 1"):
            writer.append(1, "trajectory/latents", np.zeros((2, 4, 4)))
    assert not (writer.status == 1).any()


def test_the_queue_is_bounded_in_bytes():
    gate = threading.Event()
    background = Background(limit=100)
    background.submit(gate.wait, 60)
    background.submit(lambda: None, 40)
    sixth = threading.Thread(target=background.submit, args=(lambda: None, 1))
    sixth.start()
    sixth.join(0.1)
    assert sixth.is_alive()  # waits: 101 bytes would be queued
    gate.set()
    sixth.join(5)
    background.submit(lambda: None, 10_000)  # more than the limit, alone: enters
    background.close()
    assert background.peak == 10_000


def test_a_mark_waits_for_what_came_before_it_and_for_what_that_put_off():
    gate, done = threading.Event(), []
    background = Background(limit=100, rest=lambda: done.append("rest"))
    background.submit(gate.wait)
    background.submit(lambda: done.append("job"))
    wait = background.mark()
    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not done
    gate.set()
    waiting.join(5)
    assert not waiting.is_alive() and done[:2] == ["job", "rest"]
    background.submit(lambda: 1 / 0)
    with pytest.raises(StoreError, match="division"):
        background.mark()()
    background.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_data_are_durable_before_their_names_and_names_before_the_status(tmp_path, monkeypatch):
    path = tmp_path / "r.zarr"
    durable, named, finished = set(), set(), set()
    writer = create_run(path, small_layout(n=6))
    there = set(path.rglob("*"))
    sync, replace = os.fsync, Path.replace

    def noted_sync(handle):
        sync(handle)
        durable.add(Path(f"/proc/self/fd/{handle}").readlink())

    def noted_replace(self, target):
        assert self in durable  # the data, before they get their name
        if target.parent == path / "status/c":
            rows = np.frombuffer(self.read_bytes()[:2], "int8")
            check({2 * int(target.name) + k for k in np.flatnonzero(rows == 1)})
        named.add(target)
        durable.discard(self)
        durable.discard(target.parent)  # its new name is not
        return replace(self, target)

    def check(samples):
        finished.update(samples)
        for i in samples:
            for name in ("error", *writer.layout.arrays):
                shared = writer._is_batched(name)
                place = path / name / "c" / str(i // 2 if shared else i)
                (file,) = (p for p in (place, *place.rglob("*")) if p.is_file())
                assert file in named
                new = [p for p in file.parents if path in p.parents and p not in there]
                assert {file.parent, *new, *(p.parent for p in new)} <= durable, file

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with writer:
        for i in range(6):
            write_sample(writer, i)
    assert finished == set(range(6))


def test_append_keeps_within_the_queue(tmp_path, monkeypatch):
    monkeypatch.setattr("interp.stores.shards.encode_parts", lambda *a, **k: time.sleep(0.005) or (b"", b""))
    layout = small_layout(n=4, steps=20)
    limit = 20_000
    with create_run(tmp_path / "r.zarr", layout, queue_bytes=limit) as writer:
        for i in range(4):
            writer.begin(i)
            for block in small_values(layout, i)["attention/4x4/probs"]:
                writer.append(i, "attention/4x4/probs", block)
        assert 0 < writer._background.peak <= limit


def test_an_error_of_the_background_comes_back_naming_the_file(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    writer = create_run(tmp_path / "r.zarr", small_layout())
    write_sample(writer, 0)
    writer.drain()
    monkeypatch.setattr("interp.stores.shards.encode_parts", broken)
    with pytest.raises(StoreError, match=r"attention/4x4/probs.*No space left on device"):
        for i in (1, 2):
            write_sample(writer, i)
        writer.drain()
    with pytest.raises(StoreError, match="No space left"):
        writer.begin(2)
    with pytest.raises(StoreError, match="No space left"):
        writer.close()
    monkeypatch.undo()
    assert list(open_run(tmp_path / "r.zarr").samples["status"]) == [1, 0, 0]
    with create_run(tmp_path / "r.zarr", small_layout()) as again:
        for i in (1, 2):
            write_sample(again, i)
    assert verify(open_run(tmp_path / "r.zarr")) == []
    assert not list((tmp_path / "r.zarr").rglob("*.partial"))


def test_the_error_of_the_caller_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), create_run(tmp_path / "r.zarr", small_layout()) as writer:
        write_sample(writer, 0)
        writer.begin(1)
        writer.append(1, "trajectory/latents", np.zeros((2, 4, 4)))
        raise ZeroDivisionError
    assert list(open_run(tmp_path / "r.zarr").samples["status"]) == [1, 0, 0]


def test_an_array_may_be_optional(tmp_path):
    layout = small_layout(n=1)
    layout.groups["mine/s"] = Group({"value": Array(("sample", "step", "extra"), (1, 13, 3), "float32", {}, True)})
    with create_run(tmp_path / "r.zarr", layout) as writer:
        writer.begin(0)
        for name, value in small_values(layout, 0).items():
            if name not in ("mine/s/value", "images/thumb"):
                writer.put(0, name, value)
        writer.commit(0)
    assert verify(writer.run) == []
    assert np.isnan(writer.run.tree["mine/s/value"]).all()


def test_at_most_six_files_a_sample(tmp_path):
    layout = small_layout(n=8)
    layout.samples["batch"] = [0] * 8
    with create_run(tmp_path / "r.zarr", layout) as writer:
        before = sum(p.is_file() for p in (tmp_path / "r.zarr").rglob("*"))
        for i in range(8):
            write_sample(writer, i)
    after = sum(p.is_file() for p in (tmp_path / "r.zarr").rglob("*"))
    assert (after - before) / 8 <= 6


def test_a_plain_reader_sees_coordinates_where_they_belong(tmp_path):
    synthetic_run(path=tmp_path / "r.zarr")
    tree = xr.open_datatree(tmp_path / "r.zarr", engine="zarr")
    assert {"timestep", "sigma", "token_text", "layer", "head", "branch", "step"} <= set(tree["attention/8x8"].coords)
    assert set(tree.coords) == {"sample"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_rounded_mantissa_is_the_nearest_number_of_so_many_bits(tmp_path, dtype, place):
    rng = np.random.default_rng()
    ramp = np.linspace(0.1, 0.9, 2)
    group = attention_group(
        1, kind="cross", grid=(8, 8), layers=["a"], heads=["mean"], branches=["cond"], steps=[0, 1], timestep=ramp,
        tokens=small_tokens(1), dtype=dtype, mantissa=7,
    )  # fmt: skip
    layout = Layout({"prompt": ["p"], "seed": [0]}, {"attention/8x8": group})
    values = rng.uniform(1e-3, 1, group.arrays["probs"].sample_shape).astype(dtype)
    values[0, 0, 0, 0, 0, 0, :3] = np.nan, np.inf, 0
    with create_run(tmp_path / "r.zarr" if place == "disk" else None, layout) as writer:
        writer.begin(0)
        writer.put(0, "attention/8x8/probs", values)
        writer.commit(0)
    stored = writer.run.tree["attention/8x8/probs"].values[0]  # as it is in the store; shortcuts show single precision
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored[0, 0, 0, 0, 0, 0, :3], [np.nan, np.inf, 0])
    finite = np.isfinite(values) & (values > 0)
    mantissa, exponent = np.frexp(values[finite].astype("float64"))  # in [0.5, 1): 8 bits with the hidden one
    expected = np.ldexp(np.rint(mantissa * 2**8) / 2**8, exponent)  # rint: ties to even
    np.testing.assert_array_equal(stored[finite].astype("float64"), expected)
    assert writer.run.tree["attention/8x8/probs"].attrs["mantissa_bits"] == 7


@pytest.mark.parametrize(("bits", "dtype"), [(10, "float16"), (0, "float16"), (23, "float32"), (True, "float16")])
def test_a_mantissa_that_cannot_be_is_refused(bits, dtype):
    with pytest.raises(StoreError, match="can be rounded to 1 to"):
        attention_group(
            1, kind="cross", grid=(8, 8), layers=["a"], heads=["mean"], branches=["cond"], steps=[0], timestep=[0],
            tokens=small_tokens(1), dtype=dtype, mantissa=bits,
        )  # fmt: skip


@pytest.mark.parametrize("place", ["s3://bucket/run.zarr", "s3:/bucket/run.zarr", "run.zarr.zip"])
def test_a_run_is_written_to_a_folder_only(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="is no folder, and a run is written to a folder only"):
        create_run(place, small_layout())
    assert not any(tmp_path.iterdir())
