"""Numbers with intervals, checks that they pass or fail by a printed rule, and the verdict that follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from interp.probes.bootstrap import mean_interval

State = Literal["yes", "no", "open"]
VERDICTS = ("holds", "partly", "does not hold here", "open", "out of reach")
RULE = (
    "A check is yes when the whole 95 % interval lies on the claim's side of the bound, no when the whole interval lies on "
    "the other side, and open when the bound is inside. Verdict from the checks that decide: holds, if all are yes; "
    "partly, if some are; does not hold here, if none is and at least one is no; open, if all are open (too few prompts)."
)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, and from how many independent prompts or pairs it comes."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 3) -> str:
        """Return "0.537 [0.501, 0.570]", or the number alone where there is no interval.

        >>> Estimate(0.5, 0.4, 0.6, 10).text(1)
        '0.5 [0.4, 0.6]'
        """
        return self._formatted(f"z.{digits}f")

    def percent(self) -> str:
        """Return it as a share.

        >>> Estimate(0.5, 0.4, 0.6, 10).percent()
        '50% [40%, 60%]'
        """
        return self._formatted("z.0%")

    def _formatted(self, form: str) -> str:
        if not np.isfinite(self.value):
            return "–"
        text = f"{self.value:{form}}"
        if np.isfinite(self.low) and self.low != self.high:
            text += f" [{self.low:{form}}, {self.high:{form}}]"
        return text.replace("-", "−")


def estimate(
    values: Any,
    units: np.ndarray,
    *,
    resamples: int = 2000,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Estimate:
    """Return the mean of values (row,), or a statistic of the means of values (row, column), with its interval.

    units: (row,) what the bootstrap draws anew: rows of one unit are drawn together. statistic: means (draw, column) →
    (draw,).

    >>> estimate(np.array([1.0, 2.0, 3.0]), np.arange(3)).value
    2.0
    """
    array = np.asarray(values, dtype=np.float64)
    array = array if array.ndim > 1 else array[:, None]
    take: Callable[[np.ndarray], np.ndarray] = statistic or (lambda means: means[:, 0])
    wide = array.shape[1]  # `mean_interval` wants as many columns as there were
    mean, interval = mean_interval(
        array, units, resamples=resamples, statistic=lambda m: np.repeat(take(m)[:, None], wide, axis=1)
    )
    there = np.isfinite(array).all(1)
    return Estimate(float(mean[0]), float(interval[0, 0]), float(interval[0, 1]), len(np.unique(units[there])))


def curve(values: Any, units: np.ndarray, *, resamples: int = 2000) -> list[Estimate]:
    """Return an estimate of the mean for each column of values (row, column)."""
    array = np.asarray(values, dtype=np.float64)
    mean, interval = mean_interval(array, units, resamples=resamples)
    n = [len(np.unique(units[np.isfinite(column)])) for column in array.T]
    return [Estimate(float(m), float(i[0]), float(i[1]), k) for m, i, k in zip(mean, interval, n, strict=True)]


@dataclass(frozen=True)
class Check:
    """One part of a claim as an inequality; `decides` is False for what is shown for comparison alone."""

    claim: str
    number: Estimate
    side: Literal[">", "<", "="]
    bound: float
    decides: bool = True
    digits: int = 3

    @property
    def state(self) -> State:
        """Whether the number is on the claim's side, with its whole interval."""
        e = self.number
        if not np.isfinite(e.value):
            return "open"
        low, high = (e.value, e.value) if not np.isfinite(e.low) else (e.low, e.high)
        if self.side == "=":
            return "yes" if abs(e.value - self.bound) < 1e-9 else "no"
        if not np.isfinite(e.low) and e.n < 2:
            return "open"
        if self.side == ">":
            return "yes" if low > self.bound else "no" if high < self.bound else "open"
        return "yes" if high < self.bound else "no" if low > self.bound else "open"

    def rule(self) -> str:
        """Return the bound in words."""
        return f"{self.side} {self.bound:g}".replace("-", "−")


def minus(text: str) -> str:
    """Return text with minus signs, not hyphens, before numbers.

    >>> minus("CLIP-like: -0.1")
    'CLIP-like: −0.1'
    """
    return re.sub(r"(?<!\w)-(?=[\d.])", "−", text)


def verdict(checks: Sequence[Check]) -> str:
    """Return the verdict by `RULE`.

    >>> yes = Check("", Estimate(1, 0.5, 2, 9), ">", 0)
    >>> verdict([yes]), verdict([yes, Check("", Estimate(1, 0.5, 2, 9), "<", 0)])
    ('holds', 'partly')
    """
    states = [c.state for c in checks if c.decides]
    if not states:
        return "open"
    if all(s == "yes" for s in states):
        return "holds"
    if any(s == "yes" for s in states):
        return "partly"
    return "does not hold here" if "no" in states else "open"


@dataclass(frozen=True)
class Table:
    """Rows of a table: texts, numbers and estimates; `digits` of the numbers."""

    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""
    digits: int = 3


@dataclass(frozen=True)
class Figure:
    """A figure as HTML that needs nothing from outside (an SVG, or a grid of inline pictures)."""

    html: str
    caption: str


@dataclass(frozen=True)
class Answer:
    """What an experiment found.

    runs: run → conditions from which the numbers were read. n: in words. sentence: the main number, for the summary.
    """

    checks: list[Check]
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)
    n: str = ""
    sentence: str = ""

    @property
    def verdict(self) -> str:
        """The verdict of its checks."""
        return verdict(self.checks)
