"""The iteration in Python floats and the one in arrays are the same iteration."""

import numpy as np
import pytest

import lmsolve._fit as front
from lmsolve import least_squares
from lmsolve._tiny import PARAMETERS, back, cholesky, damped, dot, forward, product
from tests.nist import CASES, load
from tests.problems import PROBLEMS
from tests.tools import Counted

SMALL = [(name, start) for name, start in CASES if load(name).n <= PARAMETERS]
RNG = np.random.default_rng(4)
MATRIX = np.corrcoef(RNG.standard_normal((5, 8)))
LOWER = [list(row[: i + 1]) for i, row in enumerate(MATRIX)]
B = [0.3, -1.2, 0.8, 0.1, 2.0]


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
    assert (one.nfev, one.njev, one.nit) == (two.nfev, two.njev, two.nit)
    assert calls_one == calls_two
    assert one.success == two.success
    if one.cost > 1e-25:  # at a residual of rounding errors any of the tests may come first
        assert one.status == two.status
    assert len(one.history) == len(two.history)
    assert [i.accepted for i in one.history] == [i.accepted for i in two.history]
    assert [i.polishing for i in one.history] == [i.polishing for i in two.history]


@pytest.mark.parametrize(("name", "start"), SMALL)
def test_nist(both, name, start):
    p = load(name)
    floats, arrays = both(p.fun, p.starts[start], p.jac)
    if "Lanczos" not in name:  # rounding turns their long way this way or that
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


def test_cholesky():
    L, y = cholesky(LOWER, B, 0.1)
    expected = np.linalg.cholesky(MATRIX + 0.1 * np.eye(5))
    for i, row in enumerate(L):
        np.testing.assert_allclose(row, expected[i, : i + 1], rtol=1e-13)
    np.testing.assert_allclose(y, np.linalg.solve(expected, B), rtol=1e-13)
    np.testing.assert_allclose(forward(L, B), y, rtol=1e-13)
    np.testing.assert_allclose(back(L, y), np.linalg.solve(expected @ expected.T, B), rtol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, 0.0, 1e-9, np.nan])
def test_cholesky_refuses_small_pivots(bad):
    assert cholesky([[1.0], [0.0, bad]], [1.0, 1.0], 0.0) is None


def test_products():
    assert dot(B, B) == pytest.approx(np.dot(B, B))
    assert product(LOWER, B) == pytest.approx(np.array(B) @ MATRIX @ B)


@pytest.mark.parametrize("radius", [1e-4, 0.1, 1.0])
def test_damped_steps_have_the_length_of_the_radius(radius):
    trial = damped(LOWER, B, radius)
    q = np.array(trial.q)
    assert 0.9 * radius <= trial.length <= 1.1 * radius
    assert trial.length == pytest.approx(np.linalg.norm(q))
    assert trial.slope == pytest.approx(-q @ B)
    assert trial.predicted == pytest.approx(q @ B - 0.5 * q @ MATRIX @ q)


def test_an_undamped_step():
    trial = damped(LOWER, B, 1e6)
    np.testing.assert_allclose(trial.q, np.linalg.solve(MATRIX, B), rtol=1e-10)
    assert trial.mu == 0
    assert trial.predicted == pytest.approx(0.5 * np.dot(trial.q, B))
