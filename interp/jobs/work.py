"""What a job consists of: `Work` that knows how to run samples, `Task`s that say which, and their `Outcome`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from interp.errors import InterpError
from interp.stores import RunWriter, StoreError

logger = logging.getLogger(__name__)

AHEAD = 2
"""Tasks that a worker has at most: one being computed, one being written."""


@dataclass(frozen=True)
class Task:
    """A batch to run, in whole or in part.

    Args:
        batch: Its number in the run's column `batch`.
        samples: All its samples, in order: with them its size, on which rounding depends.
        members: Those that are computed; the places of others are taken by copies of the first member.
        waiting: Those that are to be written.
        deaths: How often a process has died of it.
    """

    batch: int
    samples: tuple[int, ...]
    members: tuple[int, ...]
    waiting: tuple[int, ...]
    deaths: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    `done`; `raised`: an error of the samples; `died`, `hung`: the process ended, or was ended; `stop`: nothing can be
    written any more; `refused`: the worker cannot do this job; `lost`: another task ended the process.
    """

    kind: Literal["done", "raised", "died", "hung", "lost", "stop", "refused"]
    text: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


class Work(ABC):
    """How the samples of one run are made. Each process opens its own, from a `Recipe`."""

    store: Path
    limit: int | None = None
    """Most samples at a time, once memory has run out; None as long as it has not."""

    @abstractmethod
    def describe(self) -> str:
        """Say in words what is to be done, without touching anything."""

    @abstractmethod
    def prepare(self, *, tell: bool) -> str:
        """Create the run, or append to it what is new; return `describe`, or nothing unless somebody is to be told.

        For the one process that starts the job.
        """

    @abstractmethod
    def open(self, *, clean: bool) -> RunWriter:
        """Return a writer of the prepared run; `clean=False` for workers."""

    @abstractmethod
    def run(self, writer: RunWriter, rows: Sequence[int], places: Sequence[int], waiting: frozenset[int]) -> None:
        """Run samples `rows` together and write and commit those of `places` that are waiting.

        `rows[k]` is `places[k]`, or the sample that stands in for it.
        """

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that fewer samples at a time would do."""
        return isinstance(error, MemoryError)

    def recover(self) -> None:  # noqa: B027
        """Give memory back after it ran out."""

    def close(self) -> None:  # noqa: B027
        """Undo what `open` set up."""


@dataclass(frozen=True)
class Recipe:
    """How any process comes by its `Work`: an importable callable, and JSON values for it. No code travels."""

    function: str
    """`module:name`."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Work:
        """Import the callable and call it."""
        module, _, name = self.function.partition(":")
        work = getattr(import_module(module), name)(**self.arguments)
        if not isinstance(work, Work):
            raise InterpError(f"{self.function} gave a {type(work).__name__}, not a Work")
        return work


def perform(work: Work, writer: RunWriter, task: Task) -> Outcome:
    """Compute one task, which may still be written; whatever goes wrong with its samples comes back as an outcome."""
    notes: list[str] = []
    try:
        _run(work, writer, task, notes)
    except Exception as error:  # a model may fail in any way
        if writer.broken:
            return Outcome("stop", sentence(error))
        for i in task.waiting:
            writer.drop(i)
        logger.debug("batch %s failed", task.batch, exc_info=True)
        return Outcome("raised", sentence(error), tuple(notes))
    finally:
        writer.remark = ""
    return Outcome("done", notes=tuple(notes))


def _run(work: Work, writer: RunWriter, task: Task, notes: list[str]) -> None:
    """Run a task in parts of at most `work.limit` samples."""
    waiting = frozenset(task.waiting)
    left = [i for i in task.samples if i in task.members]
    first = left[0]
    places = list(task.samples)
    while places:
        size = min(work.limit or len(places), len(places))
        part = places[:size]
        if not waiting & {*part}:
            places = places[size:]
            continue
        cut = size < len(task.samples)
        writer.remark = f"ran {size} at a time instead of {len(task.samples)}: memory ran out" if cut else ""
        rows = [i if i in task.members else first for i in part]
        error: BaseException | None = None
        try:
            work.run(writer, rows, part, waiting & {*part})
        except Exception as raised:
            if not work.is_out_of_memory(raised):
                raise
            if size == 1:
                raise InterpError(f"memory ran out with one sample at a time: {sentence(raised)}") from raised
            error = raised
        if error is None:
            places = places[size:]
            continue
        del error  # its frames hold the tensors
        work.limit = size // 2
        work.recover()
        notes.append(
            f"memory ran out with {size} samples at a time; going on with {work.limit}. Their numbers may differ in "
            "rounding from a run in batches of the planned size; their `error` says so"
        )


def sentence(error: BaseException) -> str:
    """Return an error as one line: its type, unless it is the user's, and the first line of its text."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, InterpError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def settled(outcome: Outcome, durable: Callable[[], None]) -> Outcome:
    """Return the outcome of a task once its samples are durable, for which `durable` waits."""
    try:
        durable()
    except StoreError as error:
        return Outcome("stop", sentence(error), outcome.notes)
    return outcome


def without(task: Task, done: frozenset[int]) -> Task:
    """Return the task less what has been written by now."""
    return replace(task, waiting=tuple(i for i in task.waiting if i not in done))
