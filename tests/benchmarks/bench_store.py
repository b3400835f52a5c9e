"""How fast a run opens, and how fast attention is written against a raw durable write in the same process.

Run as a script: `python tests/benchmarks/bench_store.py [folder]`. Figures are medians; compare ratios,
not MB/s, between machines.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

from interp.stores import (
    Array,
    Group,
    Layout,
    TokenTable,
    attention_group,
    create_run,
    images_group,
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


def opening(folder):
    path = folder / "thousand.zarr"
    start = time.perf_counter()
    create_run(path, thousand(1000)).close()
    print(f"create 1,000 samples: {time.perf_counter() - start:.2f} s")
    times = []
    for _ in range(15):
        start = time.perf_counter()
        xr.open_datatree(path, engine="zarr", chunks=None)
        times.append(time.perf_counter() - start)
    print(f"open 1,000 samples: {1e3 * statistics.median(times):.0f} ms (goal 50)")


def attention(steps, layers, size):
    """Draw probabilities over tokens whose noise is of low rank, as softmax(q kᵀ) makes them."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((TOKENS, 8))
    q = rng.standard_normal((steps, layers, size, size, 8)) * 0.7
    logits = np.einsum("slyxd,td->sltyx", q, keys) + np.where(np.arange(TOKENS) == 0, 4.0, 0.0)[:, None, None]
    weight = np.exp(logits - logits.max(2, keepdims=True))
    return (weight / weight.sum(2, keepdims=True)).astype("float16")[:, None, :, None]


def throughput(folder):
    probs = attention(10, 5, 64)
    probs = np.concatenate([probs] * (STEPS // 10))
    dims = ("sample", "step", "branch", "layer", "head", "token", "query_y", "query_x")
    raw, ours, cpu = [], [], []
    for turn in range(5):
        start = time.perf_counter()
        with (folder / f"{turn}.npy").open("wb") as file:
            np.save(file, probs)
            file.flush()
            os.fsync(file.fileno())
        raw.append(time.perf_counter() - start)
        layout = Layout(
            {"prompt": ["p"], "seed": [0]},
            {"attention/64x64": Group({"probs": Array(dims, (1, *probs.shape), "float16")})},
        )
        with create_run(folder / f"{turn}.zarr", layout) as writer:
            start, used = time.perf_counter(), time.process_time()
            writer.begin(0)
            for block in probs:
                writer.append(0, "attention/64x64/probs", block)
            writer.commit(0)
            writer.drain()
            ours.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        (folder / f"{turn}.npy").unlink()
    size = probs.nbytes / 1e6
    stored = sum(p.stat().st_size for p in (folder / "0.zarr").rglob("*") if p.is_file()) / 1e6
    a, b = statistics.median(raw), statistics.median(ours)
    print(f"{size:.0f} MB of attention, {size / stored:.2f} times smaller on disk")
    print(f"np.save + fsync: {size / a:.0f} MB/s; run store, durable: {size / b:.0f} MB/s")
    print(f"ratio {a / b:.2f} (goal 0.5)")
    print(f"ratio of the best times: {min(raw) / min(ours):.2f}; CPU seconds: {statistics.median(cpu):.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        opening(Path(name))
        throughput(Path(name))
