"""The damping policy by arithmetic."""

import math

import numpy as np
import pytest

from lmsolve import least_squares
from lmsolve._damping import ACCEPT, Damping, eased, interpolated, updated


@pytest.mark.parametrize(
    ("ratio", "length", "shrink", "expected"),
    [
        (0.5, 3.9, 0.5, (4.0, 2.0)),  # fair: nothing changes
        (0.75, 3.0, 0.5, (6.0, 1.0)),  # good: twice the step, half the damping
        (1.0, 4.0, 0.5, (8.0, 1.0)),
        (0.25, 3.0, 0.5, (2.0, 4.0)),  # poor: shrunk
        (-math.inf, 3.0, 0.1, (0.4, 20.0)),  # failed: shrunk by most
        (0.0, 0.1, 0.5, (0.5, 4.0)),  # the radius was far longer than the step
    ],
)
def test_update(ratio, length, shrink, expected):
    assert updated(4.0, 2.0, ratio, length, shrink)[:2] == pytest.approx(expected, rel=1e-15)


def test_an_undamped_fair_step_doubles():
    assert updated(4.0, 0.0, 0.5, 3.0, 0.5)[:2] == (6.0, 0.0)


def test_accept_reject_accept():
    damping = updated(8.0, 4.0, 1.0, 8.0, 0.5)
    assert damping[:2] == (16.0, 2.0)
    damping = updated(*damping[:2], -1.0, 16.0, 0.25)
    assert damping[:2] == (4.0, 8.0)
    assert updated(*damping[:2], 0.5, 4.0, 0.5)[:2] == (4.0, 8.0)


def test_the_first_radius_is_at_most_the_first_step():
    assert Damping(10.0, 1.0).first(3.0)[:2] == (3.0, 1.0)
    assert Damping(10.0, 1.0).first(30.0)[:2] == (10.0, 1.0)


@pytest.mark.parametrize(
    ("actual", "slope", "cost_new", "expected"),
    [
        (-math.inf, -1.0, math.nan, 0.1),
        (-math.inf, -1.0, math.inf, 0.1),
        (-199.0, -1.0, 200.0, 0.1),  # a hundred times the cost
        (0.1, -1.0, 0.9, 0.5),  # a decrease, but a poor one
        (-1.0, -2.0, 2.0, 1 / 3),  # the parabola 1 - 2 t + 3 t^2
        (-20.0, -1.0, 21.0, 0.1),
    ],
)
def test_interpolation(actual, slope, cost_new, expected):
    assert interpolated(actual, slope, 1.0, cost_new) == pytest.approx(expected, rel=1e-15)


def test_small_decreases_are_accepted():
    assert 0 < ACCEPT <= 1e-3


def test_where_mu_leads_good_trials_lower_it_and_rejections_raise_it_ever_faster():
    damping = eased(3e-4, 2.0, 1.0)
    assert damping == (math.inf, pytest.approx(1e-4), 2.0)
    assert eased(1.0, 8.0, 0.5) == (math.inf, 1.0, 2.0)  # half the promised decrease: as it was
    damping = eased(*eased(1.0, 2.0, -1.0)[1:], -math.inf)
    assert damping == (math.inf, 8.0, 8.0)


def chain(n, free):
    """Residuals of a chain of n points, with or without the row that says where it hangs."""
    target = np.sin(np.arange(n - 1.0))

    def fun(x):
        links = np.diff(x) + 0.1 * np.diff(x) ** 3 - target
        return links if free else np.append(links, x[0])

    return fun


@pytest.mark.parametrize(
    ("n", "free", "leads"), [(80, True, True), (80, False, False), (20, True, False)]
)
def test_mu_leads_where_many_parameters_have_an_open_direction(n, free, leads):
    fun = chain(n, free)
    square = lambda x: np.append(fun(x), 0 * x[:2])  # noqa: E731  (m >= n)
    result = least_squares(square, np.zeros(n))
    assert math.isinf(result.state.damping.radius) == leads
    assert result.success
    assert result.cost < 1e-20
