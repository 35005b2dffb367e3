"""The front door: every form of problem that it takes, and the result that it gives back."""

import copy
import pickle
import sys
import tracemalloc
import types
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.optimize
from scipy.sparse import csc_matrix, csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from lmsolve import least_squares
from tests.tools import Counted, Decay, rosenbrock, rosenbrock_jac

DECAY = Decay()
X0 = DECAY.x0
BEST = scipy.optimize.least_squares(DECAY.fun, X0, DECAY.jac, xtol=1e-15, ftol=1e-15, gtol=1e-15)


def assert_best(result, rtol=1e-8):
    assert result.success
    np.testing.assert_allclose(result.x, BEST.x, rtol=rtol)
    assert result.cost == pytest.approx(BEST.cost, rel=1e-12)


def blocks(x, size=15):
    """Row blocks of the decay fit."""
    r, J = DECAY.fun(x), DECAY.jac(x)
    return ((r[i : i + size], J[i : i + size]) for i in range(0, 40, size))


def operator(x):
    """A Jacobian that can only be multiplied with."""
    J = DECAY.jac(x)
    return LinearOperator(J.shape, matvec=lambda p: J @ p, rmatvec=lambda z: J.T @ z)


# Jacobians.


@pytest.mark.parametrize("scheme", ["2-point", "3-point", "cs"])
def test_differences(scheme):
    result = least_squares(DECAY.fun, X0, scheme)
    assert_best(result)
    np.testing.assert_allclose(result.jac, DECAY.jac(result.x), atol=1e-7)


@pytest.mark.parametrize(
    "jac",
    [DECAY.jac, lambda x: DECAY.jac(x).tolist(), lambda x: csr_array(DECAY.jac(x)),
     lambda x: csc_matrix(DECAY.jac(x)), operator, lambda x: aslinearoperator(DECAY.jac(x)),
     blocks],
    ids=["dense", "list", "csr", "csc matrix", "operator", "aslinearoperator", "blocks"],
)  # fmt: skip
def test_every_kind_of_jacobian(jac):
    assert_best(least_squares(DECAY.fun, X0, jac))


