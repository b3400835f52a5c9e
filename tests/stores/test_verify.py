"""`verify` finds any flipped byte in any chunk, and any missing one; `--repair` has those samples made again."""

from pathlib import Path

import numpy as np
import pytest

from interp.stores import StoreError, create_run, open_run, synthetic_run, to_do, verify
from interp.stores.integrity import check, repair_run
from interp.stores.lock import RunLock
from interp.stores.testing import small_layout, write_sample

N = 3


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "run.zarr"
    with create_run(made, small_layout(n=N, steps=3)) as writer:
        for i in range(N):
            write_sample(writer, i)
    open_run(made).write_scores({"clip:prompt": np.ones(N), "judge:prompt": np.ones(N)})
    return made


def chunks(path):
    found = [p for p in sorted(path.rglob("c/**/*")) if p.is_file()]
    return [p for p in found if p.relative_to(path).parts[0] != "sample"]  # without its index a run cannot be opened


def owners(path, file):
    """The samples whose numbers are in a chunk, and its variable; no samples for what was known beforehand."""
    variable, _, place = str(file.relative_to(path)).partition("/c/")
    first = int(place.split("/")[0])
    if variable.startswith("scores/metric") or variable in small_layout(n=1).samples or "token" in variable:
        return variable, []
    rows = {"status": 2, "error": 2, "trajectory/nfe": 2, "trajectory/guidance_scale": 2, "images/thumb": 2}
    rows |= {"scores/score": 128}
    size = rows.get(variable, 1)
    samples = range(first * size, min(N, (first + 1) * size)) if variable != "scores/score" else range(N)
    kinds = ("trajectory/latents", "trajectory/final", "trajectory/noise_pred", "attention/4x4/probs", "images/image")
    return variable, list(samples) if variable in rows or variable.startswith(kinds) else []


def test_one_flipped_byte_in_any_chunk(path):
    rng = np.random.default_rng()
    assert verify(open_run(path)) == []
    files = chunks(path)
    assert len(files) > 30
    for file in files:
        whole = file.read_bytes()
        variable, samples = owners(path, file)
        for at in {int(rng.integers(len(whole)))}:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                problems = check(open_run(path))
            except StoreError as error:  # an index, without which a run cannot be opened
                assert f"{variable} cannot be read" in str(error)
                continue
            assert [p for p in problems if p.path == variable], f"{variable} byte {at}: {problems}"
            assert {p.sample for p in problems if p.path == variable} == ({*samples} or {None})
            assert all(f"sample {p.sample}" in str(p) for p in problems if p.sample is not None)
        file.write_bytes(whole)
    assert verify(open_run(path)) == []


def test_any_missing_chunk(path):
    for file in chunks(path):
        variable, samples = owners(path, file)
        if variable in ("status", "error"):  # their absence says that nothing was done, or that nothing failed
            continue
        whole = file.read_bytes()
        file.unlink()
        named = {p.sample for p in check(open_run(path)) if p.path == variable}
        assert named == ({*samples} or {None}), variable
        file.write_bytes(whole)


def test_a_hole_in_a_shard(path):
    from interp.stores.chunks import placement_of
    from interp.stores.codec import checksummed
    from interp.stores.identity import read_root
    from interp.stores.shards import read_index

    file = path / "attention/4x4/probs/c/1/0/0/0/0/0/0/0"
    place = placement_of(read_root(path)["consolidated_metadata"]["metadata"]["attention/4x4/probs"])
    index = read_index(file, place)
    index[0, 0] = 2**64 - 1
    tail = checksummed(index.astype("<u8").tobytes())
    file.write_bytes(file.read_bytes()[: -len(tail)] + tail)
    assert "sample 1: attention/4x4/probs lacks 1 of its chunks" in verify(open_run(path))


def test_repair_has_exactly_the_damaged_samples_made_again(path):
    calm = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    (path / "trajectory/latents/c/2/0/0/0/0").unlink()
    file = path / "attention/4x4/probs/c/1/0/0/0/0/0/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    run = open_run(path)
    assert repair_run(run, check(run)) == [1, 2]
    again = open_run(path)
    assert again.samples["status"].tolist() == [1, 0, 0]
    assert verify(again) == []
    with create_run(path, small_layout(n=N, steps=3)) as writer:
        for i in to_do(writer.status):
            write_sample(writer, int(i))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == calm


def test_repair_of_the_statuses_themselves(path):
    file = path / "status/c/1"
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    run = open_run(path)
    problems = check(run)
    assert {p.sample for p in problems} == {2}
    assert repair_run(run, problems) == [2]
    assert open_run(path).samples["status"].tolist() == [1, 1, 0]
    assert verify(open_run(path)) == []


def test_metadata_of_a_node_that_differ_from_the_roots_are_told_and_repaired(path):
    files = [p for p in path.rglob("zarr.json") if p.parent != path][::4]
    calm = {p: p.read_bytes() for p in files}
    for k, file in enumerate(files):
        changes = (lambda b: b.replace(b"3", b"4", 1), lambda b: b[1:], lambda b: b"[]", None)
        change = changes[k % 4]
        file.unlink() if change is None else file.write_bytes(change(calm[file]))
        problems = check(open_run(path))
        assert [(p.sample, p.path) for p in problems] == [(None, str(file.relative_to(path)))]
        assert repair_run(open_run(path), problems) == []
    assert {p: p.read_bytes() for p in files} == calm


def test_repair_needs_the_run_for_itself_and_a_folder(path):
    with RunLock(path), pytest.raises(StoreError, match="is being written by process"):
        repair_run(open_run(path), [])
    with pytest.raises(StoreError, match="in memory cannot be repaired"):
        repair_run(synthetic_run(), [])


def test_a_chunk_that_is_a_link_is_found(path, tmp_path):
    file = path / "trajectory/latents/c/0/0/0/0/0"
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert any("sample 0: trajectory/latents is a link to elsewhere" in p for p in verify(open_run(path)))


def test_values_that_are_not_finite(tmp_path):
    with create_run(tmp_path / "r.zarr", small_layout(n=1)) as writer:
        writer.begin(0)
        for name, array in writer.layout.arrays.items():
            if name != "images/thumb":
                writer.put(0, name, np.full(array.sample_shape, np.inf if array.dtype[0] == "f" else 0, array.dtype))
        writer.commit(0)
    assert any("trajectory/latents has" in p and "not finite" in p for p in verify(open_run(tmp_path / "r.zarr")))


def test_a_folder_of_a_run_that_is_a_link_is_refused(path, tmp_path):
    folder = Path(path / "trajectory/latents")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="trajectory/latents is a link"):
        open_run(path)
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    with pytest.raises(StoreError, match="trajectory/latents is a link"):
        create_run(path, small_layout(n=N, steps=3))
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before
