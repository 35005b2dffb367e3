"""The damping policy by arithmetic."""

import math

import pytest

from lmsolve._damping import ACCEPT, Damping, interpolated, updated


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
    assert updated(4.0, 2.0, ratio, length, shrink) == pytest.approx(expected, rel=1e-15)


def test_an_undamped_fair_step_doubles():
    assert updated(4.0, 0.0, 0.5, 3.0, 0.5) == (6.0, 0.0)


def test_accept_reject_accept():
    damping = updated(8.0, 4.0, 1.0, 8.0, 0.5)
    assert damping == (16.0, 2.0)
    damping = updated(*damping, -1.0, 16.0, 0.25)
    assert damping == (4.0, 8.0)
    assert updated(*damping, 0.5, 4.0, 0.5) == (4.0, 8.0)


def test_the_first_radius_is_at_most_the_first_step():
    assert Damping(10.0, 1.0).first(3.0) == (3.0, 1.0)
    assert Damping(10.0, 1.0).first(30.0) == (10.0, 1.0)


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
