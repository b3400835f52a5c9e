"""The work of a job file: a pipeline traced over the samples of a run."""

import gc
import inspect
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from interp.budget import size
from interp.capture import Capture
from interp.errors import InterpError, nearest
from interp.interventions import from_spec
from interp.jobs.afterwards import check_probes
from interp.jobs.extension import Extension, compare, stored_plan
from interp.jobs.spec import Job
from interp.jobs.work import Work
from interp.loading import load
from interp.planning import Plan, plan
from interp.stores import RunWriter, create_run
from interp.tracing import check_scores, run_batch


class TraceWork(Work):
    """Traces the samples of a job; what a sample is, is what the run's table says."""

    def __init__(self, job: dict[str, Any], store: str) -> None:
        self.job = Job.model_validate(job, strict=False)
        self.store = Path(store)
        self._plan: Plan | None = None
        self._quiet: dict[str, Any] | None = None
        self._scheduler: Any = None

    @cached_property
    def pipe(self) -> Any:
        """The pipeline, with the job's scheduler."""
        dtype = getattr(torch, self.job.dtype) if self.job.dtype else None
        pipe = load(self.job.model, dtype=dtype, revision=self.job.revision)
        if self.job.scheduler is not None:
            self._scheduler, pipe.scheduler = pipe.scheduler, _scheduler(pipe, self.job.scheduler)
        return pipe

    @cached_property
    def asked(self) -> Plan:
        """The plan of the job file, as if there were no run yet."""
        job = self.job
        height, width = job.size or (None, None)
        return plan(
            self.pipe,
            job.prompts,
            seeds=cast("list[int]", job.seeds),
            steps=job.steps,
            guidance_scale=job.guidance_scale,
            height=height,
            width=width,
            negative_prompt=job.negative_prompt,
            capture=Capture.from_spec(job.capture),
            conditions={name: [from_spec(c) for c in changes] for name, changes in job.conditions.items()},
            batch_size=job.batch_size,
            options=job.pipeline,
        )

    def describe(self) -> str:  # noqa: D102
        self._check()
        lines = [str(self.asked), f"store: {self.store}"]
        if _free(self.store):
            return "\n".join([*lines, _room(self.store, self.asked.bytes)])
        found = self._extension()
        lines.append(f"the run is there: {found.done} samples done, {found.failed} failed, {found.waiting} to do")
        if len(found):
            lines.append(f"{len(found)} samples are new and will be appended")
        return "\n".join(lines)

    def _check(self) -> None:
        """Refuse before the run what would be refused after it."""
        if self.job.scores:
            check_scores(self.asked, self.job.scores)
        check_probes(self.job, self.asked.layout)

    def prepare(self, *, tell: bool) -> str:  # noqa: D102
        text = ""
        if tell:
            text = self.describe()
        else:  # to say how much memory it takes is to try it without data
            self._check()
        if _free(self.store):
            create_run(self.store, self.asked.layout, locked=True).close()
            return text
        extension = self._extension()
        if len(extension):
            stored = stored_plan(self.store, self.asked, self.pipe)
            with create_run(self.store, stored.layout, locked=True) as writer:
                extension.append(writer, self.pipe)
        return text

    def _extension(self) -> Extension:
        return compare(self.store, self.asked)

    def open(self, *, clean: bool) -> RunWriter:  # noqa: D102
        self._plan = stored_plan(self.store, self.asked, self.pipe)
        self.__dict__.pop("asked")  # of many samples it takes as much memory again
        self._quiet = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(**{**self._quiet, "disable": True})
        return create_run(self.store, self._plan.layout, clean=clean, locked=True)

    def run(self, writer: RunWriter, rows: Sequence[int], places: Sequence[int], waiting: frozenset[int]) -> None:  # noqa: D102
        assert self._plan is not None
        run_batch(self.pipe, self._plan, writer, list(rows), waiting, places)

    def is_out_of_memory(self, error: BaseException) -> bool:  # noqa: D102
        text = str(error).lower()
        return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
        )

    def recover(self) -> None:  # noqa: D102
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:  # noqa: D102
        if self._quiet is not None:
            self.pipe.set_progress_bar_config(**self._quiet)
        if self._scheduler is not None:  # the pipeline may not be ours alone
            self.pipe.scheduler = self._scheduler


def _free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))


def _room(path: Path, nbytes: int) -> str:
    """Say how much room there is where the run goes."""
    folder = next(p for p in path.absolute().parents if p.exists())
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    return f"{size(free)} free there" + ("; that may not be enough" if free < 0.7 * nbytes else "")


def _scheduler(pipe: Any, given: str | dict[str, Any]) -> Any:
    """Make the scheduler that a job names, on top of the pipeline's own configuration."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    settings = {"class": given} if isinstance(given, str) else dict(given)
    name = settings.pop("class", None)
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    if name is None:
        name = type(pipe.scheduler).__name__
    if name not in known:
        raise InterpError(f"scheduler: diffusers has no scheduler {name!r}{nearest(str(name), known)}")
    cls: Any = getattr(diffusers, name)
    if not issubclass(cls, SchedulerMixin):
        raise InterpError(f"scheduler: {name!r} is no scheduler of this pipeline's kind")
    allowed = sorted(inspect.signature(cls).parameters)
    wrong = [k for k in settings if k not in allowed]
    if wrong:
        hint = nearest(wrong[0], allowed)
        raise InterpError(f"scheduler: {name} has no setting {wrong[0]!r}{hint}; it has: {', '.join(allowed)}")
    return cls.from_config(pipe.scheduler.config, **settings)
