"""Modules that do not run in some steps, because a tensor that is known already stands in for their output."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from interp.calls import DenoiserCall
from interp.catalog import split_site
from interp.errors import InterpError

Steps = Collection[int] | None
"""Sampling steps; None is all of them."""
StandIn = Callable[[DenoiserCall], torch.Tensor | None]


@dataclass
class StandIns:
    """What stands in for which modules, by path; the same module may have several in different steps."""

    _given: dict[str, list[tuple[StandIn, Steps]]] = field(default_factory=dict)
    _stood: set[str] = field(default_factory=set)

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that have a stand-in."""
        return tuple(self._given)

    def add(self, path: str, fn: StandIn, steps: Steps) -> None:
        """Let `fn` give the output of the module at `path` in these steps."""
        self._given.setdefault(path, []).append((fn, steps))

    def output(self, path: str, call: DenoiserCall) -> torch.Tensor | None:
        """Return what stands in for the module in this call, or None: then it runs."""
        for fn, steps in self._given[path]:
            if steps is None or call.step in steps:
                out = fn(call)
                if out is not None:
                    return out
        return None

    def note(self, paths: Collection[str]) -> None:
        """Note modules that did not run in the step that is under way."""
        self._stood |= set(paths)

    def stood_in(self, path: str) -> bool:
        """Tell whether the module, or one around it, did not run in this step."""
        return any(_within(path, one) for one in self._stood)

    def end_step(self) -> None:
        """Begin another step."""
        self._stood.clear()

    def refuse_writer(self, site: str, steps: Steps) -> None:
        """Nothing is written where nothing runs.

        Raises:
            InterpError: the site is of a module that does not run in some of these steps, or within one.
        """
        path = split_site(site)[0]
        for one, given in self._given.items():
            for _, absent in given if _within(path, one) else ():
                both = _common(steps, absent)
                if both is None or both:
                    raise InterpError(
                        f"{site!r} cannot be changed in {_told(both)}: {one!r} does not run there, because its output is "
                        "reused; give them windows that do not overlap, or change what lies around it"
                    )


def _within(path: str, around: str) -> bool:
    return path == around or path.startswith(f"{around}.")


def _common(a: Steps, b: Steps) -> Steps:
    if a is None or b is None:
        return b if a is None else a
    return frozenset(a) & frozenset(b)


def _told(steps: Steps) -> str:
    if steps is None:
        return "any step"
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first}–{last}"
