"""How fast a run opens, one token's maps are read, and attention is written against a raw durable write in one process.

Run as a script: `python tests/benchmarks/bench_store.py [folder]`. Figures are medians; compare ratios,
not MB/s, between machines.
"""

import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

from interp.stores import (
    Array,
    Group,
    Layout,
    TokenTable,
    attention_group,
    create_run,
    images_group,
    open_run,
    trajectory_group,
)

STEPS, LAYERS, TOKENS = 50, {"64x64": 5, "32x32": 5, "16x16": 5, "8x8": 1}, 77


def table(n, width=TOKENS):
    cells = np.full((n, width), "word")
    numbers = np.tile(np.arange(width), (n, 1))
    return TokenTable(cells, numbers, cells, numbers, np.ones_like(numbers), cells)


def thousand(n):
    ramp = np.linspace(0, 1, STEPS)
    axes = {"timestep": ramp, "sigma": ramp}
    groups = {
        "trajectory": trajectory_group(
            n, **axes, alpha_bar=ramp, data_scale=ramp, noise_scale=ramp, channel=4, y=64, x=64
        )
    }
    for grid, layers in LAYERS.items():
        size = tuple(int(p) for p in grid.split("x"))
        groups[f"attention/{grid}"] = attention_group(
            n, kind="cross", grid=size, layers=[f"layer{k}" for k in range(layers)],
            heads=["mean"], branches=["cond"], steps=np.arange(STEPS), tokens=table(n), **axes,
        )  # fmt: skip
    groups["images"] = images_group(n, 512, 512)
    columns = {
        "prompt": [f"prompt {i}" for i in range(n)],
        "seed": list(range(n)),
        "batch": [i // 8 for i in range(n)],
    }
    return Layout(columns, groups, {"steps": STEPS})


def timed(do, turns=15):
    """Return the median and the best of some turns, in milliseconds."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        do()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def opening(folder):
    path = folder / "thousand.zarr"
    start = time.perf_counter()
    create_run(path, thousand(1000)).close()
    print(f"create 1,000 samples: {time.perf_counter() - start:.2f} s")
    ours, best = timed(lambda: open_run(path))
    plain, least = timed(lambda: xr.open_datatree(path, engine="zarr", chunks=None))
    print(
        f"open_run of 1,000 samples: {ours:.0f} ms, at best {best:.0f} (goal 50); xr.open_datatree: {plain:.0f} and {least:.0f}"
    )
    print(f"ratio to plain xarray: {ours / plain:.2f}, of the best {best / least:.2f}")


def one_token(folder, n=1000):
    """Read a token's maps over all steps and layers of one of `n` samples, as a user does, and with Zarr alone."""
    layout = thousand(n)
    groups = {k: v for k, v in layout.groups.items() if k.startswith("attention")}
    path = folder / "maps.zarr"
    with create_run(path, Layout(layout.samples, groups, layout.attrs)) as writer:
        writer.begin(0)
        for grid, layers in LAYERS.items():
            probs = attention(10, layers, int(grid.split("x")[0]))
            writer.put(0, f"attention/{grid}/probs", np.concatenate([probs] * (STEPS // 10)))
        writer.commit(0)
    run, arrays = open_run(path), [zarr.open_group(path, mode="r")[f"attention/{grid}/probs"] for grid in LAYERS]

    def maps(token):
        for grid in run.grids:
            run.attention(grid).isel(sample=0, token=token).load()

    first = timed(lambda: maps(0), 1)[0]
    ours, best = timed(lambda: maps(3))
    theirs, least = timed(lambda: [a[0, :, :, :, :, 3] for a in arrays])
    print(f"one token, all steps, layers and four grids, of one of {n:,} samples: {first:.0f} ms at first, then {ours:.0f} ms, "
          f"at best {best:.0f} (goal 50); Zarr alone: {theirs:.0f} and {least:.0f}")  # fmt: skip
    print(f"ratio to Zarr: {ours / theirs:.2f}, of the best {best / least:.2f}")


def attention(steps, layers, size):
    """Draw probabilities over tokens whose noise is of low rank, as softmax(q kᵀ) makes them."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((TOKENS, 8))
    q = rng.standard_normal((steps, layers, size, size, 8)) * 0.7
    logits = np.einsum("slyxd,td->sltyx", q, keys) + np.where(np.arange(TOKENS) == 0, 4.0, 0.0)[:, None, None]
    weight = np.exp(logits - logits.max(2, keepdims=True))
    return (weight / weight.sum(2, keepdims=True)).astype("float16")[:, None, :, None]


def throughput(folder, turns=8):
    """Write samples one after the other, each until it is durable, between raw writes of the same bytes."""
    probs = attention(10, 5, 64)
    probs = np.concatenate([probs] * (STEPS // 10))
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    layout = Layout(
        {"prompt": ["p"] * turns, "seed": list(range(turns))},
        {"attention/64x64": Group({"probs": Array(dims, (turns, *probs.shape), "float16")})},
    )
    raw, ours, cpu = [], [], []
    with create_run(folder / "run.zarr", layout) as writer:
        for turn in range(turns):
            start = time.perf_counter()
            with (folder / f"{turn}.npy").open("wb") as file:
                np.save(file, probs)
                file.flush()
                os.fsync(file.fileno())
            raw.append(time.perf_counter() - start)
            start, used = time.perf_counter(), time.process_time()
            writer.begin(turn)
            for block in probs:
                writer.append(turn, "attention/64x64/probs", block)
            writer.commit(turn)
            writer.drain()
            ours.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
            (folder / f"{turn}.npy").unlink()
    size = probs.nbytes / 1e6
    stored = sum(p.stat().st_size for p in (folder / "run.zarr").rglob("*") if p.is_file()) / 1e6 / turns
    a, b = statistics.median(raw), statistics.median(ours)
    print(f"{size:.0f} MB of attention a sample, {size / stored:.2f} times smaller on disk")
    print(f"np.save + fsync: {size / a:.0f} MB/s; run store, durable: {size / b:.0f} MB/s")
    print(f"ratio {a / b:.2f} (goal 0.6)")
    print(f"ratio of the best times: {min(raw) / min(ours):.2f}; CPU seconds: {statistics.median(cpu):.2f}")


def beside(folder, seconds=4.0):
    """How fast another thread computes while a run is written as fast as it goes: a GPU's main loop, and pure Python."""
    for kind in ("launching", "pure Python"):
        alone, together = [], []
        for _ in range(3):
            alone.append(_rate(kind, seconds / 6))
            stop = threading.Event()
            thread = threading.Thread(target=_feed, args=(folder, stop))
            thread.start()
            time.sleep(0.3)
            together.append(_rate(kind, seconds / 6))
            stop.set()
            thread.join()
        print(f"{kind}: {statistics.median(together) / statistics.median(alone):.2f} of its rate alone (goal 0.95)")


def _rate(kind, seconds):
    """Count loops: 40 launches of 25 µs Python, each followed by 0.3 ms without Python's lock; or ticks."""
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        if kind == "launching":
            busy = time.perf_counter() + 25e-6
            while time.perf_counter() < busy:
                pass
            time.sleep(0.3e-3)
        else:
            sum(range(2000))
        count += 1
    return count / seconds


def _feed(folder, stop):
    """Write samples without pause, from another process's point of view: blocks are ready made."""
    probs = attention(10, 5, 64)
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    layout = Layout(
        {"prompt": ["p"] * 2000, "seed": list(range(2000))},
        {"attention/64x64": Group({"probs": Array(dims, (2000, *probs.shape), "float16")})},
    )
    path = folder / f"feed{time.monotonic_ns()}.zarr"
    with create_run(path, layout, queue_bytes=64 << 20) as writer:
        for i in range(2000):
            if stop.is_set():
                break
            writer.begin(i)
            for block in probs:
                writer.append(i, "attention/64x64/probs", block)
            writer.commit(i)
    shutil.rmtree(path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        opening(Path(name))
        one_token(Path(name))
        throughput(Path(name))
        beside(Path(name))
