"""A job without a model: small samples drawn from their number, and faults on order. Also a program of its own.

`python -m tests.jobs.null STORE '{"n": 40}' --workers 2` drives it as `interp run` drives a real one.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from interp.errors import InterpError
from interp.jobs.work import Recipe, Work
from interp.stores import create_run
from interp.stores.small import small_layout, small_values


class NullWork(Work):
    """Samples whose values depend on nothing but their number; `faults` maps a sample to what goes wrong with it.

    Faults: "raise", "die" (the process is killed), "die once", "hang", "memory" (more than one sample at a time).
    """

    def __init__(self, store, n=8, batch=2, pause=0.0, faults=None, steps=13, log=None, jump=False, disk=0.0):
        self.store = Path(store)
        self.layout = small_layout(n=n, steps=steps)
        self.layout.samples["batch"] = [i // batch for i in range(n)]
        self.pause, self.log, self.disk = pause, log, disk
        if jump:
            jumping_clock()
        self.faults = {int(k): v for k, v in (faults or {}).items()}

    def describe(self):
        return f"{len(self.layout)} samples of nothing"

    def prepare(self, *, tell):
        if not self.store.exists():
            create_run(self.store, self.layout, locked=True).close()
        return self.describe()

    def open(self, *, clean):
        if self.disk:
            slow_disk(self.disk, self.log)
        return create_run(self.store, self.layout, clean=clean, locked=True)

    def run(self, writer, rows, places, waiting):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{os.getpid()} {' '.join(map(str, rows))}\n")
        for i in rows:
            self._fault(i, len(rows))
        for row, i in zip(rows, places, strict=True):
            if i not in waiting:
                continue
            assert row == i
            writer.begin(i)
            for name, value in small_values(self.layout, i).items():
                if name == "images/thumb":
                    continue
                if writer.layout.arrays[name].steps:
                    for block in value:
                        writer.append(i, name, block)
                        time.sleep(self.pause)
                else:
                    writer.put(i, name, value)
            writer.commit(i)

    def _fault(self, i, together):
        fault = self.faults.get(i)
        if fault == "raise":
            raise ValueError(f"sample {i} is no good\nand never was")
        if fault == "raise ours":
            raise InterpError(f"sample {i} is ours")
        if fault == "memory" and together > 1:
            raise MemoryError("too many")
        if fault == "hang":
            time.sleep(600)
        if fault == "die once":
            flag = Path(f"{self.store}.died")
            if flag.exists():
                return
            flag.touch()
        if fault and fault.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)


def slow_disk(seconds, log):
    """Let this process have a disk that takes `seconds` each time."""
    from interp.stores import disk

    real = disk.publish

    def publish(files):
        time.sleep(seconds)
        real(files)
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} written\n")

    disk.publish = publish


def jumping_clock():
    """Let this process live with a clock that is set a day back and forth all the time."""
    real, jumps = time.time, iter(range(10**9))
    time.time = lambda: real() + (-1) ** next(jumps) * 86400


def recipe(store, **options):
    return Recipe("tests.jobs.null:NullWork", {"store": str(store), **options})


def forked(words, folder):
    """Be a driver as if started with these words, in a fork of a process that has imported this module."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores Ctrl-C
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["null", *words]
    main()


def main():
    import json

    from interp.jobs.driver import LIMIT, drive  # which a worker does not need

    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("options", nargs="?", default="{}")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--retry-failed", action="store_true")
    given = parser.parse_args()
    options = json.loads(given.options)
    if options.get("jump"):
        jumping_clock()
    try:
        report = drive(
            recipe(given.store, **options), Path(given.store), workers=given.workers, limit=given.limit,
            retry_failed=given.retry_failed,
        )  # fmt: skip
    except InterpError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(report)
    sys.exit(report.code)


if __name__ == "__main__":
    main()
