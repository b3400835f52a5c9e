"""Interventions of one list beside each other: no two own the same thing, and none is left without effect."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from interp.clock import Timeline
from interp.errors import InterpError
from interp.families import Family
from interp.interventions.base import Intervention
from interp.interventions.claims import overlap
from interp.warning import warn


def check_all(
    interventions: Sequence[Intervention],
    timeline: Timeline,
    table: Mapping[str, Sequence[Any]],
    guided: bool,
    family: Family | None = None,
) -> None:
    """Check each intervention, that no two claim the same thing in the same steps, and that none is left without effect.

    Raises:
        InterpError: one sentence naming the two.
    """
    for one in interventions:
        if not isinstance(one, Intervention):
            raise InterpError(f"{one!r} is no intervention; give e.g. interp.RemoveText(start=0.6)")
        one.check(table, guided)
        _check_window(one, timeline)
    _check_owners([(one, one.claimed(timeline, family)) for one in interventions])
    evaluated = evaluated_branches(interventions, timeline, guided)
    for one in interventions:
        _check_effect(one, interventions, evaluated, timeline)
        if family is not None:
            one.check_beside([other for other in interventions if other is not one], timeline, family)


def evaluated_branches(interventions: Sequence[Intervention], timeline: Timeline, guided: bool) -> list[frozenset[str]]:
    """Return the branches that each step evaluates, at most."""
    policies = [one.evaluated(timeline) for one in interventions]
    full = frozenset({"cond", "uncond"} if guided else {"cond"})
    return [full.intersection(*(p[step] for p in policies if step in p)) for step in range(len(timeline))]


def _check_window(one: Intervention, timeline: Timeline) -> None:
    """A window that holds no step is seldom meant; one that ends where it begins is, and so are the shares 1.0 and 0.0."""
    share = one.unit == "fraction"
    empty = (one.start is not None and one.start in (one.stop, 1 if share else None)) or (share and one.stop == 0)
    if not empty and not one.steps(timeline):
        numbers = f", which are numbered from 0 to {len(timeline) - 1}," if one.unit == "step" else ""
        warn(f"none of the run's {len(timeline)} steps{numbers} lies in the window of {one!r}, which changes nothing")


def _check_owners(claimed: Sequence[tuple[Intervention, Mapping[str, frozenset[int]]]]) -> None:
    for i, (other, theirs) in enumerate(claimed):
        for one, mine in claimed[i + 1 :]:
            for claim, owner in product(sorted(mine), sorted(theirs)):
                both = sorted(mine[claim] & theirs[owner])
                if both and overlap(claim, owner):
                    raise InterpError(
                        f"{other!r} and {one!r} both decide about {min(claim, owner, key=len).partition(';')[0]!r} in "
                        f"{_told(both)}; give them windows that do not overlap"
                    )


def _check_effect(
    one: Intervention, interventions: Sequence[Intervention], evaluated: Sequence[frozenset[str]], timeline: Timeline
) -> None:
    """A branch that is not evaluated cannot be changed."""
    steps, wanted = sorted(one.steps(timeline)), one.acts_on()
    if not wanted or not steps or any(evaluated[step] & {*wanted} for step in steps):
        return
    which = " and ".join(map(repr, wanted))
    owners = [o for o in interventions if any(step in o.evaluated(timeline) for step in steps)]
    if not owners:
        raise InterpError(
            f"{one!r} changes the branch {which}, which a run without guidance does not evaluate: nothing would change; say "
            "branch='cond', or raise the guidance scale"
        )
    raise InterpError(
        f"{one!r} would change nothing: it changes the branch {which}, which {owners[0]!r} leaves out in {_told(steps)}; give "
        "them other windows"
    )


def _told(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"
