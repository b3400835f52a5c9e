"""Where tasks run: what every engine does, and the plainest, the calling process itself."""

import time
from dataclasses import replace
from typing import Protocol

from interp.jobs.work import Outcome, Recipe, Task, Work, perform
from interp.stores import RunWriter

Ended = tuple[Task, Outcome]


class Engine(Protocol):
    """Where tasks are run; made for one run, by the process that has its lock."""

    def prepare(self, *, tell: bool) -> str:
        """Create the run or append to it, and say what is to be done, if that is to be told."""

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

    def prepare(self, *, tell: bool) -> str:  # noqa: D102
        self._work = self._recipe.make()
        return self._work.prepare(tell=tell)

    @property
    def free(self) -> int:  # noqa: D102
        return 0 if self._ended else 1

    def start(self, task: Task) -> None:  # noqa: D102
        assert self._work is not None
        if self._writer is None:
            self._writer = self._work.open(clean=True)
        began = time.perf_counter()
        outcome = perform(self._work, self._writer, task)
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
