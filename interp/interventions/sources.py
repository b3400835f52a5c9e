"""Activations that an intervention takes from a stored run: which samples, which step, which branch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.errors import InterpError, nearest, sentence_list
from interp.interventions.base import Batch, Intervention
from interp.prompts import fill
from interp.stores import Run, open_run

BATCH = "batch"


def kept_source(source: Any, owner: str) -> Any:
    """Return a source as a spec can hold it: a path if the run is whole and lies on disk, else the run itself.

    Raises:
        InterpError: it is neither a run, nor a path, nor "batch".
    """
    if isinstance(source, Run):
        return str(source.path) if source.path is not None and source._rows is None else source
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, str):
        return source
    raise InterpError(f"{owner}: the source is a run, its path, or 'batch', not a {type(source).__name__}")


def opened(source: str | Run) -> Run:
    """Return the run of a source; one that lies on disk is opened once as long as nobody writes to it."""
    if isinstance(source, Run):
        return source
    metadata = Path(source) / "zarr.json"
    return _opened(source, metadata.stat().st_mtime_ns if metadata.is_file() else 0)


@lru_cache(maxsize=8)
def _opened(path: str, written: int) -> Run:
    return open_run(path)


def described(source: str | Run) -> str:
    """Name a source in a sentence."""
    return repr(source) if isinstance(source, str) else f"a run in memory of {len(source)} samples"


class Sourced:
    """What interventions share that take something from a stored run: how it is named, and written down."""

    source: str | Run | None

    def _named(self) -> str:
        return f"{type(self).__name__} from {described(self.source or '')}"

    def __repr__(self) -> str:
        own = super().__repr__()
        return (
            own if not isinstance(self.source, Run) else own.replace(repr(self.source), f"<{described(self.source)}>")
        )

    def spec(self: Any) -> dict[str, Any]:
        """Name and fields; a source that lives in memory cannot be rebuilt."""
        if self.source is None or isinstance(self.source, str):
            return dict(Intervention.spec(self))
        values = {f: getattr(self, f) for f in type(self).__dataclass_fields__ if f not in self.window()}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return dict(self.written(plain | {"source": self._named()}))


@dataclass(frozen=True)
class Choice:
    """How the samples of a source are matched: see `Patch`."""

    condition: str | None = None
    row: int | str | None = None
    sample: int | None = None

    def wanted_row(self, row: dict[str, Any], own: int) -> int:
        """The row of the prompt table whose sample is wanted for a sample of this row."""
        if self.row is None:
            return own
        text = fill(self.row, row) if isinstance(self.row, str) else str(self.row)
        try:
            return int(float(text))
        except ValueError:
            raise InterpError(
                f"row={self.row!r} gives {text!r}; give the number of a row of the prompt table, or a column of numbers"
            ) from None

    def condition_of(self, run: Run) -> str:
        """The condition whose samples are taken.

        Raises:
            InterpError: it is not there, or there are several and none was named.
        """
        known = run.conditions
        if self.condition is not None:
            if self.condition not in known:
                raise InterpError(
                    f"the source has no condition {self.condition!r}{nearest(self.condition, known)}; it has "
                    f"{sentence_list(known)}"
                )
            return self.condition
        if len(known) > 1 and "baseline" not in known:
            raise InterpError(f"the source has the conditions {sentence_list(known)}; say condition=…")
        return known[0] if len(known) == 1 else "baseline"

    def positions(self, run: Run, batch: Batch) -> list[int]:
        """Positions in the source of the samples that are taken for those of a batch.

        Raises:
            InterpError: a sample has none, or its is not finished.
        """
        table = run.samples
        numbers, done = table.index.to_list(), (table["status"] == 1).to_list()
        if self.sample is not None:
            if self.sample not in numbers:
                raise InterpError(f"the source has no sample {self.sample}; it has {numbers[0]}–{numbers[-1]}")
            found = [numbers.index(self.sample)] * len(batch.rows)
        else:
            condition = self.condition_of(run)
            keys = zip(table["condition"], table["prompt_id"], table["seed"], strict=True)
            index = {key: i for i, key in reversed(list(enumerate(keys)))}
            found = []
            for row, own, seed in zip(batch.rows, batch.prompt_ids, batch.seeds, strict=True):
                prompt = self.wanted_row(row, own)
                if (condition, prompt, seed) not in index:
                    raise InterpError(
                        f"the source's condition {condition!r} has no sample of prompt row {prompt} with seed {seed}: trace it "
                        "with the same prompts and seeds, or choose by row= or sample="
                    )
                found.append(index[condition, prompt, seed])
        waiting = [i for i in found if not done[i]]
        if waiting:
            raise InterpError(f"sample {numbers[waiting[0]]} of the source is not finished: run it again first")
        return found

    def within(self, batch: Batch) -> list[int]:
        """Positions in the batch of the samples that are taken for each of its own.

        Raises:
            InterpError: one is not in the batch.
        """
        if self.sample is not None or self.condition is not None:
            raise InterpError("a source of the same batch has neither condition nor sample; choose by row=")
        here = {key: i for i, key in enumerate(zip(batch.prompt_ids, batch.seeds, strict=True))}
        found = []
        for row, own, seed in zip(batch.rows, batch.prompt_ids, batch.seeds, strict=True):
            wanted = (self.wanted_row(row, own), seed)
            if wanted not in here:
                raise InterpError(
                    f"prompt row {wanted[0]} with seed {seed} does not run in the same batch as row {own}, so its activation "
                    "cannot be taken alive: give a larger batch_size, put the rows next to each other, or patch from a "
                    "stored run"
                )
            found.append(here[wanted])
        return found


@dataclass(frozen=True)
class Stored:
    """What a run holds of one site, for some samples in order."""

    run: Run
    site: str
    positions: Sequence[int]
    step: int | None = None

    def check(self, shape: tuple[int, ...], branches: Sequence[str], steps: Sequence[int], batch: Batch) -> None:
        """Raise InterpError unless the run holds what will be asked of it."""
        known = self.run.sites
        if self.site not in known:
            raise InterpError(
                f"the source did not capture {self.site!r}{nearest(self.site, known)}; it captured "
                f"{sentence_list(known) or 'no sites'}: trace it with Capture(sites=({self.site!r},))"
            )
        value = self.run.site(self.site)
        if tuple(value.shape[3:]) != shape:
            raise InterpError(
                f"the source holds {self.site!r} in the shape {tuple(value.shape[3:])}, but {shape} passes here; capture "
                "the whole site, of a run of the same size and model"
            )
        lacking = [b for b in branches if b not in value["branch"].values]
        if lacking:
            have = sentence_list(map(str, value["branch"].values))
            raise InterpError(
                f"the source captured {self.site!r} in the branch {have} alone; say branch={have}, or trace it "
                "with Capture(branches=('cond', 'uncond'))"
            )
        held = [int(s) for s in value["step"].values]
        for step in steps if self.step is None else [self.step]:
            if step not in held:
                raise InterpError(f"the source did not capture {self.site!r} in step {step}; it has the steps {held}")
        if self.step is None and steps:
            there = np.asarray(value["timestep"].sel(step=list(steps)).values, float)
            here = batch.timeline.timestep[list(steps)]
            apart = np.flatnonzero(np.abs(there - here) > 1e-3 * np.maximum(1, np.abs(here)))
            if len(apart):
                i = int(apart[0])
                raise InterpError(
                    f"step {steps[i]} of the source is at timestep {there[i]:g}, here it is at {here[i]:g}; trace both with "
                    "the same steps and scheduler, or say source_step=…"
                )

    def read(self, step: int, branch: str) -> torch.Tensor:
        """Return float32 (sample, …) of a step, the first evaluation.

        Raises:
            InterpError: the branch was not evaluated there.
        """
        step = step if self.step is None else self.step
        value = self.run.site(self.site).sel(step=step, branch=branch)
        unique, inverse = np.unique(np.asarray(self.positions), return_inverse=True)
        data = np.asarray(value.isel(sample=unique).values)
        if np.isnan(data).any():
            raise InterpError(f"the source did not evaluate the branch {branch!r} at {self.site!r} in step {step}")
        return torch.from_numpy(data[inverse])
