"""How much faster two GPUs trace than one: the same job of `scenes` with `--workers 1` and `--workers 2`.

    python -m tests.benchmarks.bench_workers [folder] [--workers 1 2] [--seconds 60] [--batch 64] [--steps 20]

Run it from a folder on a local disk, since each setting writes a run there (and deletes it). What is told is steady
throughput: time starts when every worker has finished `WARM` batches, so that starting processes, loading the model and
first calls do not count, and the job is stopped `--seconds` later, as Ctrl-C would. A worker's rate is the samples that
became durable between its first and its last finished batch in that time; the rates are added up.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from interp.jobs import Job, driver
from interp.jobs.workers import Workers
from interp.scenes import prompts

WARM = 2


class Watched(Workers):
    """Workers whose finished tasks are noted, (seconds, samples) by worker, and who stop when the time is up."""

    noted: dict[int, list[tuple[float, int]]]
    seconds: float
    steady = float("inf")

    def _look(self, slot):
        ended = super()._look(slot)
        now = time.perf_counter()
        self.noted[slot.number] += [(now, len(task.waiting)) for task, outcome in ended if outcome.kind == "done"]
        if self.steady > now and all(len(self.noted[s.number]) >= WARM for s in self._slots):
            Watched.steady = now
        if now > self.steady + self.seconds:
            raise KeyboardInterrupt
        return ended


def rate(workers, job, seconds):
    """Run the job with `workers` processes; return samples a second."""
    Watched.noted, Watched.seconds, Watched.steady = defaultdict(list), seconds, float("inf")
    driver.Workers = Watched
    shutil.rmtree(job.path, ignore_errors=True)
    began = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):
        driver.run_job(job, workers=workers)
    total = 0.0
    for number, stamps in sorted(Watched.noted.items()):
        late = [(at, n) for at, n in stamps if at >= Watched.steady]
        if len(late) < 2:
            raise SystemExit(f"worker {number} finished {len(stamps)} batches; give more --seconds or --samples")
        made, took = sum(n for _, n in late[1:]), late[-1][0] - late[0][0]
        total += made / took
        print(f"  worker {number}: {made / took:.2f} samples/s over {len(late) - 1} batches, {took:.0f} s")
    stored = sum(p.stat().st_size for p in job.path.rglob("*") if p.is_file())
    done = sum(n for stamps in Watched.noted.values() for _, n in stamps)
    print(
        f"--workers {workers}: {total:.2f} samples/s, {total * stored / done / 1e6:.0f} MB/s written; {done} samples done, "
        f"steady {Watched.steady - began:.0f} s after the start",
        flush=True,
    )
    shutil.rmtree(job.path, ignore_errors=True)
    return total


def disk(folder, size=1 << 30):
    """Print how fast one thread writes `size` bytes durably."""
    data = os.urandom(1 << 24)
    start = time.perf_counter()
    with (folder / "raw").open("wb", buffering=0) as file:
        for _ in range(size >> 24):
            file.write(data)
        os.fsync(file.fileno())
    print(f"raw durable write, one thread: {size / (time.perf_counter() - start) / 1e6:.0f} MB/s", flush=True)
    (folder / "raw").unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="on a local disk; default: a temporary folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="of steady work in each setting")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=12_000, help="of the job; more than can be made in the time")
    parser.add_argument("--capture", type=json.loads, default={}, help="JSON, as in a job file")
    given = parser.parse_args()
    seeds = min(20, given.samples)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        disk(folder, 1 << 30 if given.samples > 1000 else 1 << 26)
        job = Job(
            model="scenes", prompts=prompts(-(-given.samples // seeds), objects=2), seeds=list(range(seeds)),
            steps=given.steps, batch_size=given.batch, capture=given.capture, store=str(folder / "run.zarr"),
        )  # fmt: skip
        found = {n: rate(n, job, given.seconds) for n in given.workers}
    first, *others = found
    for n in others:
        print(f"{n} workers / {first}: {found[n] / found[first]:.3f}")


if __name__ == "__main__":
    main()
