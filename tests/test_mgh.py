"""The More-Garbow-Hillstrom problems from 1, 10 and 100 times the standard start."""

import numpy as np
import pytest

from lmsolve import least_squares
from tests.problems import CASES, FACTORS, PROBLEMS

SOLVED = 100  # at least; 109 of 120 when this was written


def finite_start(name, factor):
    """Whether the sum of squares exists at the start; 100 times some of them overflows."""
    return np.isfinite(PROBLEMS[name].cost(PROBLEMS[name].start(factor)))


def fit(name, factor):
    p = PROBLEMS[name]
    tight = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}
    return least_squares(p.fun, p.start(factor), p.jac, **tight)


def test_the_number_of_solved_runs():
    unsolved, evaluations = [], 0
    for name, factor in CASES:
        if not finite_start(name, factor):
            unsolved.append((name, factor))
            continue
        result = fit(name, factor)
        evaluations += result.nfev
        if not PROBLEMS[name].solved(result.cost):
            unsolved.append((name, factor))
    assert len(CASES) - len(unsolved) >= SOLVED, unsolved
    assert evaluations <= 30_000


@pytest.mark.parametrize(("name", "factor"), [c for c in CASES if not finite_start(*c)])
def test_a_start_that_overflows_is_refused(name, factor):
    with pytest.raises(ValueError, match="finite at `x0`"):
        fit(name, factor)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_run_ends_above_its_start(name):
    p = PROBLEMS[name]
    for factor in (f for f in FACTORS if finite_start(name, f)):
        result = least_squares(p.fun, p.start(factor), p.jac, max_nfev=15)
        assert result.cost <= p.cost(p.start(factor)) * (1 + 1e-12)
        assert result.cost == pytest.approx(p.cost(result.x), rel=1e-12, abs=1e-300)


SOLVED_BY_DIFFERENCES = ["rosenbrock", "helical_valley", "bard", "kowalik_osborne", "watson_6"]


@pytest.mark.parametrize("scheme", ["2-point", "3-point", "cs"])
@pytest.mark.parametrize("name", SOLVED_BY_DIFFERENCES)
def test_differences_solve_the_standard_start(name, scheme):
    if (name, scheme) == ("helical_valley", "cs"):
        pytest.skip("its angle is not an analytic function")
    p = PROBLEMS[name]
    result = least_squares(p.fun, p.x0, scheme)
    assert p.solved(result.cost)
    exact = least_squares(p.fun, p.x0, p.jac)
    np.testing.assert_allclose(result.x, exact.x, rtol=1e-5, atol=1e-5)
