"""The iteration in Python floats and the one in arrays are the same iteration."""

import numpy as np
import pytest

import lmsolve._fit as front
from lmsolve import least_squares
from lmsolve._tiny import PARAMETERS, Linearisation
from lmsolve._trust import SLACK
from tests.nist import CASES, load
from tests.problems import PROBLEMS
from tests.tools import Counted

SMALL = [(name, start) for name, start in CASES if load(name).n <= PARAMETERS]
#: Rounding turns the long way of the first three this way or that; the last trial of Misra1c
#: gains 1e-15 of a cost of 0.02, and rounding accepts it or not.
ROUNDED = ("Lanczos1", "Lanczos2", "Lanczos3", "Misra1c")
RNG = np.random.default_rng(4)


@pytest.fixture
def both(monkeypatch):
    """A call made twice: in floats, then in arrays; returns results and counted functions."""

    def run(fun, x0, *args, **options):
        used, results = [], []
        descent = front.Descent

        def spy(*arguments):
            used.append(arguments)
            return descent(*arguments)

        monkeypatch.setattr(front, "Descent", spy)
        for limit in (PARAMETERS, -1):
            monkeypatch.setattr(front, "TINY", limit)
            counted = Counted(fun)
            results.append((least_squares(counted, x0, *args, **options), counted.calls))
        assert len(used) == 1  # the first run only
        return results

    return run


def assert_same(floats, arrays):
    (one, calls_one), (two, calls_two) = floats, arrays
    assert one.success == two.success
    if one.cost > 1e-25:  # what residuals of rounding errors lead to is not the same
        assert (one.nfev, one.njev, one.nit) == (two.nfev, two.njev, two.nit)
        assert calls_one == calls_two
        assert one.status == two.status
        assert len(one.history) == len(two.history)
    trials = [[i for i in r.history if i.cost > 1e-25] for r in (one, two)]
    assert len(trials[0]) == len(trials[1]) > 0
    assert [i.accepted for i in trials[0]] == [i.accepted for i in trials[1]]
    assert [i.polishing for i in trials[0]] == [i.polishing for i in trials[1]]


@pytest.mark.parametrize(("name", "start"), SMALL)
def test_nist(both, name, start):
    p = load(name)
    floats, arrays = both(p.fun, p.starts[start], p.jac)
    if name not in ROUNDED:
        assert_same(floats, arrays)
    np.testing.assert_allclose(floats[0].x, arrays[0].x, rtol=1e-10)


@pytest.mark.parametrize(("name", "start"), SMALL)
def test_nist_by_differences(both, name, start):
    p = load(name)
    (floats, _), (arrays, _) = both(p.fun, p.starts[start])
    assert floats.success and arrays.success
    np.testing.assert_allclose(floats.x, arrays.x, rtol=2e-7)


OPTIONS = [{}, {"max_nfev": 5}, {"polish": False}, {"ftol": 1e-3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["rosenbrock", "bard", "kowalik_osborne", "gaussian", "box_3d"])
def test_same_counts_and_status(both, name, options):
    p = PROBLEMS[name]
    floats, arrays = both(p.fun, p.x0, p.jac, **options)
    assert_same(floats, arrays)
    np.testing.assert_allclose(floats[0].x, arrays[0].x, rtol=1e-9, atol=1e-12)
    if floats[0].cost > 1e-25:
        assert floats[0].message.split(":")[0] == arrays[0].message.split(":")[0]


@pytest.mark.parametrize("name", ["linear_rank_1", "powell_singular", "linear_rank_1_zeros"])
def test_singular_systems_go_over_to_arrays(both, name):
    p = PROBLEMS[name]
    floats, arrays = both(p.fun, p.x0, p.jac)
    assert floats[0].cost == pytest.approx(arrays[0].cost, rel=1e-9, abs=1e-20)
    assert floats[0].success


def test_wide_problems_go_over_at_once(both):
    floats, arrays = both(lambda x: np.array([x[0] + x[1] - 1, x[1] * x[2]]), [1.0, 2.0, 3.0])
    assert_same(floats, arrays)
    np.testing.assert_array_equal(floats[0].x, arrays[0].x)


def test_a_jacobian_that_is_sparse_goes_over_and_is_not_asked_for_twice(both):
    from scipy.sparse import csr_array

    p = PROBLEMS["rosenbrock"]
    jac = Counted(lambda x: csr_array(p.jac(x)))
    floats, arrays = both(p.fun, p.x0, jac)
    assert_same(floats, arrays)
    assert jac.calls == floats[0].njev + arrays[0].njev


@pytest.fixture
def linearisation():
    J = RNG.standard_normal((8, 5)) * [1.0, 10.0, 1e-3, 1.0, 5.0]
    lin = Linearisation(J, RNG.standard_normal(8), None, np.ones(5))
    assert lin.sound
    return lin


@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5])
def test_damped_steps_have_the_length_of_the_radius(linearisation, share):
    radius = share * np.sqrt(linearisation.square)
    trial = linearisation.damped(radius)
    p, squares = -trial.back, np.array(linearisation.squares)
    G, g = linearisation.G, linearisation.gradient
    assert (1 - SLACK) * radius <= trial.length <= radius * (1 + 1e-12)
    assert trial.length == pytest.approx(np.sqrt(squares @ p**2))
    assert trial.slope == pytest.approx(p @ g)
    assert trial.predicted == pytest.approx(-p @ g - 0.5 * p @ G @ p, rel=1e-9)
    expected = np.linalg.solve(G + trial.mu * np.diag(squares), -g)
    expected *= trial.length / np.sqrt(squares @ expected**2)
    np.testing.assert_allclose(p, expected, rtol=1e-9)


