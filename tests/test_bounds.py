"""Boxes: what is clipped, what is held, and how optimal a bounded point is."""

import numpy as np
import pytest

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
    lb, ub = np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, INF])
    np.testing.assert_array_equal(active_mask(np.array([0.0, 1.0, 0.5]), lb, ub), [-1, 1, 0])


def test_optimality_vanishes_exactly_at_first_order_points():
    lb, ub = np.array([0.0, -INF, 0.0]), np.array([1.0, INF, 4.0])
    x = np.array([0.0, 3.0, 4.0])
    assert optimality(x, np.array([5.0, 0.0, -7.0]), lb, ub) == 0
    assert optimality(x, np.array([-5.0, 0.0, 0.0]), lb, ub) == 5  # 1 away from the other bound
    assert optimality(x, np.array([0.0, -2.0, 0.0]), lb, ub) == 2
    assert optimality(x, np.array([0.0, 0.0, 3.0]), lb, ub) == 12
