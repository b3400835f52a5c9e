"""For authors of interventions: `check_intervention` yields the checks that every intervention passes.

```python
import pytest
from interp.interventions.testing import check_intervention
from my_interventions import Blur
from my_pipelines import tiny_pipeline          # a few layers with random weights, built from configs

@pytest.mark.parametrize("check", list(check_intervention(Blur(radius=2.0), tiny_pipeline())), ids=str)
def test_blur(check):
    check()
```
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import yaml

from interp.capture import Capture
from interp.clock import is_flow
from interp.errors import InterpError, nearest
from interp.families import find_family
from interp.hooks import At
from interp.interventions.base import Intervention, check_all, from_spec
from interp.interventions.functions import Edit
from interp.planning import plan
from interp.probes.testing import Check
from interp.stores import Run
from interp.testing.case import untouched
from interp.tracing import call_arguments, trace

__all__ = ["PROMPTS", "SCHEDULERS", "check_intervention"]

PROMPTS = [
    {"prompt": "a red circle", "target": "a blue dog"},
    {"prompt": "a red dog on the blue square", "target": "a green circle on the background"},
]
"""The table that checks run with, seed 0: words and columns that an intervention under test may name."""

SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
"""Schedulers of diffusers for models that predict noise; those of flow models keep their own."""


_BASELINES: WeakKeyDictionary[Any, dict[str, Run]] = WeakKeyDictionary()


@dataclass
class _Case:
    """An intervention on a pipeline, and the runs that the checks look at, each made once."""

    change: Intervention
    pipe: Any
    settings: dict[str, Any]
    table: list[dict[str, Any]]
    _runs: dict[str, Run] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.settings["steps"])

    @property
    def empty(self) -> Intervention:
        return replace(self.change, start=1.0, stop=1.0, unit="fraction")

    @property
    def late(self) -> Intervention:
        """The second half of the steps."""
        return replace(self.change, start=self.steps // 2, stop=None, unit="step")

    def trace(self, conditions: Mapping[str, Sequence[Intervention]], batch_size: int = 2) -> Run:
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
        """One of the changed runs: `whole`, `again`, `empty`, `late`."""
        if name not in self._runs:
            change = {"empty": self.empty, "late": self.late}.get(name, self.change)
            self._runs[name] = self.trace({name: [change]})
        return self._runs[name]

    @cached_property
    def has_windows(self) -> bool:
        """Whether it may be at work in some steps only: text encoders run before the first one."""
        try:
            plan(self.pipe, self.table, interventions=[self.late], **self.settings)
        except InterpError as error:
            assert "window" in str(error), f"a window was refused for another reason than that it is one: {error}"
            _one_sentence(error)
            return False
        return True

    @contextmanager
    def scheduled(self, scheduler: Any) -> Iterator[None]:
        own, self.pipe.scheduler = self.pipe.scheduler, scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = own

    def plain(self) -> torch.Tensor:
        """The pipeline called as a user does, without anything of this package."""
        planned = plan(self.pipe, self.table, capture=Capture(attention=None, image=False), **self.settings)
        output = self.pipe(**call_arguments(self.pipe, planned, range(len(self.table))))
        return (output[0] if isinstance(output, tuple) else output.images).clone()

    @cached_property
    def fresh(self) -> torch.Tensor:
        """What the pipeline gave before it was changed for the first time."""
        return self.plain()


def check_intervention(
    intervention: Intervention,
    pipe: Any,
    *,
    prompts: Sequence[Mapping[str, Any]] = PROMPTS,
    steps: int = 2,
    guidance_scale: float = 4.0,
    size: tuple[int, int] = (32, 32),
    options: Mapping[str, Any] | None = None,
    schedulers: Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
    only: Sequence[str] = (),
) -> Iterator[Check]:
    """Yield the checks of an intervention, to be called one by one: `pytest.mark.parametrize("check", list(…), ids=str)`.

    Checked: the spec comes back from YAML as the same intervention, through the entry-point group; two owners of the same
    thing are refused; an empty window changes nothing, to the last bit; steps before the window are those of an unchanged
    run; it has an effect; the same again gives the same bits; nothing is left behind, nor after an exception, and the
    pipeline gives the bits of an untouched one; a batch of two equals two of one; forward passes are those that
    `branches()` says; other schedulers.

    Args:
        intervention: With the fields to be tried; its window is exchanged where a check needs another.
        pipe: A tiny pipeline with random weights, in float32; it is left as it was.
        prompts: Two rows of a prompt table, which the intervention may name columns and words of.
        steps: Sampling steps, at least 2.
        guidance_scale: Of every run.
        size: (height, width) in pixels.
        options: Further arguments of the pipeline's call, e.g. `{"max_sequence_length": 32}`.
        schedulers: Name → scheduler; default: `SCHEDULERS` made from the pipeline's own, none for flow models.
        tolerance: Largest difference of a batch of two and two of one, as a share of the latents' largest value.
        only: Names of the checks to yield; default all.

    >>> import interp
    >>> [str(check) for check in check_intervention(interp.RemoveText(), interp.load("scenes"), schedulers={})][:4]
    ['spec', 'claims', 'empty window', 'window']
    """
    settings = {
        "seeds": 0, "steps": steps, "guidance_scale": guidance_scale, "height": size[0], "width": size[1],
        "options": dict(options or {}),
    }  # fmt: skip
    case = _Case(intervention, pipe, settings, [dict(row) for row in prompts])
    found: dict[str, Callable[[], None]] = {
        "spec": partial(_spec, case),
        "claims": partial(_claims, case),
        "empty window": partial(_empty, case),
        "window": partial(_window, case),
        "has an effect": partial(_effect, case),
        "same again": partial(_again, case),
        "nothing is left": partial(_left, case),
        "nothing is left after an exception": partial(_exception, case),
        "batch of two": partial(_batch, case, tolerance),
        "forward passes": partial(_passes, case),
    }
    others = _schedulers(pipe) if schedulers is None else schedulers
    found |= {f"window with {name}": partial(_with_scheduler, case, one) for name, one in others.items()}
    unknown = [name for name in only if name not in found]
    if unknown:
        raise InterpError(f"check_intervention(only=…) has no check {unknown[0]!r}{nearest(unknown[0], found)}")
    for name, body in found.items():
        if not only or name in only:
            yield Check(name, body)


def _schedulers(pipe: Any) -> dict[str, Any]:
    if is_flow(pipe.scheduler):
        return {}
    import diffusers

    return {n: getattr(diffusers, c).from_config(pipe.scheduler.config, **more) for n, (c, more) in SCHEDULERS.items()}


def _spec(case: _Case) -> None:
    """As data and back, through YAML, JSON and the entry point."""
    change = case.change
    if not change.serialisable:
        spec = change.spec()
        assert spec.get("serialisable") is False, "the spec of an intervention in Python must say serialisable: False"
        json.dumps(spec)
        return
    spec = change.spec()
    assert json.loads(json.dumps(spec)) == spec, f"the spec is not plain data: {spec}"
    try:
        back = from_spec(yaml.safe_load(yaml.safe_dump(spec)))
    except InterpError as error:
        raise AssertionError(
            f"{error}: name the class in pyproject.toml under [project.entry-points.'interp.interventions'] as "
            f"{change.name!r}, and install the package"
        ) from error
    assert type(back) is type(change) and back == change, f"{change!r} came back from its spec as {back!r}"
    assert hash(back) == hash(change) and back.spec() == spec
    assert type(change).__name__ in repr(change), f"the repr does not name the class: {change!r}"


def _claims(case: _Case) -> None:
    """Claims are names, and the same thing has one owner in a step."""
    claims = case.change.claims()
    assert isinstance(claims, frozenset) and all(isinstance(c, str) and c for c in claims), f"claims are {claims!r}"
    kept = case.change.branches()
    assert kept is None or "branches" in claims, "what decides about branches must claim 'branches'"
    planned = plan(case.pipe, case.table, **case.settings)
    family, table = find_family(case.pipe), {k: [row[k] for row in case.table] for k in case.table[0]}
    try:
        check_all([case.change, case.change], planned.timeline, table, family.guided(planned.arguments))
    except InterpError as error:
        _one_sentence(error)
        assert claims, f"it claims nothing, and yet cannot be given twice: {error}"
        return
    assert not claims or not case.change.steps(planned.timeline), f"two owners of {sorted(claims)} were not refused"


def _empty(case: _Case) -> None:
    """In no step it changes nothing."""
    base, empty = case.baseline, case.run("empty")
    _equal(base, empty, "a run with an empty window")
    assert np.array_equal(base.nfe.values, empty.nfe.values), "an empty window changes the number of forward passes"


def _window(case: _Case) -> None:
    """Until its window begins, nothing has changed."""
    if case.has_windows:
        _late(case, case.baseline, case.run("late"))


def _late(case: _Case, base: Run, late: Run) -> None:
    first = case.steps // 2
    same = np.array_equal(base.latents.values[:, : first + 1], late.latents.values[:, : first + 1])
    assert same, f"a window that begins at step {first} changes an earlier one"
    assert np.isfinite(late.final_latents.values).all(), "what comes out is not finite"


def _effect(case: _Case) -> None:
    """It changes what comes out."""
    base, whole = case.baseline, case.run("whole")
    assert np.isfinite(whole.final_latents.values).all(), "what comes out is not finite"
    assert not np.array_equal(base.final_latents.values, whole.final_latents.values), (
        f"{case.change!r} changes nothing: give it fields with which it does, or other prompts"
    )


def _again(case: _Case) -> None:
    """Deterministic: of two runs in a row, the second gives the bits of the first."""
    _equal(case.run("whole"), case.run("again"), "the same again")


def _left(case: _Case) -> None:
    """The pipeline is as it was, and gives what it gave."""
    before = case.fresh
    with untouched(case.pipe):
        case.trace({"whole": [case.change]})
    assert torch.equal(case.plain(), before), "the pipeline gives other pictures after the run than before"


class _Stop(Exception):  # noqa: N818
    pass


def _exception(case: _Case) -> None:
    """Whatever fails inside the run, the pipeline is as it was."""
    before, first = case.fresh, case.steps // 2

    def burst(tensor: torch.Tensor, at: At) -> None:
        if at.step >= first:
            raise _Stop

    with untouched(case.pipe):
        try:
            case.trace({"whole": [case.change, Edit(burst, f"{find_family(case.pipe).root}:out")]})
        except _Stop:
            pass
        else:
            raise AssertionError("an exception inside the run was swallowed")
    assert torch.equal(case.plain(), before), "after an exception the pipeline gives other pictures than before"


def _batch(case: _Case, tolerance: float) -> None:
    """What runs beside a sample changes it by rounding only."""
    together = case.run("whole").final_latents.values
    alone = case.trace({"whole": [case.change]}, batch_size=1).final_latents.values
    apart, largest = float(np.abs(together - alone).max()), float(np.abs(alone).max())
    assert apart <= tolerance * largest, (
        f"a batch of two differs from two of one by {apart:.3g} (largest value {largest:.3g})"
    )


def _passes(case: _Case) -> None:
    """Forward passes really run are those that `branches()` lets run."""
    base, whole = case.baseline, case.run("whole")
    plain, passes = base.nfe.values[0], whole.nfe.values
    assert (passes <= plain).all(), (
        f"{passes.tolist()} forward passes are more than the {plain.tolist()} of an unchanged run"
    )
    kept = case.change.branches()
    if kept is None or plain.max() != case.steps:  # schedulers of second order run more a step
        return
    timeline = plan(case.pipe, case.table, **case.settings).timeline
    dropped = len(case.change.steps(timeline))
    for k, branch in enumerate(str(b) for b in base.nfe["branch"].values):
        want = plain[k] - (0 if branch in kept else dropped)
        assert (passes[:, k] == want).all(), (
            f"{passes[:, k].tolist()} passes of {branch!r}, where branches() says {want}"
        )


def _with_scheduler(case: _Case, scheduler: Any) -> None:
    """With another scheduler, too, steps are sampling steps."""
    with case.scheduled(scheduler):
        if case.has_windows:
            _late(case, case.baseline, case.trace({"late": [case.late]}))


def _equal(one: Run, other: Run, what: str) -> None:
    for name in ("latents", "final_latents"):
        assert np.array_equal(getattr(one, name).values, getattr(other, name).values), f"{what} differs in its {name}"


def _one_sentence(error: InterpError) -> None:
    assert "\n" not in str(error) and len(str(error)) > 20, f"not a clear sentence: {error}"
