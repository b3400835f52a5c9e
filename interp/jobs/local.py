"""Engines of one machine: the calling process itself, or a number of worker processes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from interp.errors import InterpError
from interp.jobs.work import Outcome, Recipe, Task, Work, perform, sentence
from interp.stores import RunWriter
from interp.stores.lock import share

Ended = tuple[Task, Outcome]
SPAWN = get_context("spawn")
START_DEATHS = 3
"""How many workers may die in a row before any has finished a task."""


class Engine(Protocol):
    """Where tasks are run; made for one run, by the process that has its lock."""

    def prepare(self) -> str:
        """Create the run or append to it, and say what is to be done."""

    @property
    def free(self) -> int:
        """How many tasks can be started now."""

    def start(self, task: Task) -> None:
        """Begin a task."""

    def wait(self, seconds: float) -> list[Ended]:
        """Return the tasks that have ended, at the latest after `seconds` an empty list."""

    def drain(self) -> None:
        """Wait until everything that has ended is durable."""

    def close(self, *, now: bool = False) -> None:
        """End everything; `now`: without finishing what is under way."""


class Embedded:
    """Runs tasks in this process, one after the other."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._work: Work | None = None
        self._writer: RunWriter | None = None
        self._ended: list[Ended] = []

    def prepare(self) -> str:  # noqa: D102
        self._work = self._recipe.make()
        return self._work.prepare()

    @property
    def free(self) -> int:  # noqa: D102
        return 0 if self._ended else 1

    def start(self, task: Task) -> None:  # noqa: D102
        assert self._work is not None
        if self._writer is None:
            self._writer = self._work.open(clean=True)
        began = time.perf_counter()
        outcome = perform(self._work, self._writer, task, drain=False)
        if outcome.kind == "raised":
            self._writer.drain()  # what the task did finish counts
        self._ended.append((task, replace(outcome, seconds=time.perf_counter() - began)))

    def wait(self, seconds: float) -> list[Ended]:  # noqa: D102
        ended, self._ended = self._ended, []
        return ended

    def drain(self) -> None:  # noqa: D102
        if self._writer is not None:
            self._writer.drain()

    def close(self, *, now: bool = False) -> None:  # noqa: D102
        if self._writer is not None:
            self._writer.abandon() if now else self._writer.close()
            self._writer = None
        if self._work is not None:
            self._work.close()


class Workers:
    """Runs tasks in `count` processes of this machine, each on its own GPU as far as there are any.

    A process that dies is replaced; one that takes longer than `limit` seconds for a task is ended. All end with the
    process that started them, however that ends.
    """

    def __init__(self, recipe: Recipe, count: int, limit: float) -> None:
        self._recipe, self._limit = recipe, limit
        _quiet_tracker()
        self._devices = devices()
        self._slots = [_Slot(k) for k in range(count)]
        self._deaths = 0

    def prepare(self) -> str:  # noqa: D102
        slot = self._slots[0]
        self._spawn(slot)
        assert slot.pipe is not None
        try:
            kind, text = slot.ask(("prepare",))
        except EOFError:
            raise InterpError(
                f"the worker that was to prepare the run {slot.ending()}; see its messages above"
            ) from None
        if kind == "refused":
            raise InterpError(text)
        return str(text)

    @property
    def free(self) -> int:  # noqa: D102
        return sum(slot.task is None for slot in self._slots)

    def start(self, task: Task) -> None:  # noqa: D102
        # a process that has loaded its model before one that is still to do so
        slot = min((s for s in self._slots if s.task is None), key=lambda s: not s.alive)
        if not slot.alive:
            self._spawn(slot)
        slot.begin(task)

    def wait(self, seconds: float) -> list[Ended]:  # noqa: D102
        busy = [slot for slot in self._slots if slot.task is not None]
        until = [slot.began + self._limit for slot in busy if slot.ready]
        pause = max(0.0, min([seconds, *(u - time.monotonic() for u in until)]))
        wait([slot.pipe for slot in busy if slot.pipe is not None], pause)
        return [ended for slot in busy if (ended := self._look(slot)) is not None]

    def _look(self, slot: "_Slot") -> Ended | None:
        """See whether a worker has finished its task, died of it, or taken too long."""
        task, pipe = slot.task, slot.pipe
        assert task is not None and pipe is not None
        seconds = time.monotonic() - slot.began
        try:
            if pipe.poll():
                kind, value = pipe.recv()
                if kind == "refused":
                    raise InterpError(str(value))
                if kind == "ready":
                    slot.ready, slot.began, self._deaths = True, time.monotonic(), 0
                    return None
                slot.task = None
                return task, replace(value, seconds=seconds)
        except (EOFError, OSError):
            text = f"the process that ran it {slot.ending()}"
            self._deaths += not slot.ready
            slot.end()
            if self._deaths > START_DEATHS:
                raise InterpError(f"no worker can be started: {text}; try without --workers to see why") from None
            return task, Outcome("died", text, seconds=seconds)
        if slot.ready and seconds > self._limit:
            slot.end()
            return task, Outcome("hung", f"it took longer than {self._limit:g} s and was ended", seconds=seconds)
        return None

    def drain(self) -> None:
        """Do nothing: a worker reports a task when its samples are durable."""

    def close(self, *, now: bool = False) -> None:  # noqa: D102
        for slot in self._slots:
            if not now and slot.alive and slot.task is None and slot.pipe is not None:
                slot.pipe.send(("end",))
        for slot in self._slots:
            if not now and slot.process is not None and slot.task is None:
                slot.process.join(10)
            slot.end()

    def _spawn(self, slot: "_Slot") -> None:
        slot.spawn(self._recipe, self._devices[slot.number % len(self._devices)] if self._devices else None)


