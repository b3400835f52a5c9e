"""What a job costs besides its model: a model that computes nothing, for more and more samples; and quick questions.

Run as a program: `python -m tests.benchmarks.bench_jobs [folder] [samples …]`. Each size runs in a process of its own,
whose peak memory is told.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (100, 1000, 10_000)


def one(folder, n):
    """Drive `n` samples of nothing in batches of 8; print cost a sample, peak memory, and how fast the run opens."""
    from interp.jobs.driver import drive
    from interp.stores import open_run
    from tests.jobs.null import recipe

    path = folder / f"{n}.zarr"
    start, used = time.perf_counter(), time.process_time()
    report = drive(recipe(path, n=n, batch=8, steps=3), path, progress=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    assert report.done == n
    peak = memory("VmHWM")  # getrusage would count the process that started this one
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run = open_run(path)
        times.append(time.perf_counter() - start)
    assert len(run.samples) == n
    start = time.perf_counter()
    drive(recipe(path, n=n, batch=8, steps=3), path, progress=False)
    again = time.perf_counter() - start
    print(
        f"{n:>6} samples: {1e3 * wall / n:.1f} ms wall, {1e3 * cpu / n:.1f} ms CPU a sample; peak memory {peak:.0f} MiB; "
        f"opened in {1e3 * statistics.median(times):.0f} ms; a second command that finds nothing to do {again:.2f} s"
    )


def memory(which):
    """Memory of this process in MiB, as Linux names it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{which}:")[2].split()[0]) / 1024


def planning(n=10_000):
    """Plan `n` samples of the bundled model."""
    import interp

    pipe = interp.load("scenes")
    prompts = [f"a red circle and {k} blue stars" for k in range(n)]
    str(interp.plan(pipe, prompts[:4], steps=20))
    start, before = time.perf_counter(), memory("VmRSS")
    plan = interp.plan(pipe, prompts, steps=20)
    took = time.perf_counter() - start
    assert len(str(plan)) > 0
    held = 1024 * (memory("VmRSS") - before) / n
    print(f"plan of {len(plan):,} samples of scenes: {took:.1f} s; {held:.1f} kB of memory a sample")


def main():
    where = sys.argv[1] if len(sys.argv) > 1 else None
    if len(sys.argv) == 4 and sys.argv[2] == "one":
        one(Path(sys.argv[1]), int(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory(dir=where) as name:
        planning()
        for n in map(int, sys.argv[2:] or SIZES):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_jobs", name, "one", str(n)], check=True)


if __name__ == "__main__":
    main()
