"""What is still to be done, in which order, and what becomes of tasks that fail."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from interp.jobs.work import Outcome, Task, without
from interp.stores import DONE, FAILED, TODO

TRIES = 2
"""How often a process may die of one task before the task is cut in two, or its only sample given up."""


@dataclass(frozen=True)
class Failure:
    """A sample that was given up, and why."""

    sample: int
    text: str


class Agenda:
    """Tasks of a run by batch. The partition is the recorded one, whatever happens.

    A task that fails is cut in two until the failing samples stand alone; the others' numbers stay what they would
    have been, since each part is computed at the batch's full size. No two tasks that write one chunk of `status`
    are under way at once.
    """

    def __init__(self, batch: Sequence[int] | np.ndarray, status: np.ndarray, rows: int, *, retry_failed: bool) -> None:
        wanted = (TODO, FAILED) if retry_failed else (TODO,)
        members: dict[int, list[int]] = {}
        for i, number in enumerate(np.asarray(batch).tolist()):
            members.setdefault(number, []).append(i)
        self._rows = rows
        self._tasks: deque[Task] = deque()
        self._busy: set[int] = set()
        for number, samples in members.items():
            waiting = tuple(i for i in samples if status[i] in wanted)
            if waiting:
                self._tasks.append(Task(number, tuple(samples), tuple(samples), waiting))

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """Number of samples in tasks that have not been started."""
        return sum(len(task.waiting) for task in self._tasks)

    def next(self) -> Task | None:
        """Return a task that can start now, or None; it counts as started."""
        for k, task in enumerate(self._tasks):
            chunks = self._chunks(task)
            if not chunks & self._busy:
                del self._tasks[k]
                self._busy |= chunks
                return task
        return None

    def settle(self, task: Task, outcome: Outcome, done: Collection[int] = ()) -> list[Failure]:
        """Take a task that has ended; `done` are the samples of it that were written. Return what is given up."""
        self._busy -= self._chunks(task)
        if outcome.kind in ("done", "stop"):
            return []
        left = without(task, frozenset(done))
        if not left.waiting:
            return []
        if outcome.kind == "lost":
            self._tasks.appendleft(left)
            return []
        if outcome.kind == "died" and left.deaths + 1 < TRIES:
            self._tasks.appendleft(replace(left, deaths=left.deaths + 1))
            return []
        if len(left.members) == 1:
            return [Failure(i, outcome.text) for i in left.waiting]
        half = (len(left.members) + 1) // 2
        for members in (left.members[half:], left.members[:half]):
            waiting = tuple(i for i in left.waiting if i in members)
            if waiting:
                self._tasks.appendleft(Task(left.batch, left.samples, members, waiting, left.deaths))
        return []

    def _chunks(self, task: Task) -> set[int]:
        return {i // self._rows for i in task.waiting}


__all__ = ["DONE", "FAILED", "TRIES", "Agenda", "Failure"]
