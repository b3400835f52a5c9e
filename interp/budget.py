"""`Capture(budget=…)`: a run that would take more is refused, with what could be dropped."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from interp.capture import Capture
from interp.errors import InterpError

if TYPE_CHECKING:
    from interp.planning import Plan

_UNITS = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((letter, 1000), (f"{letter}b", 1000), (f"{letter}ib", 1024))
}


def parse_size(text: str | float) -> int:
    """Return a number of bytes.

    >>> parse_size("2GB"), parse_size("1.5 MiB"), parse_size(300)
    (2000000000, 1572864, 300)
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(text))
    try:
        assert found is not None
        return round(float(found[1]) * _UNITS[found[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise InterpError(
            f"Capture(budget={text!r}): give a size such as '2GB', '500 MB' or a number of bytes"
        ) from None


def size(count: float) -> str:
    """Write a number of bytes for people.

    >>> size(1500)
    '1.5 kB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def check_budget(plan: "Plan", again: Callable[[Capture], "Plan"]) -> None:
    """Raise InterpError if the plan takes more than its capture's budget, proposing what to drop.

    Args:
        plan: The plan.
        again: Makes the same plan with another capture.
    """
    budget = plan.capture.budget
    if budget is None or plan.bytes <= parse_size(budget):
        return
    limit, now, told = parse_size(budget), plan, []
    offers = list(_cheaper(plan))
    for _ in range(2):  # what saved too little to be worth it may be much of what is left
        declined = []
        for words, capture in offers:
            if now.bytes <= limit:
                break
            smaller = again(capture(now.capture))
            saved = now.bytes - smaller.bytes
            if saved > 0.02 * now.bytes or smaller.bytes <= limit:
                told.append(f"{words} saves {size(saved)}")
                now = smaller
            else:
                declined.append((words, capture))
        offers = declined
    samples, taken = len(plan), plan.bytes
    fits = int(samples * limit / now.bytes) if now.bytes > limit else samples
    end = (
        f"which leaves {size(now.bytes)}"
        if now.bytes <= limit
        else f"even then {size(now.bytes)} are left, so plan for about {fits} of the {samples} samples"
        if fits > 0
        else f"even then {size(now.bytes)} are left, so raise the budget"
    )
    advice = "; ".join(told) or "nothing more can be dropped"
    largest = max((b, name) for name, b in plan.bytes_by_array.items())
    raise InterpError(
        f"Capture(budget={budget!r}): the run would take {size(taken)} ({largest[1] or 'metadata'} alone {size(largest[0])}); "
        f"{advice}; {end}"
    )


def _cheaper(plan: "Plan") -> Iterator[tuple[str, Callable[[Capture], Capture]]]:
    """What can be given up, the least missed first."""
    capture = plan.capture

    def with_(**changes: Any) -> Callable[[Capture], Capture]:
        return lambda c: c.changed(**changes, budget=None)

    if capture.heads != "mean":
        yield "heads='mean'", with_(heads="mean")
    if capture.dtype == "float32":
        yield "dtype='float16'", with_(dtype="float16")
    if capture.tokens == "all":
        yield "tokens='prompt'", with_(tokens="prompt")
    if len(capture.branches) > 1:
        yield "branches=('cond',)", with_(branches=("cond",))
    if capture.attention == "all":
        yield "attention='cross'", with_(attention="cross")
    if (
        len(plan.timeline) > 10
        and capture.steps is None
        and (capture.attention is not None or capture.sites or capture.reduce)
    ):
        yield "steps=0.2", with_(steps=0.2)
    if capture.text:
        yield "text=False", with_(text=False)
    if capture.sites:
        yield "sites=()", with_(sites=())
    if capture.attention is not None:
        yield "attention=None", with_(attention=None)
    if capture.noise_pred:
        yield "noise_pred=False", with_(noise_pred=False)
    if capture.latents:
        yield "latents=False", with_(latents=False)
    if capture.image:
        yield "image=False", with_(image=False)