def test_an_undamped_step(linearisation):
    G, g, squares = linearisation.G, linearisation.gradient, np.array(linearisation.squares)
    p = np.linalg.solve(G, -g)
    np.testing.assert_allclose(-linearisation.back, p, rtol=1e-9)
    assert linearisation.slope == pytest.approx(g @ p)
    assert linearisation.square == pytest.approx(squares @ p**2)


@pytest.mark.parametrize("bad", [0.0, 1e-5, np.nan])
def test_ill_conditioned_systems_are_left_to_the_general_solver(bad):
    J = np.array([[1.0, 1.0], [0.0, bad], [0.0, 0.0]])
    assert not Linearisation(J, np.ones(3), None, np.ones(2)).sound


def test_a_jacobian_that_is_not_finite_is_told_at_x0_and_rejected_later():
    def jac(x, calls=[]):  # noqa: B006
        calls.append(x)
        return np.array([[1.0], [np.nan if len(calls) > 1 else 1.0]])

    with pytest.raises(ValueError, match="`jac` must be finite at `x0`, got 1 entries"):
        least_squares(
            lambda x: x - np.array([1.0, 2.0]), [0.0], lambda x: np.full((2, 1), [[1], [np.nan]])
        )
    result = least_squares(lambda x: np.array([x[0] - 1.0, x[0] ** 2]), [3.0], jac)
    assert result.status == -3


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("gtol", [1e-12, 2.3e-16])
def test_a_gradient_test_that_rounding_keeps_from_firing(both, gtol, scale):
    """No step gains anything, and the radius shrinks until nothing is left of it."""
    t = np.linspace(0, 4, 50)
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.05 * np.cos(7.0 * np.arange(50.0))

    def fun(x):
        return x[0] / scale * np.exp(-x[1] * t) + x[2] - y

    results = both(fun, [scale, 1.0, 0.1], ftol=None, xtol=None, gtol=gtol, max_nfev=1000)
    for result, _ in results:
        assert not result.success and result.status in (-5, 0)
        np.testing.assert_allclose(result.x, results[1][0].x, rtol=1e-7)


def test_a_nan_beside_a_column_of_zeros_is_left_to_the_general_solver():
    J = np.array([[np.nan, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert not Linearisation(J, np.ones(3), None, np.ones(2)).sound
    assert not Linearisation(np.zeros((3, 2)), np.ones(3), [1.0, 1.0], np.ones(2)).sound


def test_an_attribute_of_the_users_function_is_the_users():
    class Line:
        differences = words = stays = "those of the user"

        def __call__(self, x, offset=0.0):
            return offset + x[0] + x[1] * np.arange(5.0) - np.array([1.0, 3.0, 5.0, 7.0, 9.5])

    line = Line()
    np.testing.assert_allclose(least_squares(line, [0.5, 0.5]).x, [0.9, 2.1], atol=1e-7)
    with pytest.raises(ValueError, match="`fun` must return finite residuals at `x0`"):
        least_squares(line, [np.finfo(float).max, 0.0], args=(np.inf,))
