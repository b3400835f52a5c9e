"""Creating over something: the same plan resumes, anything else is refused in a sentence and left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from interp.stores import StoreError, create_run, open_run, to_do, verify
from interp.stores.layout_check import check_name
from interp.stores.testing import small_layout, small_tokens, small_values, write_sample


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_finished_samples_are_kept_and_leftovers_swept(tmp_path):
    path = tmp_path / "r.zarr"
    with create_run(path, small_layout()) as writer:
        write_sample(writer, 1)
    left = path / "attention/4x4/probs/.0.partial"
    left.write_bytes(b"half")
    with create_run(path, small_layout()) as writer:
        assert list(to_do(writer.status)) == [0, 2]
        assert not left.exists()
        for i in to_do(writer.status):
            write_sample(writer, int(i))
    assert verify(open_run(path)) == []


def test_a_worker_leaves_the_files_of_others(tmp_path):
    path = tmp_path / "r.zarr"
    create_run(path, small_layout()).close()
    other = path / "attention/4x4/probs/.0.partial"
    other.write_bytes(b"half")
    create_run(path, small_layout(), clean=False).close()
    assert other.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 12}, "steps 13 there, 12 asked"),
        ({"guidance": 5.0}, "guidance none there, 5.0 asked"),
        ({"n": 4}, "3 samples there, 4 asked"),
    ],
)
def test_another_plan_is_refused_naming_what_differs(tmp_path, change, says):
    path = tmp_path / "r.zarr"
    create_run(path, small_layout()).close()
    before = files(path)
    with pytest.raises(StoreError, match=says) as caught:
        create_run(path, small_layout(**change))
    assert "\n" not in str(caught.value)
    assert files(path) == before


def test_given_fingerprints_decide(tmp_path):
    path = tmp_path / "r.zarr"
    create_run(path, small_layout(fingerprint="a", note=1)).close()
    create_run(path, small_layout(fingerprint="a", note=2)).close()
    with pytest.raises(StoreError, match="fingerprint a there, b asked"):
        create_run(path, small_layout(fingerprint="b", note=1))


def foreign_file(path):
    path.write_text("precious")


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.tex").write_text("precious")


def foreign_zarr(path):
    zarr.create_group(path, attributes={"mine": 1})


def foreign_json(path):
    path.mkdir()
    (path / "zarr.json").write_text("{")


def newer(path):
    create_run(path, small_layout()).close()
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace("interp.run/1", "interp.run/2"))


@pytest.mark.parametrize(
    ("make", "writing", "reading"),
    [
        (foreign_file, "is a file, not a run", "is a file, not a run"),
        (foreign_folder, "folder of something else", "folder of something else"),
        (foreign_zarr, "Zarr store, but not a run", "Zarr store, but not a run"),
        (foreign_json, "cannot be read", "cannot be read"),
        (newer, "format interp.run/2", "format interp.run/2"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, make, writing, reading):
    path = tmp_path / "there"
    make(path)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=writing):
        create_run(path, small_layout())
    with pytest.raises(StoreError, match=reading):
        open_run(path)
    assert files(tmp_path) == before


def test_nothing_there(tmp_path):
    with pytest.raises(StoreError, match="no run at"):
        open_run(tmp_path / "no.zarr")


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/..", ".hidden", "a/", "a b", "a\\b", "c\0"])
def test_names_that_could_leave_the_run_are_refused(name):
    with pytest.raises(StoreError, match="cannot name a part of a run"):
        check_name(name)


@pytest.mark.parametrize("column", ["../x", "status", "trajectory", "sample"])
def test_columns_cannot_take_names_of_ours(tmp_path, column):
    layout = small_layout()
    layout.samples[column] = ["x"] * 3
    with pytest.raises(StoreError):
        create_run(tmp_path / "r.zarr", layout)
    assert not list(tmp_path.iterdir())


def test_a_killed_creation_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    path = tmp_path / "r.zarr"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    import socket

    left = tmp_path / f".r.zarr.{socket.gethostname()}.{dead.stdout.strip()}.creating"
    left.mkdir()
    (left / "zarr.json").write_text("{}")
    with create_run(path, small_layout()) as writer:
        write_sample(writer, 0)
    assert not left.exists()


def test_a_run_grows_again_after_reopening_and_beyond_a_chunk(tmp_path):
    path = tmp_path / "r.zarr"
    empty = small_layout(n=0, steps=2)
    total = 0
    for more in (100, 60, 1):
        with create_run(path, empty) as writer:
            assert len(writer) == total
            columns = {
                "prompt": [f"p{k}" for k in range(total, total + more)],
                "seed": list(range(total, total + more)),
            }
            new = writer.grow(columns, {"attention/4x4": small_tokens(more, 2)})
            assert list(new) == list(range(total, total + more))
            write_sample(writer, new[-1])
        total += more
    run = open_run(path)
    assert list(run.samples["seed"]) == list(range(total))
    assert list(run.samples["prompt"]) == [f"p{k}" for k in range(total)]
    assert list(run.samples.index[run.samples["status"] == 1]) == [99, 159, 160]
    assert verify(run) == []
    assert (run.tree["attention/4x4/token_role"].values[:, -1] == "").all()


def test_too_many_tokens_are_refused_when_growing(tmp_path):
    with create_run(tmp_path / "r.zarr", small_layout()) as writer:
        with pytest.raises(StoreError, match="needs 5 token columns, but the run has 3"):
            writer.grow({"prompt": ["p"], "seed": [0]}, {"attention/4x4": small_tokens(1, 5)})
        assert len(writer.run) == 3


def test_a_growth_cut_short_is_not_seen(tmp_path, monkeypatch):
    path = tmp_path / "r.zarr"
    with create_run(path, small_layout()) as writer:
        write_sample(writer, 0)
    import interp.stores.growth as growth

    real, calls = growth.write_json, []

    def stops(folder, document):
        calls.append(folder)
        if len(calls) == 5:
            raise OSError("pulled the plug")
        real(folder, document)

    monkeypatch.setattr(growth, "write_json", stops)
    writer = create_run(path, small_layout())
    with pytest.raises(StoreError, match="pulled the plug"):
        writer.grow({"prompt": ["x"], "seed": [9]}, {"attention/4x4": small_tokens(1)})
    writer.close()
    monkeypatch.undo()
    assert len(open_run(path)) == 3
    assert verify(open_run(path)) == []
    with create_run(path, small_layout()) as writer:
        writer.grow({"prompt": ["z"], "seed": [5]}, {"attention/4x4": small_tokens(1)})
    assert list(open_run(path).samples["prompt"])[-1] == "z"


WORKER = """
import sys
from interp.stores import create_run, to_do
from interp.stores.small import small_layout, write_sample
with create_run(sys.argv[1], small_layout(n=40)) as writer:
    print("ready", flush=True)
    for i in to_do(writer.status):
        write_sample(writer, int(i))
