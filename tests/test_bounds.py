"""Boxes: what is clipped, what is held, and how optimal a bounded point is."""

import numpy as np
import pytest

from lmsolve import least_squares
from lmsolve._bounds import Box, active_mask, optimality

INF = np.inf


@pytest.fixture
def box(xp):
    return Box(xp.array([0.0, -INF, -1.0, 2.0]), xp.array([1.0, 5.0, INF, 2.0]))


def test_clip(xp, box):
    x = box.clip(xp.namespace, xp.array([-0.5, 7.0, 100.0, 0.0]))
    np.testing.assert_array_equal(xp.host(x), [0, 5, 100, 2])


def test_outside(xp, box):
    outside = box.outside(xp.array([1.0, 5.5, -2.0, 2.0]))
    assert [bool(v) for v in outside] == [False, True, True, False]


@pytest.mark.parametrize(
    ("x", "grad", "held"),
    [
        ([0.0, 5.0, 0.0], [1.0, -1.0, 1.0], [True, True, False]),  # pressed
        ([0.0, 5.0, 0.0], [-1.0, 1.0, 1.0], [False, False, False]),  # released
        ([0.5, 4.0, -1.0], [1.0, -1.0, 1.0], [False, False, True]),  # inside, at the third
    ],
)
def test_held(xp, box, x, grad, held):
    found = box.held(xp.array([*x, 2.0]), xp.array([*grad, 0.1]))
    assert [bool(v) for v in found] == [*held, True]  # the last one is fixed


def test_active_mask():
    lb, ub = np.zeros(5), np.array([1.0, 1.0, INF, 1.0, 1.0])
    x = np.array([0.0, 1.0, 0.5, 1.0 - 1e-9, 1e-9])
    reach, grad = np.full(5, 1e-8), np.array([1.0, -1.0, 0.0, -1.0, 1.0])
    np.testing.assert_array_equal(active_mask(x, lb, ub, grad, reach), [-1, 1, 0, 1, -1])
    np.testing.assert_array_equal(active_mask(x, lb, ub, -grad, reach), [-1, 1, 0, 0, 0])
    np.testing.assert_array_equal(active_mask(x, lb, ub, grad, 0.0 * reach), [-1, 1, 0, 0, 0])


def test_a_parameter_that_ends_just_short_of_its_bound_counts_as_at_it():
    t = np.linspace(0.1, 10, 20)
    rng = np.random.default_rng(0)
    short = 0
    for _ in range(40):
        true = rng.uniform([1, 0.5], [5, 3])
        y = true[0] * t / (true[1] + t) + 0.03 * rng.standard_normal(20)
        bounds = ([0.6, 0.25], [4.2, 2.5])
        result = least_squares(lambda p, y=y: p[0] * t / (p[1] + t) - y, [2.0, 1.0], bounds=bounds)
        pressed = np.abs(result.grad) > 1e-5
        assert np.array_equal(result.active_mask != 0, pressed)
        assert np.array_equal(result.standard_errors() == 0, pressed)
        short += int(np.any(pressed & (result.x > bounds[0]) & (result.x < bounds[1])))
    assert short > 0


def test_optimality_vanishes_exactly_at_first_order_points():
    lb, ub = np.array([0.0, -INF, 0.0]), np.array([1.0, INF, 4.0])
    x = np.array([0.0, 3.0, 4.0])
    assert optimality(x, np.array([5.0, 0.0, -7.0]), lb, ub) == 0
    assert optimality(x, np.array([-5.0, 0.0, 0.0]), lb, ub) == 5  # 1 away from the other bound
    assert optimality(x, np.array([0.0, -2.0, 0.0]), lb, ub) == 2
    assert optimality(x, np.array([0.0, 0.0, 3.0]), lb, ub) == 12
