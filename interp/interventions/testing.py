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
from functools import partial
from typing import Any

import numpy as np
import torch
import yaml

from interp.clock import is_flow
from interp.errors import InterpError, nearest
from interp.families import find_family
from interp.hooks import At
from interp.interventions.base import Intervention, from_spec
from interp.interventions.checking import check_all
from interp.interventions.functions import Edit
from interp.interventions.trial import Trial
from interp.probes.testing import Check
from interp.stores import Run
from interp.testing.case import scheduled
from interp.testing.leftovers import untouched

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
    thing are refused; its `identity()` changes nothing, to the last bit (an empty window, unless the intervention says
    otherwise); steps before those that it may change are those of an unchanged run; it has an effect; the same again gives
    the same bits; nothing is left behind, nor after an exception, and the pipeline gives the bits of an untouched one; a
    batch of two equals two of one; forward passes are those that `branches()` says; other schedulers.

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
    ['spec', 'claims', 'identity', 'window']
    """
    settings = {
        "seeds": 0, "steps": steps, "guidance_scale": guidance_scale, "height": size[0], "width": size[1],
        "options": dict(options or {}),
    }  # fmt: skip
    case = Trial(intervention, pipe, settings, [dict(row) for row in prompts])
    found: dict[str, Callable[[], None]] = {
        "spec": partial(_spec, case),
        "claims": partial(_claims, case),
        "identity": partial(_identity, case),
        "window": partial(_window, case),
        "has an effect": partial(_effect, case),
        "nothing is left": partial(_left, case),
        "same again": partial(_again, case),
        "nothing is left after an exception": partial(_exception, case),
        "batch of two": partial(_batch, case, tolerance),
        "forward passes": partial(_passes, case),
    }
    others = (
        _schedulers(pipe) if schedulers is None else {name: lambda one=one: one for name, one in schedulers.items()}
    )
    found |= {f"window with {name}": partial(_with_scheduler, case, make) for name, make in others.items()}
    unknown = [name for name in only if name not in found]
    if unknown:
        raise InterpError(f"check_intervention(only=…) has no check {unknown[0]!r}{nearest(unknown[0], found)}")
    for name, body in found.items():
        if not only or name in only:
            yield Check(name, body)


def _schedulers(pipe: Any) -> dict[str, Callable[[], Any]]:
    if is_flow(pipe.scheduler):
        return {}
    import diffusers

    return {
        name: partial(getattr(diffusers, cls).from_config, pipe.scheduler.config, **more)
        for name, (cls, more) in SCHEDULERS.items()
    }


def _spec(case: Trial) -> None:
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


def _claims(case: Trial) -> None:
    """Claims are names, and the same thing has one owner in a step."""
    claims = case.change.claims()
    assert isinstance(claims, frozenset) and all(isinstance(c, str) and c for c in claims), f"claims are {claims!r}"
    kept = case.change.branches()
    assert kept is None or "branches" in claims, "what decides about branches must claim 'branches'"
    family, table = find_family(case.pipe), {k: [row[k] for row in case.table] for k in case.table[0]}
    try:
        check_all([case.change, case.change], case.timeline, table, family.guided(case.arguments), family)
    except InterpError as error:
        _one_sentence(error)
        assert claims, f"it claims nothing, and yet cannot be given twice: {error}"
        return
    assert not claims or not case.change.steps(case.timeline), f"two owners of {sorted(claims)} were not refused"


def _identity(case: Trial) -> None:
    """With the fields that its `identity()` gives, it changes nothing."""
    base, same = case.baseline, case.run("identity")
    _equal(base, same, f"a run with {case.change.identity()!r}, which is to change nothing,")
    assert np.array_equal(base.nfe.values, same.nfe.values), "its identity changes the number of forward passes"


def _window(case: Trial) -> None:
    """Until its window begins, nothing has changed."""
    if case.late is not None:
        _late(case, case.baseline, case.run("late"))


def _late(case: Trial, base: Run, late: Run) -> None:
    first = case.steps // 2
    same = np.array_equal(base.latents.values[:, : first + 1], late.latents.values[:, : first + 1])
    assert same, f"a window that begins at step {first} changes an earlier one"
    assert np.isfinite(late.final_latents.values).all(), "what comes out is not finite"


def _effect(case: Trial) -> None:
    """It changes what comes out."""
    base, whole = case.baseline, case.run("whole")
    assert np.isfinite(whole.final_latents.values).all(), "what comes out is not finite"
    assert not np.array_equal(base.final_latents.values, whole.final_latents.values), (
        f"{case.change!r} changes nothing: give it fields with which it does, or other prompts"
    )


def _again(case: Trial) -> None:
    """Deterministic: of two runs in a row, the second gives the bits of the first."""
    _equal(case.run("whole"), case.run("again"), "the same again")


def _left(case: Trial) -> None:
    """The pipeline is as it was, and gives what it gave."""
    before = case.fresh
    with untouched(case.pipe):
        case.run("again", anew=True)
    assert torch.equal(case.plain(), before), "the pipeline gives other pictures after the run than before"


class _Stop(Exception):  # noqa: N818
    pass


def _exception(case: Trial) -> None:
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


def _batch(case: Trial, tolerance: float) -> None:
    """What runs beside a sample changes it by rounding only."""
    together = case.run("whole").final_latents.values
    alone = case.trace({"whole": [case.change]}, batch_size=1).final_latents.values
    apart, largest = float(np.abs(together - alone).max()), float(np.abs(alone).max())
    assert apart <= tolerance * largest, (
        f"a batch of two differs from two of one by {apart:.3g} (largest value {largest:.3g})"
    )


def _passes(case: Trial) -> None:
    """Forward passes really run are those that `branches()` lets run."""
    base, whole = case.baseline, case.run("whole")
    plain, passes = base.nfe.values[0], whole.nfe.values
    assert (passes <= plain).all(), (
        f"{passes.tolist()} forward passes are more than the {plain.tolist()} of an unchanged run"
    )
    policy = case.change.evaluated(case.timeline)
    if not policy or plain.max() != case.steps:  # schedulers of second order run more a step
        return
    for k, branch in enumerate(str(b) for b in base.nfe["branch"].values):
        want = plain[k] - sum(branch not in kept for kept in policy.values())
        assert (passes[:, k] == want).all(), (
            f"{passes[:, k].tolist()} passes of {branch!r}, where branches() says {want}"
        )


def _with_scheduler(case: Trial, make: Callable[[], Any]) -> None:
    """With another scheduler, too, steps are sampling steps."""
    with scheduled(case.pipe, make()):
        if case.late is not None:
            _late(case, case.baseline, case.trace({"late": [case.late]}))


def _equal(one: Run, other: Run, what: str) -> None:
    for name in ("latents", "final_latents"):
        assert np.array_equal(getattr(one, name).values, getattr(other, name).values), f"{what} differs in its {name}"


def _one_sentence(error: InterpError) -> None:
    assert "\n" not in str(error) and len(str(error)) > 20, f"not a clear sentence: {error}"
