"""Estimates, checks and verdicts."""

import numpy as np
import pytest

from interp.reproduction.measures import Check, Estimate, estimate, verdict


def check(low: float, high: float, side: str, bound: float = 0.0, **more: bool) -> Check:
    return Check("", Estimate((low + high) / 2, low, high, 9), side, bound, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [(0.1, 0.3, "yes", "no"), (-0.3, -0.1, "no", "yes"), (-0.1, 0.1, "open", "open")],
)
def test_a_check_is_decided_by_its_whole_interval(low: float, high: float, above: str, below: str) -> None:
    assert check(low, high, ">").state == above and check(low, high, "<").state == below


def test_the_verdict_follows_the_checks_that_decide() -> None:
    yes, no, open_ = check(1, 2, ">"), check(1, 2, "<"), check(-1, 1, ">")
    assert verdict([yes, yes]) == "holds" and verdict([no, open_]) == "does not hold here"
    assert verdict([yes, no]) == verdict([yes, open_]) == "partly" and verdict([open_]) == "open"
    assert verdict([yes, check(1, 2, "<", decides=False)]) == "holds"
    assert verdict([]) == "open"


def test_nothing_is_written_as_minus_zero() -> None:
    assert Estimate(-1e-9, -0.2, 1e-9, 4).text() == "0.000 [−0.200, 0.000]"


def test_one_unit_or_none_decides_nothing() -> None:
    alone = estimate(np.array([1.0, 1.0]), np.array([7, 7]))
    assert alone.n == 1 and np.isnan(alone.low) and Check("", alone, ">", 0.0).state == "open"
    assert Check("", Estimate(float("nan"), 0, 0, 0), ">", 0.0).state == "open"
    exact = Estimate(0.25, float("nan"), float("nan"), 4)
    assert Check("", exact, "=", 0.25).state == "yes" and Check("", exact, "=", 0.2).state == "no"


def test_an_interval_covers_and_draws_units_together() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        effect = rng.normal(1.0, 1.0, 30)
        rows = np.repeat(effect, 2)  # two rows of a unit say the same
        e = estimate(rows, np.repeat(np.arange(30), 2), resamples=300)
        hits += e.low < 1.0 < e.high
        assert e.n == 30
    assert 0.88 < hits / 200 < 0.98  # drawing rows instead of units would cover in about 0.80


def test_a_ratio_has_the_interval_of_the_ratio() -> None:
    rng = np.random.default_rng(1)
    below = rng.uniform(1, 2, 50)
    values = np.stack([3 * below, below], 1)
    e = estimate(values, np.arange(50), statistic=lambda m: m[:, 0] / m[:, 1])
    assert e.value == pytest.approx(3) and e.low == pytest.approx(3) and e.high == pytest.approx(3)
