"""An intervention on trial: a pipeline, and the runs with and without it that checks look at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch

from interp.capture import Capture
from interp.clock import Timeline
from interp.errors import InterpError
from interp.interventions.base import Intervention
from interp.planning import Plan, plan
from interp.stores import Run
from interp.tracing import call_arguments, trace

_CAPTURE = Capture(attention=None, noise_pred=False, image=False)


@dataclass
class _Unchanged:
    """What a pipeline gives unchanged: its plan, its run, and what a plain call gave before any change."""

    planned: Plan
    run: Run | None = None
    fresh: torch.Tensor | None = None


_UNCHANGED: WeakKeyDictionary[Any, dict[str, _Unchanged]] = WeakKeyDictionary()


@dataclass
class Trial:
    """An intervention on a pipeline, and the runs that the checks look at, each made once."""

    change: Intervention
    pipe: Any
    settings: dict[str, Any]
    table: list[dict[str, Any]]
    _runs: dict[str, Run] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Sampling steps of every run."""
        return int(self.settings["steps"])

    @property
    def _unchanged(self) -> _Unchanged:
        """One for all interventions that are tried on the pipeline."""
        known = _UNCHANGED.setdefault(self.pipe, {})
        key = json.dumps([self.settings, self.table, type(self.pipe.scheduler).__name__], default=str)
        if key not in known:
            known[key] = _Unchanged(plan(self.pipe, self.table, capture=_CAPTURE, **self.settings))
        return known[key]

    @property
    def timeline(self) -> Timeline:
        """The noise levels of the runs."""
        return self._unchanged.planned.timeline

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        return self._unchanged.planned.arguments

    @cached_property
    def late(self) -> Intervention | None:
        """The intervention with a window that lets it change the second half of the steps alone; None if there is none."""
        half = self.steps // 2
        for window in ({"start": half, "stop": None}, {"start": None, "stop": half}):
            one = replace(self.change, **window, unit="step")
            changed = one.changes(self.timeline)
            if changed and min(changed) >= half:
                return one if self._has_windows(one) else None
        return None

    def _has_windows(self, one: Intervention) -> bool:
        """Whether it may be at work in some steps only: text encoders run before the first one."""
        try:
            plan(self.pipe, self.table, interventions=[one], capture=_CAPTURE, **self.settings)
        except InterpError as error:
            assert "window" in str(error), f"a window was refused for another reason than that it is one: {error}"
            return False
        return True

    def trace(self, conditions: Mapping[str, Sequence[Intervention]], batch_size: int = 2) -> Run:
        """Run conditions, recording what the checks compare."""
        return trace(
            self.pipe, self.table, conditions=conditions, capture=_CAPTURE, batch_size=batch_size, progress=False,
            **self.settings,
        )  # fmt: skip

    @property
    def baseline(self) -> Run:
        """The unchanged run."""
        unchanged = self._unchanged
        unchanged.run = self.trace({"baseline": []}) if unchanged.run is None else unchanged.run
        return unchanged.run

    def run(self, name: str, anew: bool = False) -> Run:
        """One of the changed runs: `whole`, `again`, `identity`, `late`; made now, if `anew` or if it was not yet."""
        if anew or name not in self._runs:
            change = {"identity": self.change.identity, "late": lambda: self.late}.get(name, lambda: self.change)()
            assert change is not None
            self._runs[name] = self.trace({name: [change]})
        return self._runs[name]

    def plain(self) -> torch.Tensor:
        """The pipeline called as a user does, without anything of this package."""
        output = self.pipe(**call_arguments(self.pipe, self._unchanged.planned, range(len(self.table))))
        return (output[0] if isinstance(output, tuple) else output.images).clone()

    @property
    def fresh(self) -> torch.Tensor:
        """What the pipeline gave before this was asked for the first time."""
        unchanged = self._unchanged
        unchanged.fresh = self.plain() if unchanged.fresh is None else unchanged.fresh
        return unchanged.fresh
