"""Every probe of single runs, asked of a run larger than the memory: `python -m tests.benchmarks.bench_probes`.

A run of `--gib` GiB is written, of four samples that repeat, and each probe asks it in a process of its own, whose address
space is limited to `--limit` GiB, libraries included: what does not fit raises MemoryError there.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from interp.probes import Probe, find_probe, probe
from interp.stores import Run, create_run, open_run, synthetic_run
from interp.stores.synthetic import _Maker

PROBES = ("mean", "frequency_energy", "guidance_norm", "attention_mass", "attention_entropy", "head_relevance",
          "token_attribution", "attention_convergence")  # fmt: skip
GIB = 2**30
SIZE = {"steps": 50, "heads": 8}


@probe("mean", needs={"attention": True})
def mean(run):
    """Mean attention to each token (1): a probe of a user's, which leaves the arrays as it gets them."""
    return run.attention().mean(["step", "layer", "head", "query_y", "query_x"]).assign_attrs(units="1")


def ask(path: str, name: str) -> None:
    """Ask one probe; print its time, the peak of resident memory and the size of what it read from."""
    which: Probe = mean if name == "mean" else find_probe(name)
    started, run = time.monotonic(), open_run(path)
    result = which(run)
    assert all(np.isfinite(v.values).any() for v in result.data_vars.values() if v.dtype.kind == "f")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), "peak": round(peak, 2)}))


def size_of(run: Run) -> int:
    """Bytes of all arrays of a run."""
    return sum(v.nbytes for node in run.tree.subtree for v in node.data_vars.values())


def write(path: Path, samples: int) -> None:
    """Write what `synthetic_run` would, but for the arrays of the first four samples, which repeat as the prompts do."""
    maker = _Maker(
        samples, SIZE["steps"], [str(h) for h in range(SIZE["heads"])], "prompt", ("baseline",), ("cond",), 0
    )
    with create_run(path, maker.layout([(64, 64)], frozenset())) as writer:
        arrays = writer.layout.arrays
        drawn = [
            {
                k: v.astype("float16") if v.nbytes > GIB / 16 else v
                for k, v in maker._values(writer, i).items()
                if k in arrays
            }
            for i in range(min(samples, 4))
        ]
        for i in range(samples):
            writer.begin(i)
            for name, value in drawn[i % 4].items():
                writer.put(i, name, value)
            writer.commit(i)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=10)
    parser.add_argument("--limit", type=float, default=4)
    parser.add_argument("--probes", nargs="+", default=PROBES)
    parser.add_argument("--ask", nargs=2, metavar=("RUN", "PROBE"), help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    if asked.ask:
        ask(*asked.ask)
        return
    one = size_of(synthetic_run(samples=1, grids=("64x64",), scores=False, **SIZE))
    samples = int(np.ceil(asked.gib * GIB / one))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        started = time.monotonic()
        write(path, samples)
        written = time.monotonic() - started
        print(f"{samples} samples, {size_of(open_run(path)) / GIB:.1f} GiB of arrays, written in {written:.0f} s")
        print(f"address space limited to {asked.limit:g} GiB", flush=True)
        for name in asked.probes:
            code = [sys.executable, "-m", "tests.benchmarks.bench_probes", "--ask", str(path), name]
            limit = int(asked.limit * GIB)
            done = subprocess.run(
                code, capture_output=True, text=True, check=False,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),  # noqa: B023
            )  # fmt: skip
            found = (
                json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip().splitlines()[-1:]}
            )
            print(f"{name:22} {found}", flush=True)


if __name__ == "__main__":
    main()
