"""The same job on Dask workers: the same bytes, and a worker that is killed takes nothing along."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed")

from interp.errors import InterpError
from interp.jobs.cluster import _start_scheduler as start_scheduler
from interp.jobs.driver import drive
from interp.stores import open_run
from tests.jobs.null import recipe
from tests.jobs.test_faults import files

ROOT = Path(__file__).parents[2]
N = 16


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    path = tmp_path_factory.mktemp("calm") / "run.zarr"
    drive(recipe(path, n=N), path, progress=False)
    return path


@pytest.fixture
def workers(tmp_path):
    """Two workers that wait for a scheduler file, as a batch system would start them before or after the job."""
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
    command += [
        "--memory-limit",
        "0",
        "--no-dashboard",
        "--death-timeout",
        "30",
        "--local-directory",
        str(tmp_path / "d"),
    ]
    started = []

    def start(count=2):
        started.extend(
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            for _ in range(count)
        )
        return file

    yield start
    for worker in started:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def test_a_cluster_makes_the_same_bytes_and_outlives_a_poison_sample(calm, tmp_path, workers):
    """Workers compute while they write, to a slow disk here; what a dying one was still writing is no fault of that.

    The cluster is somebody else's: it stays, and takes the next job on the same run.
    """
    path, log = tmp_path / "run.zarr", tmp_path / "log"
    cluster = {"scheduler_file": str(workers()), "progress": False}
    scheduler = start_scheduler(Path(cluster["scheduler_file"]))
    work = recipe(path, n=N, faults={"5": "die", "9": "raise"}, log=str(log), disk=0.5)
    report = drive(work, path, **cluster)
    assert (report.done, report.failed) == (N - 2, 2)
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    of_first = [what for pid, what in lines if pid == next(pid for pid, what in lines if what == "0 1")]
    assert of_first[0] == "0 1" and of_first[1] != "written", lines
    errors = open_run(path).samples["error"]
    assert "KilledWorker" in errors[5] and errors[9] == "ValueError: sample 9 is no good"
    assert (errors.drop([5, 9]) == "").all()
    assert drive(recipe(path, n=N), path, retry_failed=True, **cluster).made == 2
    assert files(path) == files(calm)
    scheduler.terminate()
    scheduler.wait()


def test_a_scheduler_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("interp.jobs.cluster.PATIENCE", 1.0)
    with pytest.raises(InterpError, match="no Dask scheduler answers at tcp:"):
        drive(recipe(tmp_path / "r.zarr"), tmp_path / "r.zarr", scheduler="tcp://127.0.0.1:9", progress=False)
    assert not (tmp_path / "r.zarr").exists()


def test_a_batch_that_hangs_is_ended(tmp_path, workers):
    path = tmp_path / "run.zarr"
    began = time.monotonic()
    report = drive(
        recipe(path, n=2, batch=1, faults={"1": "hang"}),
        path,
        scheduler_file=str(workers(1)),
        limit=1.0,
        progress=False,
    )
    assert (report.done, report.failed) == (1, 1)
    assert time.monotonic() - began < 60
    assert "longer than 1 s" in open_run(path).samples["error"][1]
