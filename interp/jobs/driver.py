"""The loop of a job: hand out tasks, take what comes back, keep the run's `status` the only truth."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from interp.errors import InterpError
from interp.jobs.agenda import Agenda, Failure
from interp.jobs.local import Embedded, Engine
from interp.jobs.spec import Job
from interp.jobs.work import Recipe, Task
from interp.jobs.workers import Workers
from interp.stores import DONE, FAILED
from interp.stores.lock import RunLock
from interp.stores.status import column_of, set_status, status_of, status_rows, sweep_run

LIMIT = 3600.0
"""Seconds that a worker may take for a batch, unless the caller says otherwise."""

Say = Callable[[str], None]


@dataclass
class Report:
    """How a job ended: samples in the run, how many are done, failed, and to do, and what this call did."""

    path: Path
    samples: int
    done: int
    failed: int
    made: int
    """Samples that this call finished."""
    seconds: float
    failures: list[Failure] = field(default_factory=list)
    """What this call gave up, and why."""
    timings: dict[int, float] = field(default_factory=dict)
    """Wall seconds of each batch that this call ran as planned, in the order in which they ended."""

    @property
    def code(self) -> int:
        """Exit code: 0 all done, 1 some failed."""
        return 1 if self.failed or self.failures else 0

    def __str__(self) -> str:
        rate = f", {self.made / self.seconds:.2f} samples/s" if self.made and self.seconds else ""
        lines = [f"{self.path}: {self.done} of {self.samples} samples done, {self.made} by this call{rate}"]
        if self.failed:
            lines.append(f"{self.failed} failed; their `error` says why, and --retry-failed tries them again")
        return "\n".join(lines)


def run_job(
    job: Job,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    scheduler_file: str | None = None,
    limit: float = LIMIT,
    retry_failed: bool = False,
    progress: bool = True,
) -> Report:
    """Run a job, or go on with it: the samples that the run at `job.store` still lacks.

    Args:
        job: From `read_job`, or made in Python.
        workers: Processes of this machine, each on a GPU of its own as far as there are any; 0 is this process.
        scheduler, scheduler_file: Address or file of a Dask scheduler, instead of `workers` (extra `[cluster]`).
        limit: Seconds that a worker may take for a batch before it is ended.
        retry_failed: Try failed samples again.
        progress: Print the plan and show a progress bar.

    Raises:
        InterpError: the job is another than the one that made the run, another process writes it, or its model or
            place is not there; nothing was changed.
    """
    recipe = Recipe("interp.jobs.tracing:TraceWork", {"job": job.model_dump(mode="json"), "store": str(job.path)})
    report = drive(
        recipe, job.path, workers=workers, scheduler=scheduler, scheduler_file=scheduler_file, limit=limit,
        retry_failed=retry_failed, progress=progress,
    )  # fmt: skip
    if report.done and (job.scores or job.probes):
        from interp.jobs.afterwards import finish

        finish(job, report, say=_say if progress else _silent, progress=progress)
    return report


def drive(
    recipe: Recipe,
    store: Path,
    *,
    workers: int = 0,
    scheduler: str | None = None,
    scheduler_file: str | None = None,
    limit: float = LIMIT,
    retry_failed: bool = False,
    progress: bool = True,
) -> Report:
    """Do the work of `recipe` on the run at `store` with whichever engine is asked for."""
    if workers < 0 or limit <= 0:
        raise InterpError(f"workers={workers}, limit={limit:g}: give 0 or more workers and more than 0 seconds")
    say = _say if progress else _silent
    with RunLock(store):
        engine: Engine
        if scheduler or scheduler_file:
            from interp.jobs.cluster import Cluster

            engine = Cluster(recipe, scheduler, scheduler_file, limit)
        else:
            engine = Workers(recipe, workers, limit) if workers else Embedded(recipe)
        try:
            say(engine.prepare(tell=progress))
            report = _drive(engine, store, retry_failed=retry_failed, progress=progress, say=say)
        except BaseException:
            engine.close(now=True)
            raise
        engine.close()
        if workers:
            sweep_run(store)
        return report


def _drive(engine: Engine, store: Path, *, retry_failed: bool, progress: bool, say: Say) -> Report:
    sweep_run(store)
    status = status_of(store)
    agenda = Agenda(column_of(store, "batch"), status, status_rows(store), retry_failed=retry_failed)
    total, began = len(status), time.perf_counter()
    failures: list[Failure] = []
    timings: dict[int, float] = {}
    made = running = 0
    with tqdm(total=total, initial=total - agenda.waiting, unit="sample", disable=not progress, smoothing=0.1) as bar:
        while len(agenda) or running:
            while engine.free and (task := agenda.next()) is not None:
                engine.start(task)
                running += 1
            for task, outcome in engine.wait(1.0):
                running -= 1
                for note in outcome.notes:
                    say(note)
                if outcome.kind == "stop":
                    raise InterpError(outcome.text)
                done = {*task.waiting} if outcome.kind == "done" else _done(store, task)
                lost = agenda.settle(task, outcome, done)
                if lost:
                    set_status(store, {f.sample: (FAILED, f.text) for f in lost})
                    failures += lost
                    for failure in lost:
                        say(f"sample {failure.sample} failed: {failure.text}")
                elif outcome.kind in ("died", "hung"):
                    say(f"batch {task.batch}: {outcome.text}; what it lacks is tried again")
                if outcome.kind == "done" and not outcome.notes and task.members == task.samples:
                    timings[task.batch] = outcome.seconds
                made += len(done)
                bar.update(len(done) + len(lost))
    engine.drain()
    status = status_of(store)
    return Report(
        store, total, int((status == DONE).sum()), int((status == FAILED).sum()), made, time.perf_counter() - began, failures,
        timings,
    )  # fmt: skip


def _done(store: Path, task: Task) -> set[int]:
    """Which samples of a task that failed were written all the same."""
    status = status_of(store)
    return {i for i in task.waiting if status[i] == DONE}


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _silent(text: str) -> None:
    pass
