"""Difference Jacobians: accurate at any size of a parameter, and never outside the bounds."""

import numpy as np
import pytest

from lmsolve import _numdiff
from lmsolve._numdiff import Differences
from lmsolve._xp import array_namespace, sum_squares
from tests.tools import Counted

KINDS = ["2-point", "3-point", "cs"]
ACCURACY = {"2-point": 1e-6, "3-point": 1e-9, "cs": 1e-14}
SIZES = np.array([1e-7, 1.0, 1e7])


def squares(a):
    return sum_squares(array_namespace(a), a)


def fun(x):
    """Each row of the order of 1 in parameters of very different sizes."""
    u = x / SIZES
    return np.stack([np.sin(u[0]) * u[1], np.exp(0.3 * u[1]), u[2] ** 2 + u[0], u[0] * u[1] * u[2]])


def jac(x):
    u = x / SIZES
    rows = [
        [np.cos(u[0]) * u[1], np.sin(u[0]), 0],
        [0, 0.3 * np.exp(0.3 * u[1]), 0],
        [1, 0, 2 * u[2]],
        [u[1] * u[2], u[0] * u[2], u[0] * u[1]],
    ]
    return np.array(rows) / SIZES


def differences(kind, x, **options):
    return Differences(kind, np.where(x != 0, np.abs(x), 1.0), **options)