@pytest.mark.parametrize("loss", ["linear", "huber"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_fit_copies_no_jacobian_and_keeps_one_at_a_time(order, loss):
    rng = np.random.default_rng(0)
    m, n = 80_000, 100
    A = rng.standard_normal((m, n))
    y = np.tanh(A @ rng.normal(0, 0.1, n)) + 0.01 * rng.standard_normal(m)
    kept = []

    def jac(x):
        assert not kept or kept[-1]() is None
        J = np.empty((m, n), order=order)
        np.multiply(A, (1.0 - np.tanh(A @ x) ** 2)[:, None], out=J)
        kept.append(weakref.ref(J))
        return J

    options = {"loss": loss, "f_scale": 0.01}
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = least_squares(lambda x: np.tanh(A @ x) - y, np.zeros(n), jac, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.success and result.njev > 2
    assert result.jac is kept[-1]()
    assert peak - before <= 1.5 * A.nbytes  # J itself, and a block of weighted rows


def test_residuals_in_blocks_too():
    def fun(x):
        return (r for r, _ in blocks(x, 7))

    result = least_squares(fun, X0, blocks)
    assert_best(result)
    assert result.fun is None and result.jac is None
    dense = least_squares(DECAY.fun, X0, DECAY.jac)
    assert (result.nfev, result.njev) == (dense.nfev, dense.njev)
    np.testing.assert_allclose(result.covariance(), dense.covariance(), rtol=1e-7)


@pytest.mark.parametrize("loss", ["huber", "cauchy"])
def test_blocks_with_a_loss(loss):
    options = {"loss": loss, "f_scale": 0.03}
    dense = least_squares(DECAY.fun, X0, DECAY.jac, **options)
    streamed = least_squares(lambda x: (r for r, _ in blocks(x)), X0, blocks, **options)
    np.testing.assert_allclose(streamed.x, dense.x, rtol=1e-8)
    assert streamed.cost == pytest.approx(dense.cost, rel=1e-12)


def test_one_function_for_residuals_and_jacobian():
    both = Counted(lambda x: (DECAY.fun(x), DECAY.jac(x)))
    result = least_squares(both, X0, True)
    assert_best(result)
    assert both.calls <= result.nfev + result.njev
    assert result.njev > 0


@pytest.mark.parametrize("name", ["exact", "lsmr"])
def test_tr_solver(name):
    assert_best(least_squares(DECAY.fun, X0, DECAY.jac, tr_solver=name), rtol=1e-6)


def test_sparse_differences_are_grouped():
    n = 60

    def fun(x):
        padded = np.concatenate([[1.0], x, [2.0]])
        return padded[1:-1] ** 2 - 0.5 * (padded[:-2] + padded[2:])

    structure = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    counted = Counted(fun)
    result = least_squares(counted, np.full(n, 1.5), jac_sparsity=structure)
    dense = least_squares(fun, np.full(n, 1.5))
    assert result.success and result.jac.shape == (n, n) and hasattr(result.jac, "tocsr")
    np.testing.assert_allclose(result.x, dense.x, rtol=1e-7)
    assert counted.calls <= result.nfev + 10 * result.njev  # not 60


# Shapes.


@pytest.mark.parametrize("jac", ["2-point", lambda x: np.array([[1.0, 2.0, -1.0]])])
def test_wide_problems_go_to_the_nearest_solution(jac):
    result = least_squares(lambda x: np.array([x[0] + 2 * x[1] - x[2] - 3]), [1.0, 1.0, 1.0], jac)
    assert result.success and result.cost < 1e-25
    # All columns of the same size would give x0 + 1/6 (1, 2, -1); the scale weighs each by its own.
    assert result.x.shape == (3,) and np.isfinite(result.x).all()


def test_rank_deficient_problems_report_their_rank():
    result = least_squares(lambda x: np.array([x[0] + x[1] - 1, x[0] + x[1] - 1, 0.0]), [3.0, 1.0])
    assert result.success and result.rank == 1
    np.testing.assert_allclose(result.x, [1.5, -0.5], atol=1e-7)
    assert least_squares(DECAY.fun, X0).rank == 3


@pytest.mark.parametrize("x0", [1.0, [1.0], np.array(1.0), np.array([1], dtype=int)], ids=repr)
def test_scalars(x0):
    result = least_squares(lambda x: (x - 3.0) ** 2 + 1.0, x0)
    assert result.x.shape == (1,) and result.fun.shape == (1,)
    np.testing.assert_allclose(result.x, 3.0, atol=1e-3)


def test_a_parameter_without_influence_stays():
    result = least_squares(lambda x: np.array([x[0] - 1, 2 * x[0] - 2]), [5.0, 7.0])
    assert result.success
    np.testing.assert_allclose(result.x, [1.0, 7.0])


def test_args_and_kwargs():
    def fun(x, t, y, *, offset):
        return DECAY.model(t, *x) - y + offset

    result = least_squares(fun, X0, args=(DECAY.t, DECAY.y), kwargs={"offset": 0.0})
    assert_best(result)


def test_a_function_that_fills_one_array():
    buffer = np.empty(40)

    def fun(x):
        buffer[:] = DECAY.fun(x)
        return buffer

    result = least_squares(fun, X0)
    assert_best(result)
    np.testing.assert_array_equal(result.fun, DECAY.fun(result.x))


@pytest.mark.parametrize("idle", [0, 5])
@pytest.mark.parametrize("wrap", [lambda b: b[:40], lambda b: np.frombuffer(b, count=40)])
def test_a_function_that_returns_views_of_one_array(wrap, idle):
    """Each view is another object: what tells is where it lies. Idle parameters: no tiny fit."""
    buffer = np.empty(60)

    def fun(x):
        buffer[:40] = DECAY.fun(x[:3]) + (x[3:] ** 2).sum()
        return wrap(buffer)

    result = least_squares(fun, np.append(X0, np.zeros(idle)))
    np.testing.assert_allclose(result.x[:3], least_squares(DECAY.fun, X0).x, rtol=1e-6)
    np.testing.assert_array_equal(result.fun, fun(result.x))


def test_a_jacobian_that_fills_one_array():
    buffer = np.empty((40, 3))

    def jac(x):
        buffer[:] = DECAY.jac(x)
        return buffer

    result = least_squares(DECAY.fun, X0, jac)
    assert_best(result)
    before = result.standard_errors()
    result.confidence_intervals()
    np.testing.assert_array_equal(result.standard_errors(), before)


def test_a_jacobian_of_python_objects():
    """As SymPy's functions give, for one."""
    assert_best(least_squares(DECAY.fun, X0, lambda x: DECAY.jac(x).astype(object)))


@pytest.mark.parametrize("sparse", [False, True])
def test_one_function_for_both_that_fills_one_matrix(sparse):
    """A rejected trial leaves its Jacobian in the matrix that the next trial needs."""
    buffer = csr_array(np.ones((40, 3))) if sparse else np.empty((40, 3))

    def both(x):
        if sparse:
            buffer.data[:] = DECAY.jac(x).ravel()
        else:
            buffer[:] = DECAY.jac(x)
        return DECAY.fun(x), buffer

    start = [1.0, -2.0, 0.0]
    result = least_squares(both, start, True, max_nfev=50)
    expected = least_squares(DECAY.fun, start, lambda x: both(x)[1].copy(), max_nfev=50)
    assert not all(i.accepted for i in result.history)
    np.testing.assert_array_equal(result.x, expected.x)


def test_the_caller_keeps_x0():
    x0 = X0.copy()
    least_squares(DECAY.fun, x0)
    np.testing.assert_array_equal(x0, X0)


def test_attributes_of_a_callable_do_not_make_it_a_problem():
    class Linear:
        def __call__(self, x):
            return DECAY.fun(x)

        def linearize(self):
            raise AssertionError

    assert_best(least_squares(Linear(), X0))
    assert_best(least_squares(Mock(side_effect=DECAY.fun), X0))


# Complex numbers.


def complex_fit(z0, **options):
    """a exp(-b t) with complex a and b."""
    t, true = np.linspace(0, 2, 25), np.array([2 - 1j, 0.5 + 3j])
    y = true[0] * np.exp(-true[1] * t) + 0.01 * (np.cos(40 * t) + 1j * np.sin(37 * t))

    def jac(z):
        e = np.exp(-z[1] * t)
        return np.stack([e, -z[0] * t * e], axis=1)

    if options.pop("exact", False):
        options["jac"] = jac
    return least_squares(lambda z: z[0] * np.exp(-z[1] * t) - y, z0, **options), true, jac


@pytest.mark.parametrize("exact", [False, True])
def test_complex_parameters(exact):
    result, true, jac = complex_fit([1.5 - 0.5j, 0.4 + 2.7j], exact=exact)
    assert result.success
    for value in (result.x, result.fun, result.jac, result.grad):
        assert value.dtype == complex
    assert (result.x.shape, result.fun.shape, result.jac.shape) == ((2,), (25,), (25, 2))
    np.testing.assert_allclose(result.x, true, atol=0.02)
    np.testing.assert_allclose(result.jac, jac(result.x), atol=1e-6)
    assert np.abs(jac(result.x).conj().T @ result.fun).max() < 1e-7
    assert result.cost == pytest.approx(0.5 * np.sum(np.abs(result.fun) ** 2))
    assert "x[0]" in str(result)


def test_complex_residuals_of_real_parameters():
    t = np.linspace(0, 2, 25)
    y = 2 * np.exp((1j * 3 - 0.5) * t)

    def fun(x):
        return x[0] * np.exp((1j * x[1] - x[2]) * t) - y

    result = least_squares(fun, [1.5, 2.8, 0.3])
    assert result.x.dtype == float and result.fun.dtype == complex
    np.testing.assert_allclose(result.x, [2, 3, 0.5], rtol=1e-8)


def test_a_fixed_complex_parameter():
    result, true, _ = complex_fit([2 - 1j, 0.4 + 2.7j], fixed=[True, False])
    assert result.x[0] == 2 - 1j
    np.testing.assert_allclose(result.x[1], true[1], atol=0.02)


# Bounds and fixed parameters.


def boxed(inner, lb, ub):
    """A function that fails outside its bounds."""

    def wrapped(x):
        assert np.all(x >= lb) and np.all(x <= ub), x
        return inner(x)

    return wrapped


BOXES = {
    "inactive": ([0, 0, -1], [9, 9, 9]),
    "one upper": ([0, 0, -1], [2.0, 9, 9]),
    "one lower": ([0, 1.6, -1], [9, 9, 9]),
    "two": ([0, 1.6, -1], [2.0, 9, 9]),
    "one-sided": ([-np.inf] * 3, [np.inf, 1.0, np.inf]),
    "narrow": ([0.9, 0.2, -0.1], [1.1, 0.4, 0.1]),
}


@pytest.mark.parametrize("jac", ["2-point", "3-point", "exact"])
@pytest.mark.parametrize("box", BOXES)
def test_bounds(box, jac):
    lb, ub = (np.array(b, dtype=float) for b in BOXES[box])
    x0 = np.clip(X0, lb, ub)
    jac = boxed(DECAY.jac, lb, ub) if jac == "exact" else jac
    result = least_squares(boxed(DECAY.fun, lb, ub), x0, jac, (lb, ub))
    theirs = scipy.optimize.least_squares(
        DECAY.fun, np.clip(x0, lb + 1e-6, ub - 1e-6), DECAY.jac, (lb, ub), xtol=1e-14, ftol=1e-14,
        gtol=1e-14,
    )  # fmt: skip
    assert result.success
    assert result.cost <= theirs.cost * (1 + 1e-9)
    np.testing.assert_allclose(result.x, theirs.x, atol=2e-5)
    expected = np.where(result.x == lb, -1, np.where(result.x == ub, 1, 0))
    np.testing.assert_array_equal(result.active_mask, expected)
    assert (np.abs(theirs.x - result.x) < 1e-3).all()
    assert result.optimality < 1e-6


@pytest.mark.parametrize(
    "bounds",
    [scipy.optimize.Bounds([0, 0, -1], [2, 9, 9]), ([0, 0, -1], [2, 9, 9]), (0.0, 2.0)],
    ids=["Bounds", "lists", "numbers"],
)
def test_forms_of_bounds(bounds):
    result = least_squares(DECAY.fun, X0, bounds=bounds)
    assert result.x[0] == 2.0 and result.active_mask[0] == 1


@pytest.mark.parametrize("way", ["fixed", "equal bounds"])
def test_fixed_parameters(way):
    options = {"fixed": [False, True, False]}
    if way == "equal bounds":
        options = {"bounds": ([-9, 0.3, -9], [9, 0.3, 9])}
    counted = Counted(DECAY.fun)
    result = least_squares(counted, X0, **options)
    assert result.success and result.x[1] == 0.3
    assert all(x[1] == 0.3 for x in counted.points)
    e = np.exp(-0.3 * DECAY.t)
    free = np.linalg.lstsq(np.stack([e, np.ones(40)], axis=1), DECAY.y)[0]
    np.testing.assert_allclose(result.x[[0, 2]], free, rtol=1e-7)


def test_a_start_on_a_bound_may_leave_it():
    result = least_squares(DECAY.fun, [0.0, 0.0, 0.0], bounds=(0, 9))
    assert_best(result)


@pytest.mark.parametrize("seed", range(10))
def test_random_bounded_problems_reach_first_order_points(seed):
    rng = np.random.default_rng(seed)
    A, b = rng.standard_normal((15, 6)), rng.standard_normal(15)
    lb, ub = -rng.uniform(0, 0.3, 6), rng.uniform(0, 0.3, 6)
    result = least_squares(boxed(lambda x: A @ x - b, lb, ub), np.zeros(6), bounds=(lb, ub))
    expected = scipy.optimize.lsq_linear(A, b, (lb, ub), tol=1e-14)
    assert result.success
    np.testing.assert_allclose(result.x, expected.x, atol=1e-7)


# Losses, scales, tolerances.


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy", "arctan"])
def test_losses(loss):
    outliers = np.where(np.arange(40) % 9 == 4, 1.5, 0.0)

    def fun(x):
        return DECAY.fun(x) + outliers

    options = {"loss": loss, "f_scale": 0.1}
    result = least_squares(fun, BEST.x, DECAY.jac, **options)
    theirs = scipy.optimize.least_squares(fun, BEST.x, DECAY.jac, xtol=1e-15, **options)
    assert result.success
    assert result.cost <= theirs.cost * (1 + 1e-9)
    np.testing.assert_array_equal(result.fun, fun(result.x))  # raw
    np.testing.assert_array_equal(result.jac, DECAY.jac(result.x))


def test_a_loss_of_ones_own():
    def half(z):
        return np.stack([0.5 * z, np.full_like(z, 0.5), np.zeros_like(z)])

    result = least_squares(DECAY.fun, X0, loss=half)
    np.testing.assert_allclose(result.x, BEST.x, rtol=1e-7)
    assert result.cost == pytest.approx(0.5 * BEST.cost)


@pytest.mark.parametrize("x_scale", [None, "jac", 1.0, [1.0, 2.0, 0.5], [1e-3, 1e3, 1.0]], ids=str)
def test_scales_change_the_way_not_the_end(x_scale):
    assert_best(least_squares(DECAY.fun, X0, DECAY.jac, x_scale=x_scale))


@pytest.mark.parametrize(("name", "status"), [("ftol", 2), ("xtol", 3), ("gtol", 1)])
def test_each_tolerance_alone(name, status):
    tolerances = {"ftol": None, "xtol": None, "gtol": None, name: 1e-6}
    result = least_squares(DECAY.fun, X0, DECAY.jac, **tolerances)
    assert (result.status, result.success) == (status, True)
    assert f"`{name}` reached: " in result.message and "<= 1.0e-06" in result.message
    assert_best(result)


# Workers.


def test_workers_as_a_map():
    batches = []

    def mapped(function, points):
        points = list(points)
        batches.append(len(points))
        return [function(p) for p in points]

    result = least_squares(DECAY.fun, X0, workers=mapped)
    serial = least_squares(DECAY.fun, X0)
    assert_best(result)
    assert 3 in batches and len(batches) >= result.njev
    np.testing.assert_allclose(result.x, serial.x, rtol=1e-8)


def test_workers_as_processes():
    assert_best(least_squares(DECAY.fun, X0, workers=2))


# What comes back.


def test_fields_of_the_result():
    result = least_squares(DECAY.fun, X0, DECAY.jac)
    np.testing.assert_array_equal(result.fun, DECAY.fun(result.x))
    np.testing.assert_array_equal(result.jac, DECAY.jac(result.x))
    np.testing.assert_allclose(result.grad, result.jac.T @ result.fun, atol=1e-14)
    assert result.optimality == np.max(np.abs(result.grad))
    assert result.cost == pytest.approx(0.5 * result.fun @ result.fun, rel=1e-15)
    assert result.active_mask.tolist() == [0, 0, 0]
    scipys = set(BEST) - {"method"}
    assert scipys <= set(result)


@pytest.mark.parametrize("path", ["floats", "arrays"])
def test_history(path):
    callback = (lambda x: None) if path == "arrays" else None
    result = least_squares(rosenbrock, [-1.2, 1.0], rosenbrock_jac, callback=callback)
    history = result.history
    assert [i.nfev for i in history] == list(range(2, result.nfev + 1))
    assert history[-1].nit == result.nit == sum(i.accepted for i in history)
    assert [i.cost for i in history] == sorted((i.cost for i in history), reverse=True)
    assert history[-1].cost == result.cost
    rejected = [i for i in history if not i.accepted]
    assert rejected and all(i.ratio <= 1e-4 for i in rejected)
    assert all(i.radius > 0 and i.damping >= 0 and i.length >= 0 for i in history)


def test_names_and_the_report():
    result = least_squares(DECAY.fun, X0, names=["height", "rate", "floor"])
    text = str(result)
    assert text == result.summary()
    for part in (
        "converged",
        "height",
        "rate",
        "floor",
        "40 residuals, 3 parameters",
        result.message,
    ):
        assert part in text
    chi = 2 * result.cost / 37
    assert f"{chi:.6g} on 37 degrees of freedom" in text
    assert f"{result.standard_errors()[1]:.6g}" in text
    assert "correlations of at least 0.1" in result.summary(correlation=0.1)
    assert "correlations" not in result.summary(correlation=1.0)


def test_a_result_can_be_pickled():
    result = least_squares(DECAY.fun, X0)
    other = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(other.x, result.x)
    assert other.message == result.message and "success: True" in str(other)
    with pytest.raises(ValueError, match="unpickled"):
        other.covariance()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_result_knows_its_fit(copied):
    result = least_squares(DECAY.fun, X0)
    other = copied(result)
    assert type(other) is type(result) and list(other) == list(result)
    assert str(other) == str(result)
    assert (other.x is result.x) == (copied is copy.copy)
    np.testing.assert_array_equal(other.confidence_intervals(), result.confidence_intervals())


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_verbose(capsys, verbose):
    result = least_squares(DECAY.fun, X0, verbose=verbose)
    lines = capsys.readouterr().out.splitlines()
    if verbose == 0:
        assert lines == []
        return
    assert lines[-2] == result.message
    assert lines[-1].startswith(f"Function evaluations {result.nfev}, initial cost")
    assert f"{result.cost:.4e}" in lines[-1]
    assert lines[-1].endswith(f"optimality {result.optimality:.2e}.")
    table = lines[:-2]
    assert len(table) == (0 if verbose == 1 else 1 + len(result.history))
    if verbose == 2:
        assert "gain ratio" in table[0]
        assert "polish" in table[-1] and int(table[-1].split()[0]) == result.nfev


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_other_methods_are_scipys(method):
    ours = least_squares(DECAY.fun, X0, bounds=(0, 9), method=method)
    theirs = scipy.optimize.least_squares(DECAY.fun, X0, bounds=(0, 9), method=method)
    np.testing.assert_array_equal(ours.x, theirs.x)
    assert (ours.nfev, ours.njev, ours.message) == (theirs.nfev, theirs.njev, theirs.message)
    assert np.isfinite(ours.covariance()).all()


def test_the_same_call_gives_the_same_answer():
    one, two = (least_squares(DECAY.fun, X0, loss="cauchy") for _ in range(2))
    np.testing.assert_array_equal(one.x, two.x)
    assert one.nfev == two.nfev


def test_non_finite_residuals_at_the_start_are_named():
    with pytest.raises(ValueError, match="finite"):
        least_squares(lambda x: np.array([1.0, np.nan, np.inf]) * x[0], [1.0])


# Single precision, where others stop early or go wrong.


def gauss(t, height, centre, width):
    return height / width * np.exp(-0.5 * ((t - centre) / width) ** 2)


@pytest.mark.parametrize("dtype", [">f8", ">f4", "longdouble", ">f2"])
def test_numbers_that_lapack_does_not_read(dtype):
    A = np.vander(np.linspace(0, 1, 30), 4)
    A[:, 3] = A[:, 2] + 1e-6 * A[:, 3]  # goes over to QR
    used = np.float32 if dtype == ">f4" else np.float64

    def fun(x):
        return A @ x + 0.01 * np.sin(A @ x) - A.sum(axis=1)

    def jac(x):
        return (1 + 0.01 * np.cos(A @ x))[:, None] * A

    expected = least_squares(fun, np.zeros(4, used), jac)
    result = least_squares(fun, np.zeros(4, dtype), jac)
    assert result.success
    assert result.x.dtype == used and result.x.dtype.isnative
    np.testing.assert_array_equal(result.x, expected.x)


@pytest.mark.parametrize("scheme", ["2-point", "3-point"])
@pytest.mark.parametrize("x0_dtype", [np.float32, np.float64])
def test_residuals_in_single_precision(x0_dtype, scheme):
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 100, dtype=np.float32)
    y = rng.uniform(size=100).astype(np.float32)
    x0 = np.array([-1.0, -1.0], dtype=x0_dtype)
    result = least_squares(lambda p: (p[0] + p[1] * t - y).astype(np.float32), x0, scheme)
    slope, level = np.polyfit(t.astype(float), y, 1)
    assert result.success and result.x.dtype == x0_dtype
    np.testing.assert_allclose(result.x, [level, slope], atol=2e-4)


@pytest.mark.parametrize("y_dtype", [np.float32, np.float64])
def test_data_in_single_precision(y_dtype):
    t = np.linspace(-1, 1, 20, dtype=np.float32)
    noise = 0.05 * np.random.default_rng(0).standard_normal(20)
    y = (gauss(t, 0.56, 0.2, 0.2) + noise).astype(y_dtype)
    result = least_squares(lambda p: gauss(t, *p) - y, [0.4, 0.0, 0.1])
    double = least_squares(lambda p: gauss(t.astype(float), *p) - y, [0.4, 0.0, 0.1])
    assert result.success
    np.testing.assert_allclose(result.x, double.x, rtol=1e-4)


@pytest.mark.parametrize("loss", ["linear", "huber", "soft_l1", "cauchy", "arctan"])
@pytest.mark.parametrize("size", [1e160, 1e300])
def test_a_trial_that_overflows_is_rejected_in_silence(size, loss):
    calls = iter(range(10**6))

    def fun(x):
        return DECAY.fun(x) * (size if next(calls) in (1, 2) else 1.0)

    result = least_squares(fun, X0, DECAY.jac, loss=loss)
    assert result.success
    assert [i.accepted for i in result.history[:3]] == [False, False, True]
    expected = least_squares(DECAY.fun, BEST.x, DECAY.jac, loss=loss)
    np.testing.assert_allclose(result.x, expected.x, rtol=1e-7)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_prints(monkeypatch, capsys, rank):
    runtime = types.SimpleNamespace(node_id=rank)
    core = types.SimpleNamespace(get_legate_runtime=lambda: runtime)
    monkeypatch.setitem(sys.modules, "legate.core", core)
    least_squares(lambda x: x - 1, [3.0], verbose=2)
    assert bool(capsys.readouterr().out) == (rank == 0)
