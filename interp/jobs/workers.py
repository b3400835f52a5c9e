"""The engine for several processes of this machine, each on a GPU of its own as far as there are any."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from interp.errors import InterpError
from interp.jobs.local import Ended
from interp.jobs.serving import serve
from interp.jobs.work import AHEAD, Outcome, Recipe, Task

SPAWN = get_context("spawn")
START_DEATHS = 3
"""How many workers may die in a row before any has finished a task."""


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

    def prepare(self, *, tell: bool) -> str:  # noqa: D102
        slot = self._slots[0]
        self._spawn(slot)
        assert slot.pipe is not None
        try:
            kind, text = slot.ask(("prepare", tell))
        except EOFError:
            raise InterpError(
                f"the worker that was to prepare the run {slot.ending()}; see its messages above"
            ) from None
        if kind == "refused":
            raise InterpError(text)
        return str(text)

    @property
    def free(self) -> int:  # noqa: D102
        return sum(slot.free for slot in self._slots)

    def start(self, task: Task) -> None:  # noqa: D102
        # a process that has loaded its model before one that is still to do so, the one with the least to write first
        slot = min((s for s in self._slots if s.free), key=lambda s: (not s.alive, len(s.tasks)))
        if not slot.alive:
            self._spawn(slot)
        slot.begin(task)

    def wait(self, seconds: float) -> list[Ended]:  # noqa: D102
        busy = [slot for slot in self._slots if slot.tasks]
        until = [began + self._limit for slot in busy if slot.ready for began in slot.tasks.values()]
        pause = max(0.0, min([seconds, *(u - time.monotonic() for u in until)]))
        wait([slot.pipe for slot in busy if slot.pipe is not None], pause)
        return [ended for slot in busy for ended in self._look(slot)]

    def _look(self, slot: "_Slot") -> list[Ended]:
        """See which tasks a worker has finished, and whether it died, or took too long."""
        ended: list[Ended] = []
        try:
            while slot.pipe is not None and slot.pipe.poll():
                kind, *values = slot.pipe.recv()
                if kind == "refused":
                    raise InterpError(str(values[0]))
                if kind == "ready":
                    slot.get_ready()
                    self._deaths = 0
                elif kind == "computed":
                    slot.computing = False
                else:
                    ended.append(slot.take(*values))
        except (EOFError, OSError):
            text = f"the process that ran it {slot.ending()}"
            self._deaths += not slot.ready
            if self._deaths > START_DEATHS:
                raise InterpError(f"no worker can be started: {text}; try without --workers to see why") from None
            return [*ended, *slot.lose(Outcome("died", text))]
        late = [t for t, began in slot.tasks.items() if slot.ready and time.monotonic() - began > self._limit]
        if late:
            outcome = Outcome("hung", f"it took longer than {self._limit:g} s and was ended")
            return [*ended, *slot.lose(outcome, late[0])]
        return ended

    def drain(self) -> None:
        """Do nothing: a worker reports a task when its samples are durable."""

    def close(self, *, now: bool = False) -> None:  # noqa: D102
        for slot in self._slots:
            if not now and slot.alive and not slot.tasks and slot.pipe is not None:
                slot.pipe.send(("end",))
        for slot in self._slots:
            if not now and slot.process is not None and not slot.tasks:
                slot.process.join(10)
            slot.end()

    def _spawn(self, slot: "_Slot") -> None:
        slot.spawn(self._recipe, self._devices[slot.number % len(self._devices)] if self._devices else None)


class _Slot:
    """The place of one worker: its process, the pipe to it, and the tasks it is at."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: Any = None
        self.pipe: Connection | None = None
        self.tasks: dict[Task, float] = {}
        """In order, each with the time when it began; all but the last are computed, and being written."""
        self.computing = False
        self.ready = False
        """Whether it has its model; only then does the time limit count."""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    @property
    def free(self) -> bool:
        return not self.computing and len(self.tasks) < AHEAD

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
        self.tasks[task], self.computing = time.monotonic(), True
        with contextlib.suppress(OSError):  # it died while idle; `wait` will see
            self.pipe.send(("task", task))

    def get_ready(self) -> None:
        self.ready = True
        self.tasks = dict.fromkeys(self.tasks, time.monotonic())

    def take(self, task: Task, outcome: Outcome) -> Ended:
        """A task has ended."""
        return task, replace(outcome, seconds=time.monotonic() - self.tasks.pop(task))

    def lose(self, outcome: Outcome, guilty: Task | None = None) -> list[Ended]:
        """End the process: `outcome` is that of the task which it died of, the last one unless another is named.

        What it was still writing of an earlier task is no fault of that task.
        """
        tasks = list(self.tasks)
        self.end()
        guilty = guilty or (tasks[-1] if tasks else None)
        innocent = Outcome("lost", f"the process that wrote it ended: {outcome.text}")
        return [(task, outcome if task == guilty else innocent) for task in tasks]

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
        self.process = self.pipe = None
        self.tasks = {}
        self.computing = self.ready = False


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
