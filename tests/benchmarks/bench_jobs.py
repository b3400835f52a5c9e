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
    status = Path("/proc/self/status").read_text()  # getrusage would count the process that started this one
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
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


def planning(n=10_000):
    """Plan `n` samples of the bundled model."""
    import interp

    pipe = interp.load("scenes")
    prompts = [f"a red circle and {k} blue stars" for k in range(n)]
    interp.plan(pipe, prompts[:4], steps=20)
    start = time.perf_counter()
    plan = interp.plan(pipe, prompts, steps=20)
    print(f"plan of {len(plan):,} samples of scenes: {time.perf_counter() - start:.1f} s")


def one_token(folder):
    """Read one token's maps over all steps and layers of one sample: 50 steps, 5 layers of 64x64, 77 tokens."""
    import numpy as np

    from interp.stores import create_run, open_run
    from tests.benchmarks.bench_store import LAYERS, STEPS, TOKENS, attention, thousand

    path = folder / "maps.zarr"
    layout = thousand(1)
    layout = type(layout)(
        layout.samples, {k: v for k, v in layout.groups.items() if k.startswith("attention")}, layout.attrs
    )
    with create_run(path, layout) as writer:
        writer.begin(0)
        for grid, layers in LAYERS.items():
            size = int(grid.split("x")[0])
            probs = attention(10, layers, size)
            writer.put(0, f"attention/{grid}/probs", np.concatenate([probs] * (STEPS // 10)))
        writer.commit(0)
    for what in ("for the first time", "warm"):
        times, run = [], open_run(path)
        for token in range(0, TOKENS, 7):
            start = time.perf_counter()
            for grid in run.grids:
                run.attention(grid).isel(sample=0, token=token).load()
            times.append(time.perf_counter() - start)
        print(
            f"one token, all steps, layers and grids, {what}: {1e3 * statistics.median(times):.0f} ms, at best "
            f"{1e3 * min(times):.0f} ms (goal 50, warm)", flush=True,
        )  # fmt: skip


def main():
    where = sys.argv[1] if len(sys.argv) > 1 else None
    if len(sys.argv) == 4 and sys.argv[2] == "one":
        one(Path(sys.argv[1]), int(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory(dir=where) as name:
        one_token(Path(name))
        planning()
        for n in map(int, sys.argv[2:] or SIZES):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_jobs", name, "one", str(n)], check=True)


if __name__ == "__main__":
    main()