class _Slot:
    """The place of one worker: its process, the pipe to it, and the task it is at."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: Any = None
        self.pipe: Connection | None = None
        self.task: Task | None = None
        self.began = 0.0
        self.ready = False
        """Whether it has its model; only then does the time limit count."""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def spawn(self, recipe: Recipe, device: str | None) -> None:
        self.end()
        self.pipe, theirs = SPAWN.Pipe()
        arguments = (theirs, recipe.function, recipe.arguments, device)
        self.process = SPAWN.Process(target=serve, args=arguments, name=f"interp-worker-{self.number}", daemon=False)
        self.process.start()
        theirs.close()

    def ask(self, message: tuple) -> tuple[str, Any]:
        assert self.pipe is not None
        self.pipe.send(message)
        return self.pipe.recv()

    def begin(self, task: Task) -> None:
        assert self.pipe is not None
        self.task, self.began = task, time.monotonic()
        with contextlib.suppress(OSError):  # it died while idle; `wait` will see
            self.pipe.send(("task", task))

    def ending(self) -> str:
        """Say how the process ended."""
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with code {code}"

    def end(self) -> None:
        if self.pipe is not None:
            self.pipe.close()
        if self.process is not None:
            if self.process.is_alive():
                self.process.kill()
            self.process.join()
            self.process.close()
        self.process = self.pipe = self.task = None
        self.ready = False


def _quiet_tracker() -> None:
    """Start the process that cleans up after killed workers; that it does need not be told on stderr each time."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    try:
        resource_tracker.ensure_running()
    finally:
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def devices() -> list[str]:
    """Return the GPUs to hand out, as values of CUDA_VISIBLE_DEVICES; an empty list where there are none.

    Nothing of CUDA is started here: the workers shall do that, each with its own device.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [d.strip() for d in named.split(",") if d.strip() and d.strip() != "-1"]
    if sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
        return []  # spares the driver the import of torch
    import torch

    return [str(k) for k in range(torch.cuda.device_count())]


def serve(pipe: Connection, function: str, arguments: dict[str, Any], device: str | None) -> None:
    """Be a worker: prepare the run or perform tasks, as the pipe says, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    work: Work | None = None
    writer: RunWriter | None = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message[0] == "end":
            break
        try:
            work = work or Recipe(function, arguments).make()
            if message[0] == "prepare":
                pipe.send(("prepared", work.prepare()))
                continue
            if writer is None:
                handle = share(work.store)  # noqa: F841  held until the process ends
                writer = work.open(clean=False)
                pipe.send(("ready", None))
        except InterpError as error:
            pipe.send(("refused", sentence(error)))
            continue
        pipe.send(("ended", perform(work, writer, message[1])))
    if writer is not None:
        writer.close()
    if work is not None:
        work.close()


def _end_with(parent: Any) -> None:
    """End this process at once when its parent has ended: nobody would take its results."""
    wait([parent.sentinel])
    os._exit(1)


def open_engine(recipe: Recipe, workers: int, limit: float) -> Embedded | Workers:
    """Return the engine for `workers` processes; 0 is this one."""
    return Workers(recipe, workers, limit) if workers else Embedded(recipe)


__all__: Sequence[str] = ["Embedded", "Engine", "Workers", "devices", "open_engine", "serve"]
