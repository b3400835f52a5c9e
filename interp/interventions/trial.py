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

_BASELINES: WeakKeyDictionary[Any, dict[str, Run]] = WeakKeyDictionary()


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

    @cached_property
    def planned(self) -> Plan:
        """The plan of the unchanged run."""
        return plan(self.pipe, self.table, capture=Capture(attention=None, image=False), **self.settings)

    @property
    def timeline(self) -> Timeline:
        """The noise levels of the runs."""
        return self.planned.timeline

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        return self.planned.arguments

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
            plan(self.pipe, self.table, interventions=[one], **self.settings)
        except InterpError as error:
            assert "window" in str(error), f"a window was refused for another reason than that it is one: {error}"
            return False
        return True

    def trace(self, conditions: Mapping[str, Sequence[Intervention]], batch_size: int = 2) -> Run:
        """Run conditions, recording what the checks compare."""
        capture = Capture(attention=None, noise_pred=False, image=False)
        return trace(
            self.pipe, self.table, conditions=conditions, capture=capture, batch_size=batch_size, progress=False,
            **self.settings,
        )  # fmt: skip

    @property
    def baseline(self) -> Run:
        """The unchanged run; one for all interventions that are tried on the pipeline."""
        known = _BASELINES.setdefault(self.pipe, {})
        key = json.dumps([self.settings, self.table, type(self.pipe.scheduler).__name__], default=str)
        if key not in known:
            known[key] = self.trace({"baseline": []})
        return known[key]

    def run(self, name: str) -> Run:
        """One of the changed runs: `whole`, `again`, `identity`, `late`."""
        if name not in self._runs:
            change = {"identity": self.change.identity, "late": lambda: self.late}.get(name, lambda: self.change)()
            assert change is not None
            self._runs[name] = self.trace({name: [change]})
        return self._runs[name]

    def plain(self) -> torch.Tensor:
        """The pipeline called as a user does, without anything of this package."""
        output = self.pipe(**call_arguments(self.pipe, self.planned, range(len(self.table))))
        return (output[0] if isinstance(output, tuple) else output.images).clone()

    @cached_property
    def fresh(self) -> torch.Tensor:
        """What the pipeline gave before it was changed for the first time."""
        return self.plain()
