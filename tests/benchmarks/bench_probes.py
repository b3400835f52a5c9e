"""Every probe of single runs, asked of a run larger than the memory: `python -m tests.benchmarks.bench_probes`.

A run of `--gib` GiB is written, and each probe asks it in a process of its own, whose address space is limited to `--limit`
GiB, libraries included: what does not fit raises MemoryError there.
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
from interp.stores import open_run, synthetic_run

PROBES = ("mean", "frequency_energy", "guidance_norm", "attention_mass", "attention_entropy", "head_relevance",
          "token_attribution", "attention_convergence")  # fmt: skip
GIB = 2**30


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
    size = {"steps": 50, "heads": 8, "grids": ("64x64",), "scores": False}
    one = sum(v.nbytes for node in synthetic_run(samples=1, **size).tree.subtree for v in node.data_vars.values())
    samples = int(np.ceil(asked.gib * GIB / one))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        synthetic_run(samples=samples, path=path, **size)
        whole = sum(v.nbytes for node in open_run(path).tree.subtree for v in node.data_vars.values()) / GIB
        print(f"{samples} samples, {whole:.1f} GiB of arrays; address space limited to {asked.limit:g} GiB")
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
