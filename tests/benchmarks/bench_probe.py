"""What memory a probe takes of a run larger than it should hold: `interp probe` on more and more samples.

    python -m tests.benchmarks.bench_probe [folder] [samples …]

A sample is 158 MB of attention (50 steps, 5 layers, 77 tokens, 64x64). Each question is asked in a process of its own.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from interp.stores import create_run
from tests.benchmarks.bench_store import STEPS, attention, thousand

MEAN = '''
from interp.probes import probe

@probe("mean_map")
def mean_map(run):
    """Mean map of each token over steps, layers and heads, lazily."""
    maps = run.attention("64x64").sel(branch="cond", drop=True)
    return maps.astype("float32").mean(["step", "layer", "head"]).assign_attrs(units="1")
'''
ASK = """
import sys, time
from interp.cli import app
start = time.perf_counter()
app(["probe", sys.argv[2], sys.argv[1]], standalone_mode=False)
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
print(f"{time.perf_counter() - start:.1f} s, peak memory of the process {peak:.0f} MiB", file=sys.stderr)
"""


def write(path, n):
    """Write `n` samples of the same attention."""
    probs = np.concatenate([attention(10, 5, 64)] * (STEPS // 10))
    layout = thousand(n)
    layout = replace(layout, groups={"attention/64x64": layout.groups["attention/64x64"]})
    with create_run(path, layout) as writer:
        for i in range(n):
            writer.begin(i)
            writer.put(i, "attention/64x64/probs", probs)
            writer.commit(i)
    return n * probs.nbytes / 2**20


def main():
    folder, sizes = sys.argv[1] if len(sys.argv) > 1 else None, [int(n) for n in sys.argv[2:]] or [2, 8, 16]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "mean_map.py").write_text(MEAN)
        for n in sizes:
            path = Path(name) / f"{n}.zarr"
            start = time.perf_counter()
            size = write(path, n)
            print(f"{n} samples, {size:.0f} MiB, written in {time.perf_counter() - start:.1f} s", flush=True)
            for probe in ("attention_mass", str(Path(name) / "mean_map.py")):
                done = subprocess.run(
                    [sys.executable, "-c", ASK, str(path), probe], capture_output=True, text=True, check=True
                )
                *bars, last = done.stderr.strip().splitlines()
                print(f"  {Path(probe).stem}: {last}; bar shown: {any('%' in line for line in bars)}", flush=True)


if __name__ == "__main__":
    main()
