"""Real processes, killed, starved and interrupted: afterwards a run goes on, and ends equal to an undisturbed one."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pytest

from interp.jobs.workers import _quiet_tracker
from interp.stores import DONE, open_run, verify
from interp.stores.small import small_layout, small_values
from tests.jobs import null

ROOT = Path(__file__).parents[2]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.jobs.null", "interp.jobs.driver"])
"""Imports once what drivers need: each is a process as real as any, and is there at once."""


class Driver:
    """A driver: a process in a session of its own, as a shell would start it."""

    def __init__(self, *words):
        _quiet_tracker()
        self._folder = TemporaryDirectory()
        self._process = FORKS.Process(target=null.forked, args=(words, self._folder.name))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def communicate(self, timeout=60):
        self._process.join(timeout)
        assert self.returncode is not None, f"it runs for longer than {timeout} s"
        return [(Path(self._folder.name) / name).read_text() for name in ("out", "err")]


def start(store, *words, **options):
    return Driver(str(store), json.dumps({"n": 24, **options}), *words)


def end(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def workers(process):
    try:
        return [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    except psutil.Error:
        return []


def files(path):
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    root = json.loads(found["zarr.json"])
    del root["attributes"]["created"]
    return {**found, "zarr.json": root}


def done(path):
    return {int(i) for i in np.flatnonzero(open_run(path).samples["status"] == DONE)} if path.exists() else set()


def assert_whole(path, layout, samples):
    tree = open_run(path).tree
    for i in samples:
        for name, value in small_values(layout, i).items():
            if name != "images/thumb":
                np.testing.assert_array_equal(tree[name].isel(sample=i), value)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An undisturbed run, made by one process."""
    path = tmp_path_factory.mktemp("calm") / "run.zarr"
    code, _, err = end(start(path))
    assert code == 0, err
    assert len(done(path)) == 24
    return path


def test_any_number_of_workers_makes_the_same_bytes(calm, tmp_path):
    code, out, err = end(start(tmp_path / "run.zarr", "--workers", "3", log=str(tmp_path / "log")))
    assert code == 0 and "24 of 24 samples done" in out, err
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) > 1
    assert files(tmp_path / "run.zarr") == files(calm)
    assert {p.name for p in tmp_path.iterdir()} == {"run.zarr", "log"}  # no lock is left


def test_ten_kills_at_random_moments(calm, tmp_path):
    path, log, layout = tmp_path / "run.zarr", tmp_path / "log", small_layout(n=24)
    log.touch()
    rng = random.Random()
    driver, kills = None, {"worker": 0, "driver": 0, "all": 0}
    before, seen = set(), 0
    while sum(kills.values()) < 10:
        if driver is None:
            driver = start(path, "--workers", "2", "--retry-failed", pause=0.02, log=str(log))
            seen = len(log.read_text().splitlines())
            before = done(path)
        until = time.monotonic() + 20
        while len(log.read_text().splitlines()) <= seen and time.monotonic() < until and driver.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        if driver.poll() is not None:  # it has finished: start over
            _, said = driver.communicate()
            # 2: a worker was killed while it started, which is told as workers that cannot be started
            assert driver.returncode in (0, 1) or (driver.returncode == 2 and "no worker can be started" in said), said
            shutil.rmtree(path)
            driver = None
            continue
        whom = "worker" if kills["worker"] < 6 and rng.random() < 0.75 else min(("driver", "all"), key=kills.get)
        victims = workers(driver)
        if whom == "worker":
            if not victims:
                continue
            rng.choice(victims).kill()
        elif whom == "driver":
            driver.kill()
        else:
            os.killpg(driver.pid, signal.SIGKILL)
        kills[whom] += 1
        if whom != "worker":
            driver.communicate()
            driver = None
            for line in log.read_text().splitlines()[seen:]:  # nothing that was done is done twice
                assert not {*map(int, line.split()[1:])} <= before
        assert_whole(path, layout, done(path))
    if driver is not None:
        end(driver)
    code, out, err = end(start(path, "--retry-failed"))
    assert code == 0 and "24 of 24 samples done" in out, err
    assert verify(open_run(path)) == []
    assert files(path) == files(calm)


def test_workers_end_with_their_driver_and_the_next_one_takes_over_at_once(calm, tmp_path):
    path = tmp_path / "run.zarr"
    driver = start(path, "--workers", "2", pause=0.02, log=str(tmp_path / "log"))
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    orphans = workers(driver)
    assert orphans
    driver.kill()
    driver.communicate()
    code, _, err = end(start(path))
    assert code == 0, err
    assert psutil.wait_procs(orphans, timeout=5)[1] == []  # one that was still importing ends when it has
    assert files(path) == files(calm)


