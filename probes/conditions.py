"""Conditions of one run: what each changed, in which steps, and which samples belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.stores.errors import InterpError, nearest

if TYPE_CHECKING:
    from interp.stores import Run

Spec = Mapping[str, Any]
EVERY = ("start", "stop", "unit", "name", "serialisable")


@dataclass(frozen=True)
class Pairs:
    """Samples of several conditions that share prompt and seed: positions (condition, pair), −1 for none.

    The first condition is the reference, of which every pair has a sample.
    """

    conditions: list[str]
    positions: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return what each sample has (sample, …) as (condition, pair, …) float64, NaN where there is no sample."""
        found = np.asarray(values, dtype=np.float64)[np.maximum(self.positions, 0)]
        found[self.positions < 0] = np.nan
        return found


def specs_of(run: Run) -> dict[str, list[Spec]]:
    """Return the interventions of each condition as they were written into the run: name and fields."""
    written = run.attrs.get("conditions") or {}
    return {str(name): [dict(spec) for spec in (written.get(name) or [])] for name in run.conditions}


def conditions_with(
    run: Run, names: Iterable[str], chosen: Sequence[str] | str | None, *, asker: str, example: str
) -> dict[str, Spec]:
    """Return the conditions that use an intervention of one of these names, with the first such spec of each.

    chosen: None for all of them, or the conditions wanted. Raises InterpError for a condition that is not there or
    uses no such intervention, and when there is none; `example` says which conditions to trace.
    """
    wanted, specs = set(names), specs_of(run)
    found = {c: next(s for s in all_ if s.get("name") in wanted) for c, all_ in specs.items() if _uses(all_, wanted)}
    what = " or ".join(sorted(wanted))
    if chosen is not None:
        for name in [chosen] if isinstance(chosen, str) else chosen:
            check_condition(run, name)
            if name not in found:
                raise InterpError(
                    f"{asker}: condition {name!r} has no {what}; those that have: {', '.join(found) or 'none'}"
                )
        found = {name: found[name] for name in ([chosen] if isinstance(chosen, str) else chosen)}
    if not found:
        raise InterpError(
            f"{asker} needs conditions with {what}, where this run has {', '.join(specs)}: trace it with conditions={example}"
        )
    return found


def check_condition(run: Run, name: str) -> None:
    """Raise InterpError unless the run has this condition."""
    known = run.conditions
    if name not in known:
        raise InterpError(f"this run has no condition {name!r}; it has {', '.join(known)}{nearest(name, known)}")


def describe(specs: Sequence[Spec]) -> str:
    """Return interventions in a few words: name and the fields that say something.

    >>> describe([{"name": "replace_tokens", "roles": ["word"], "value": "zero", "start": None, "stop": 0.2}])
    'replace_tokens(roles=word, value=zero, stop=0.2)'
    """
    return " + ".join(f"{s.get('name', '?')}({', '.join(_fields(s))})" for s in specs) or "unchanged"


def steps_of(spec: Spec, steps: xr.Dataset) -> np.ndarray:
    """Return in which of the run's steps an intervention was at work, bool (step,).

    steps: a dataset with the coordinates step, timestep and sigma. The window is half-open [start, stop) in the spec's
    `unit`; sigma and timestep fall during sampling.

    >>> five = xr.Dataset(coords={"step": range(5)})
    >>> steps_of({"name": "remove_text", "start": 0.6}, five).tolist()
    [False, False, False, True, True]
    """
    number = np.asarray(steps["step"].values)
    start, stop, unit = spec.get("start"), spec.get("stop"), spec.get("unit") or "fraction"
    if unit in ("fraction", "step"):
        scale = len(number) if unit == "fraction" else 1
        first = math.ceil((start or 0) * scale - 1e-9)
        last = len(number) if stop is None else math.ceil(stop * scale - 1e-9)
        return (number >= first) & (number < last)
    level = np.asarray(steps[unit].values)
    return (level <= (math.inf if start is None else start)) & (level > (-math.inf if stop is None else stop))


def pair_up(run: Run, reference: str, conditions: Sequence[str]) -> Pairs:
    """Pair the finished samples of a reference condition with those of others by prompt and seed.

    Raises InterpError for a condition that is not there or unfinished, and when no sample of any other condition has a
    partner.
    """
    samples = run.samples
    names = [reference, *(c for c in conditions if c != reference)]
    rows = {}
    for name in names:
        check_condition(run, name)
        rows[name] = _finished(samples, name)
    keys = [_key(samples, i) for i in rows[reference]]
    positions = np.full((len(names), len(keys)), -1)
    positions[0] = rows[reference]
    for k, name in enumerate(names[1:], 1):
        index = {_key(samples, i): i for i in reversed(rows[name])}
        positions[k] = [index.get(key, -1) for key in keys]
    if len(names) > 1 and (positions[1:] < 0).all():
        raise InterpError(
            f"no sample of {', '.join(names[1:])} has a finished {reference!r} sample of its prompt and seed: trace the "
            f"conditions with the same prompts and seeds"
        )
    return Pairs(names, positions)


def _finished(samples: pd.DataFrame, condition: str) -> list[int]:
    done = samples["status"].to_numpy() == 1 if "status" in samples else np.ones(len(samples), dtype=bool)
    rows: list[int] = np.flatnonzero((samples["condition"] == condition).to_numpy() & done).tolist()
    if not rows:
        raise InterpError(f"no sample of condition {condition!r} is finished yet: run the same command again")
    return rows


def _key(samples: pd.DataFrame, i: int) -> tuple[Any, ...]:
    return tuple(samples[c].iloc[i] for c in ("prompt_id", "prompt", "seed"))


def _uses(specs: Sequence[Spec], names: set[str]) -> bool:
    return any(s.get("name") in names for s in specs)


def _fields(spec: Spec) -> list[str]:
    """The fields of a spec that are not at rest, the window last."""
    said = [f"{k}={_short(v)}" for k, v in spec.items() if k not in EVERY and v not in (None, "", [], (), False)]
    window = [f"{k}={_short(spec[k])}" for k in ("start", "stop") if spec.get(k) is not None]
    unit = spec.get("unit")
    return said + window + ([f"unit={unit}"] if window and unit not in (None, "fraction") else [])


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
