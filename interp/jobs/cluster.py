"""The engine for a Dask cluster: a bounded window of tasks on workers that somebody else started.

Dask is used for `submit` alone. What it may not do is hold tasks that no worker can begin, or keep results: then the
death of one worker would take others' tasks along. A worker computes its next task while the last one is being written:
then it *secedes* from its place, and says so.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.jobs.local import Ended
from interp.jobs.work import AHEAD, Outcome, Recipe, Task, Work, perform, sentence, settled
from interp.stores import RunWriter, StoreError
from interp.stores.lock import share

PATIENCE = 30.0
"""Seconds to wait for a scheduler."""


class Cluster:
    """Runs tasks on the workers of a Dask scheduler, on each one at a time, and one being written.

    With a scheduler file that does not exist yet, the scheduler is started here, and ends with the job.
    """

    def __init__(self, recipe: Recipe, address: str | None, file: str | None, limit: float) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise InterpError("a Dask cluster needs distributed: pip install 'interp-diffusion[cluster]'") from error
        self._recipe, self._limit = recipe, limit
        self._running: dict[str, tuple[Any, Task, float]] = {}
        """By key: the future, the task, and when it began."""
        self._computed: set[str] = set()
        """Keys of tasks that are being written."""
        self._news = threading.Event()
        self._topic = f"interp-{os.getpid()}-{time.monotonic_ns()}"
        self._scheduler = _start_scheduler(Path(file)) if file and not Path(file).exists() else None
        try:
            self._client = (
                Client(address, timeout=PATIENCE) if address else Client(scheduler_file=file, timeout=PATIENCE)
            )
        except (OSError, TimeoutError, ValueError) as error:
            if self._scheduler is not None:
                self._scheduler.kill()
            advice = "; delete that file, and one is started" if file else ""
            raise InterpError(f"no Dask scheduler answers at {address or file}: {sentence(error)}{advice}") from None
        self._client.subscribe_topic(self._topic, self._take_news)

    def prepare(self, *, tell: bool) -> str:  # noqa: D102
        if not self._threads():
            print("waiting for the first Dask worker", file=sys.stderr)  # noqa: T201
        future = self._client.submit(prepare_there, self._recipe.function, self._recipe.arguments, tell, pure=False)
        try:
            kind, text = future.result()
        except Exception as error:
            raise InterpError(f"the worker that was to prepare the run failed: {sentence(error)}") from error
        finally:
            future.release()
        if kind == "refused":
            raise InterpError(text)
        return str(text)

    def _threads(self) -> dict[str, int]:
        found: dict[str, int] = self._client.nthreads()
        if any(n > 1 for n in found.values()):
            raise InterpError("a pipeline runs one batch at a time: start the Dask workers with --nthreads 1")
        return found

    def _take_news(self, event: tuple[float, str]) -> None:
        """A worker has computed a task, which it is writing now. In a thread of Dask's."""
        self._computed.add(event[1])
        self._news.set()

    @property
    def free(self) -> int:  # noqa: D102
        places, writing = len(self._threads()), sum(key in self._computed for key in list(self._running))
        return max(0, min(places - (len(self._running) - writing), AHEAD * places - len(self._running)))

    def start(self, task: Task) -> None:  # noqa: D102
        key = f"{self._topic}-{task.batch}-{time.monotonic_ns()}"
        future = self._client.submit(
            perform_there, self._recipe.function, self._recipe.arguments, task, self._limit, (self._topic, key),
            key=key, pure=False, retries=0,
        )  # fmt: skip
        self._running[key] = future, task, time.monotonic()
        future.add_done_callback(lambda _: self._news.set())

    def wait(self, seconds: float) -> list[Ended]:  # noqa: D102
        if self._running:
            self._news.wait(seconds)
            self._news.clear()
        else:
            time.sleep(min(seconds, 0.2))
        return [self._ended(key) for key, (future, *_) in list(self._running.items()) if future.done()]

    def _ended(self, key: str) -> Ended:
        future, task, began = self._running.pop(key)
        computed, seconds = key in self._computed, time.monotonic() - began
        self._computed.discard(key)
        try:
            outcome = future.result()
        except Exception as error:  # KilledWorker, a lost connection, …
            text = f"the worker that ran it died or took longer than {self._limit:g} s: {sentence(error)}"
            outcome = Outcome("lost" if computed else "died", text)  # what it died of came later
        finally:
            future.release()
        if outcome.kind == "refused":
            raise InterpError(outcome.text)
        return task, Outcome(outcome.kind, outcome.text, outcome.notes, seconds)

    def drain(self) -> None:
        """Do nothing: a worker reports a task when its samples are durable."""

    def close(self, *, now: bool = False) -> None:  # noqa: D102
        for future, *_ in self._running.values():
            future.cancel()
        with contextlib.suppress(Exception):  # it may be gone already
            if self._scheduler is not None:
                self._client.shutdown()
            else:
                self._client.run(forget_there, self._recipe.function, self._recipe.arguments)
        with contextlib.suppress(Exception):
            self._client.close(timeout=2)
        if self._scheduler is not None:
            self._scheduler.terminate()
            self._scheduler.wait(10)