def assert_accurate(J, x, kind):
    np.testing.assert_allclose(J * SIZES, jac(x) * SIZES, rtol=0, atol=20 * ACCURACY[kind])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_accurate_at_any_size(kind, sign):
    x = sign * 1.3 * SIZES
    J = _numdiff.dense(differences(kind, x), fun, x, fun(x), None)
    assert_accurate(J, x, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_accurate_at_zero(kind):
    x = np.array([1.3e-7, 0.0, 0.0])  # typical sizes 1.3e-7, 1, 1: the last is 1e7 in truth
    J = _numdiff.dense(differences(kind, x), fun, x, fun(x), None)
    np.testing.assert_allclose(J[:, 1], jac(x)[:, 1], atol=20 * ACCURACY[kind])
    assert np.isfinite(J).all()


def test_a_parameter_on_its_way_through_zero_keeps_a_floor():
    diff = Differences("2-point", np.array([2.0]))
    h, _ = diff.steps(np.array([1e-30]))
    assert h[0] == pytest.approx(2.0 * _numdiff.FLOOR * 2.0**-26, rel=1e-6)


@pytest.mark.parametrize("x", [5e-324, 1e-310, 1e300])
def test_steps_never_vanish(x):
    for kind in ("2-point", "3-point"):
        h, _ = Differences(kind, np.array([abs(x)])).steps(np.array([x]))
        assert np.isfinite(h[0]) and x + h[0] != x


@pytest.mark.parametrize("step", [1e-4, np.array([1e-4, 1e-3, 1e-5])], ids=["one", "each"])
def test_relative_steps_are_obeyed(step):
    x = 1.3 * SIZES
    h, _ = differences("2-point", x, rel_step=step).steps(x)
    np.testing.assert_allclose(h, step * x, rtol=1e-9)


def test_the_number_of_evaluations():
    x = 1.3 * SIZES
    for kind, expected in (("2-point", 3), ("3-point", 6), ("cs", 3)):
        counted = Counted(fun)
        _numdiff.dense(differences(kind, x), counted, x, fun(x), None)
        assert counted.calls == expected


def test_held_columns_are_zero_and_cost_nothing():
    x, counted = 1.3 * SIZES, Counted(fun)
    held = np.array([False, True, False])
    J = _numdiff.dense(differences("2-point", x, held=held), counted, x, fun(x), None)
    assert counted.calls == 2
    np.testing.assert_array_equal(J[:, 1], 0)
    np.testing.assert_allclose((J * SIZES)[:, [0, 2]], (jac(x) * SIZES)[:, [0, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", ["2-point", "3-point"])
@pytest.mark.parametrize("room", [0.0, 1e-9, 1e-5, 1.0])
@pytest.mark.parametrize("side", ["lower", "upper", "both"])
def test_never_outside_the_bounds(kind, room, side):
    x = 1.3 * SIZES
    near, far = room * np.abs(x), np.full(3, np.inf)
    lb = x - (far if side == "upper" else near)
    ub = x + (far if side == "lower" else np.where(side == "both", 1e-3 * np.abs(x), near))
    counted = Counted(fun)
    J = _numdiff.dense(differences(kind, x, lb=lb, ub=ub), counted, x, fun(x), None)
    points = np.array(counted.points)
    assert np.all((points >= lb) & (points <= ub))
    if side != "both" or room == 0.0:
        tolerance = 1e-4 if kind == "2-point" else 1e-7
        np.testing.assert_allclose(J * SIZES, jac(x) * SIZES, atol=tolerance)


def test_random_boxes_are_never_left():
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = SIZES * rng.standard_normal(3)
        widths = np.abs(x) * 10.0 ** rng.uniform(-17, 1, (2, 3)) * rng.integers(0, 2, (2, 3))
        widths[1] = np.where(widths.any(axis=0), widths[1], 1e-3 * np.abs(x))
        lb, ub = x - widths[0], x + widths[1]
        stuck = (lb == x) & (ub == x)  # narrower than the spacing of floats: fixed
        kind = rng.choice(["2-point", "3-point"])
        counted = Counted(fun)
        diff = differences(kind, x, lb=lb, ub=ub, held=stuck)
        _numdiff.dense(diff, counted, x, fun(x), None)
        points = np.array(counted.points).reshape(-1, 3)
        assert np.all((points >= lb) & (points <= ub))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounded", [False, True])
def test_grouped_equals_dense(kind, bounded):
    rng = np.random.default_rng(2)
    n = 12
    band = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    A = rng.standard_normal((n, n)) * band

    def banded(x):
        return A @ x**2 + x**3

    x = rng.uniform(0.5, 1.5, n)
    box = {"lb": x - 0.0, "ub": x + 1.0} if bounded and kind != "cs" else {}
    structure, counted = _numdiff.sparsity(band), Counted(banded)
    diff = differences(kind, x, **box)
    J = _numdiff.grouped(diff, structure, counted, x, banded(x)).toarray()
    dense = _numdiff.dense(diff, banded, x, banded(x), None)
    np.testing.assert_allclose(J, dense, atol=100 * ACCURACY[kind] ** 1.5 + 1e-12)
    groups, rest = divmod(counted.calls, 2 if kind == "3-point" else 1)
    assert rest == 0
    assert 3 <= groups <= 5  # not 12
    if bounded:
        assert np.all(np.array(counted.points).real >= x)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_evaluate_the_same_points(kind):
    x, calls = 1.3 * SIZES, []

    def mapped(function, points):
        calls.append(len(points))
        return [function(p) for p in points]

    J = _numdiff.dense(differences(kind, x, map=mapped), fun, x, fun(x), None)
    np.testing.assert_array_equal(J, _numdiff.dense(differences(kind, x), fun, x, fun(x), None))
    assert calls == [6 if kind == "3-point" else 3]


@pytest.mark.parametrize("kind", ["2-point", "3-point"])
@pytest.mark.parametrize("bounded", [False, True])
def test_every_library(xp, kind, bounded):
    def f(x):
        return xp.namespace.stack([x[0] ** 2, x[0] * x[1], x[1] ** 3])

    host = np.array([1.5, -0.8])
    box = {"lb": host - 0.0, "ub": host + 1.0} if bounded else {}
    x = xp.array(host)
    diff = Differences(kind, np.abs(host), precision=xp.eps, **box)
    J = xp.host(_numdiff.dense_xp(diff, f, x, xp.host(x), f(x), squares))
    exact = [[3.0, 0], [-0.8, 1.5], [0, 1.92]]
    np.testing.assert_allclose(J, exact, atol=20 * xp.eps ** (0.5 if kind == "2-point" else 0.66))


def test_held_columns_in_every_library(xp):
    x = xp.array([1.0, 2.0])
    diff = Differences("2-point", np.ones(2), precision=xp.eps, held=np.array([True, False]))
    J = xp.host(_numdiff.dense_xp(diff, lambda x: x * x, x, xp.host(x), x * x, squares))
    np.testing.assert_allclose(J, [[0, 0], [0, 4]], rtol=1e4 * xp.eps**0.5)


def resonance(x):
    """Curved on a scale of 1e4 at 6e9: the size of the parameter says nothing of it."""
    u = (x[0] - 6e9) / 1e4
    return np.stack([1 / (1 + u**2), u / (1 + u**2), 1e-3 * x[1]])


@pytest.mark.parametrize("mapped", [False, True])
def test_central_differences_find_the_scale_of_the_curvature(mapped):
    x, counted = np.array([6e9 + 3e3, 2.0]), Counted(resonance)
    options = {"map": lambda f, points: [f(p) for p in points]} if mapped else {}
    J = _numdiff.dense(differences("3-point", x, **options), counted, x, resonance(x), None)
    u = 0.3
    exact = np.array([-2 * u, 1 - u**2]) / (1 + u**2) ** 2 / 1e4
    np.testing.assert_allclose(J[:2, 0], exact, rtol=1e-5)
    np.testing.assert_allclose(J[2], [0, 1e-3], rtol=1e-9)
    assert counted.calls == 6  # the first column twice


def test_central_differences_in_every_library_find_it_too(xp):
    scale = 1e-3 if xp.is_single else 1e-6

    def f(x):
        return xp.namespace.stack([xp.namespace.exp((x[0] - 1.0) / scale), x[0]])

    host = np.array([1.0])
    x = xp.array(host)
    diff = Differences("3-point", host, precision=xp.eps)
    J = xp.host(_numdiff.dense_xp(diff, f, x, host, f(x), squares))
    np.testing.assert_allclose(J[:, 0] * [scale, 1], 1, rtol=0.02 if xp.is_single else 1e-4)


def test_central_differences_stay_in_the_domain_of_the_function(xp):
    room = 1e-3 if xp.is_single else 1e-6  # shorter than the usual step

    def f(x):
        with np.errstate(invalid="ignore"):
            return xp.namespace.stack([xp.namespace.sqrt(x[0] - (1.0 - room)), x[0]])

    host = np.array([1.0])
    x = xp.array(host)
    diff = Differences("3-point", host, precision=xp.eps)
    J = xp.host(_numdiff.dense_xp(diff, f, x, host, f(x), squares))
    np.testing.assert_allclose(J[:, 0] * [2.0 * room**0.5, 1], 1, rtol=0.02)
    if xp.namespace is np:
        J = _numdiff.dense(diff, f, x, f(x), None)
        np.testing.assert_allclose(J[:, 0] * [2.0 * room**0.5, 1], 1, rtol=0.02)


def test_noise_is_not_taken_for_curvature():
    rng = np.random.default_rng(0)

    def noisy(x):
        return x[0] * np.ones(50) + 1e-7 * rng.standard_normal(50)

    x = np.array([1.0])
    diff = Differences("3-point", x)
    J = _numdiff.dense(diff, noisy, x, noisy(x), None)
    np.testing.assert_allclose(J, 1, atol=4 * 1e-7 / 6e-6)  # the noise over the usual step


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("kind", ["2-point", "3-point"])
def test_a_function_that_fills_one_array(kind, one_sided):
    buffer = np.empty(4)

    def filled(x):
        buffer[:] = fun(x)
        return buffer

    x = 1.3 * SIZES
    box = {"lb": x, "ub": 2 * x} if one_sided else {}
    J = _numdiff.dense(differences(kind, x, **box), filled, x, fun(x), None)
    np.testing.assert_allclose(J * SIZES, jac(x) * SIZES, atol=20 * ACCURACY["2-point"])