def test_poison_hang_and_error_are_each_held_to_their_sample(calm, tmp_path):
    path = tmp_path / "run.zarr"
    faults = {"3": "die", "9": "raise", "12": "die once", "20": "hang"}
    code, out, err = end(start(path, "--workers", "2", "--limit", "1.5", faults=faults))
    assert code == 1 and "21 of 24 samples done" in out, err
    assert "batch 6: the process that ran it was killed by SIGKILL; what it lacks is tried again" in err  # 12, once
    errors = open_run(path).samples["error"]
    assert errors[3] == "the process that ran it was killed by SIGKILL"
    assert errors[9] == "ValueError: sample 9 is no good"
    assert errors[20] == "it took longer than 1.5 s and was ended"
    assert (errors.drop([3, 9, 20]) == "").all()
    assert_whole(path, small_layout(n=24), done(path))
    assert verify(open_run(path)) == []
    assert not list(path.rglob("*.partial"))
    code, _, err = end(start(path, "--retry-failed"))
    assert code == 0, err
    assert files(path) == files(calm)


def test_a_second_driver_is_refused_and_the_first_goes_on(tmp_path):
    path = tmp_path / "run.zarr"
    first = start(path, pause=0.005, log=str(tmp_path / "log"))
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    code, _, err = end(start(path))
    assert code == 2
    assert f"{path} is being written by process {first.pid} on " in err
    looks = 0
    while first.poll() is None:  # a reader meanwhile sees finished samples only, and these whole
        assert_whole(path, small_layout(n=24), done(path))
        looks += 1
    assert looks > 1
    code, out, err = end(first)
    assert code == 0 and "24 of 24" in out, err


@pytest.mark.parametrize("words", [(), ("--workers", "2")])
def test_ctrl_c_ends_within_two_seconds(calm, tmp_path, words):
    path, log = tmp_path / "run.zarr", tmp_path / "log"
    driver = start(path, *words, pause=0.01, log=str(log))
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.02)
    group = [driver.pid, *(w.pid for w in workers(driver))]
    began = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    code, _, err = end(driver)
    assert time.monotonic() - began < 2
    assert code == 130, err
    assert not [p for p in group if psutil.pid_exists(p)]
    assert done(path)
    assert end(start(path))[0] == 0
    assert files(path) == files(calm)


def test_a_clock_that_jumps_does_no_harm(calm, tmp_path):
    code, _, err = end(start(tmp_path / "run.zarr", "--workers", "1", "--limit", "30", jump=True))
    assert code == 0, err
    assert files(tmp_path / "run.zarr") == files(calm)


# A small disk, and one that cannot be written: a tmpfs in a mount namespace of its own

PREFIX = ["unshare", "-Urm", "bash", "-c"]


def can_mount():
    try:
        return not subprocess.run([*PREFIX, "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True).returncode
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs unshare(1) and the right to mount a tmpfs")


def script(text, **names):
    for name, value in {"run": f"{sys.executable} -m tests.jobs.null", **names}.items():
        text = text.replace(f"${name}", str(value))
    return subprocess.run([*PREFIX, text], cwd=ROOT, capture_output=True, text=True, timeout=60)


@needs_mount
@pytest.mark.parametrize("words", ["", "--workers 2"])
def test_a_full_disk_stops_the_job_which_goes_on_when_there_is_room(calm, tmp_path, words):
    (tmp_path / "disk").mkdir()
    result = script(
        """
        mount -t tmpfs -o size=700k tmpfs $disk || exit 9
        head -c 200k /dev/zero > $disk/filler
        $run $disk/run.zarr '{"n": 24}' $words; echo "first $?"
        $run $disk/run.zarr '{"n": 24}' $words; echo "second $?"
        rm $disk/filler
        mount -o remount,size=20m $disk
        $run $disk/run.zarr '{"n": 24}' $words; echo "third $?"
        cp -r $disk/run.zarr $out
        """,
        disk=tmp_path / "disk", out=tmp_path / "out.zarr", words=words,
    )  # fmt: skip
    assert "first 2" in result.stdout and "second 2" in result.stdout, result.stderr
    assert "No space left on device; mend that and run again, it resumes" in result.stderr
    assert "Traceback" not in result.stderr
    assert "third 0" in result.stdout, result.stderr
    assert files(tmp_path / "out.zarr") == files(calm)


@needs_mount
def test_a_read_only_folder_is_one_sentence_and_can_still_be_read(tmp_path):
    (tmp_path / "disk").mkdir()
    result = script(
        """
        mount -t tmpfs -o size=20m tmpfs $disk || exit 9
        $run $disk/run.zarr '{"n": 4}'; echo "first $?"
        mount -o remount,ro $disk
        $run $disk/run.zarr '{"n": 4}'; echo "second $?"
        $run $disk/new.zarr '{"n": 4}'; echo "third $?"
        $python -m interp.cli verify $disk/run.zarr; echo "fourth $?"
        """,
        disk=tmp_path / "disk", python=sys.executable,
    )  # fmt: skip
    assert "first 0" in result.stdout, result.stderr
    assert "second 2" in result.stdout and "third 2" in result.stdout
    assert result.stderr.count("cannot be written: Read-only file system") == 2
    assert "0 problems found" in result.stdout and "fourth 0" in result.stdout
    assert "Traceback" not in result.stderr