def _start_scheduler(file: Path) -> subprocess.Popen:
    """Start a Dask scheduler that writes its address to `file`, and that ends when it has nothing to do for long."""
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--scheduler-file", str(file), "--port", "0"]
    settings = {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"
    }  # what a dead worker's task becomes is ours to say
    process = subprocess.Popen(
        [*command, "--no-dashboard", "--idle-timeout", "15 minutes"],
        stderr=subprocess.DEVNULL,
        env=os.environ | settings,
    )
    until = time.monotonic() + PATIENCE
    while not file.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise InterpError(f"the Dask scheduler did not start; try: dask scheduler --scheduler-file {file}")
        time.sleep(0.05)
    return process


# What follows runs on the workers.


@dataclass
class _Opened:
    """What a worker keeps from one task to the next: its work, and the writer that it opened for a driver."""

    work: Work
    writer: RunWriter | None = None
    driver: str = ""

    def writer_for(self, driver: str) -> RunWriter:
        """Return a writer of the run; a new one for another driver, since the run may have changed meanwhile."""
        if self.writer is not None and self.driver != driver:
            self.close()
        if self.writer is None:
            self.writer, self.driver = self.work.open(clean=False), driver
        return self.writer

    def close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            with contextlib.suppress(StoreError):  # told when it happened
                writer.close()


_OPENED: dict[str, _Opened] = {}


def _key(function: str, arguments: dict[str, Any]) -> str:
    return json.dumps([function, arguments], sort_keys=True)


def prepare_there(function: str, arguments: dict[str, Any], tell: bool) -> tuple[str, str]:
    """Prepare the run, on a worker; return ("prepared", plan) or ("refused", why)."""
    key = _key(function, arguments)
    try:
        opened = _OPENED.get(key) or _Opened(Recipe(function, arguments).make())
        opened.close()  # that of a driver which was killed
        text = opened.work.prepare(tell=tell)
    except InterpError as error:
        return "refused", sentence(error)
    _OPENED[key] = opened
    return "prepared", text


def perform_there(function: str, arguments: dict[str, Any], task: Task, limit: float, name: tuple[str, str]) -> Outcome:
    """Perform a task, on a worker that keeps its pipeline for the next; a batch that hangs ends the process.

    Once it is computed, the worker takes the next one, and a thread waits here until the samples are durable. `name`:
    the topic under which that is told, and the task's key.
    """
    key = _key(function, arguments)
    try:
        opened = _OPENED.get(key) or _Opened(Recipe(function, arguments).make())
    except InterpError as error:
        return Outcome("refused", sentence(error))
    handle = share(opened.work.store)  # until all is written: the worker may outlive the job
    try:
        writer = opened.writer_for(name[0])
        _OPENED[key] = opened
        return _perform(opened.work, writer, task, limit, name)
    except InterpError as error:
        return Outcome("refused", sentence(error))
    finally:
        if handle is not None:
            os.close(handle)


def _perform(work: Work, writer: RunWriter, task: Task, limit: float, name: tuple[str, str]) -> Outcome:
    from distributed import get_worker, secede

    with contextlib.suppress(OSError, ValueError):  # a stderr that is no file
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        outcome = perform(work, writer, task)
    finally:
        faulthandler.cancel_dump_traceback_later()
    try:
        durable = writer.mark()
    except StoreError as error:  # nothing can be written any more
        return Outcome("stop", sentence(error), outcome.notes)
    late = threading.Timer(limit, os._exit, (1,))
    late.start()
    get_worker().log_event(name[0], name[1])
    secede()
    try:
        return settled(outcome, durable)
    finally:
        late.cancel()


def forget_there(function: str, arguments: dict[str, Any]) -> None:
    """Let go of a run, on a worker that stays."""
    opened = _OPENED.pop(_key(function, arguments), None)
    if opened is not None:
        opened.close()
        opened.work.close()