"""


def start(path):
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(path)], stdout=subprocess.PIPE, env=env, text=True)
    worker.stdout.readline()
    return worker


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only: Windows cannot kill a process by signal")
def test_killed_at_any_moment_and_resumed_it_equals_an_undisturbed_run(tmp_path):
    path, calm = tmp_path / "r.zarr", tmp_path / "calm.zarr"
    layout = small_layout(n=40)
    rng = np.random.default_rng()
    killed = 0
    for _ in range(4):
        worker = start(path)
        time.sleep(rng.uniform(0, 0.12))
        worker.kill()
        killed += worker.wait() == -signal.SIGKILL
        worker.stdout.close()
        run = open_run(path)
        for i in np.flatnonzero(run.samples["status"] == 1):
            for name, value in small_values(layout, i).items():
                if name != "images/thumb":
                    np.testing.assert_array_equal(run.tree[name].isel(sample=int(i)), value)
    worker = start(path)
    assert worker.wait() == 0
    worker.stdout.close()
    assert killed
    with create_run(calm, layout) as writer:
        for i in range(40):
            write_sample(writer, i)
    assert verify(open_run(path)) == []
    disturbed, undisturbed = files(path), files(calm)
    for document in (disturbed, undisturbed):
        root = json.loads(document["zarr.json"])
        del root["attributes"]["created"]
        document["zarr.json"] = root
    assert disturbed == undisturbed
