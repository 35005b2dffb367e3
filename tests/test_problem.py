"""The residual function as the solver sees it: what is called, counted, checked and weighed."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

from lmsolve._functions import ResidualAndJacobian, UserFunction
from lmsolve._loss import LOSSES, Loss
from lmsolve._numdiff import Differences
from lmsolve._problem import Problem, StreamedProblem
from lmsolve._sparse import OperatorSubproblem, SparseNormalEquations
from lmsolve._subproblem import DualEquations, NormalEquations
from tests.tools import Counted, Decay

DECAY = Decay()
X = np.array([2.0, 1.0, 0.3])


def problem(jac=DECAY.jac, **options):
    return Problem(np, DECAY.fun, jac, m=40, **options)


def step(sub):
    """Its damped step in unscaled space."""
    return sub.solve(0.1, np.ones(3))


def test_evaluations_and_jacobians_are_counted():
    fun, jac = Counted(DECAY.fun), Counted(DECAY.jac)
    p = Problem(np, fun, jac, m=40)
    r = p.residual(X)
    p.cost(r)
    p.linearize(X, r)
    assert (p.nfev, p.njev, fun.calls, jac.calls) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (np.asarray, NormalEquations),
        (np.ndarray.tolist, NormalEquations),
        (csr_array, SparseNormalEquations),
        (aslinearoperator, OperatorSubproblem),
    ],
    ids=["dense", "list", "sparse", "operator"],
)
@pytest.mark.parametrize("loss", [None, Loss(LOSSES["soft_l1"], 0.1)], ids=["plain", "robust"])
def test_every_kind_of_jacobian_gives_the_same_step(convert, kind, loss):
    reference = problem(loss=loss).linearize(X, DECAY.fun(X))
    tight = (None, {"atol": 1e-13}) if kind is OperatorSubproblem else None
    converted = problem(lambda x: convert(DECAY.jac(x)), loss=loss, linear_solver=tight)
    sub = converted.linearize(X, DECAY.fun(X))
    assert type(sub) is kind
    np.testing.assert_allclose(sub.grad, reference.grad, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(step(sub), step(reference), rtol=1e-8)


@pytest.mark.parametrize("loss", [None, Loss(LOSSES["cauchy"], 0.1)], ids=["plain", "robust"])
def test_row_blocks_give_the_same_step(loss):
    def blocks(x):
        r, J = DECAY.fun(x), DECAY.jac(x)
        return ((r[i : i + 15], J[i : i + 15]) for i in range(0, 40, 15))

    reference = problem(loss=loss)
    r = reference.residual(X)
    streamed = StreamedProblem(np, lambda x: (r for r, _ in blocks(x)), blocks, loss)
    handle = streamed.residual(X)
    assert handle.m == 40
    assert streamed.cost(handle) == pytest.approx(float(reference.cost(r)), rel=1e-14)
    expected = step(reference.linearize(X, r))
    np.testing.assert_allclose(step(streamed.linearize(X, handle)), expected, rtol=1e-10)
    np.testing.assert_allclose(step(problem(blocks, loss=loss).linearize(X, r)), expected, 1e-10)


def test_a_wide_jacobian_goes_to_the_dual():
    p = Problem(np, lambda x: x[:2] ** 2, lambda x: np.diag(2 * x)[:2], m=2)
    assert isinstance(p.linearize(X, X[:2] ** 2), DualEquations)


def test_differences_go_over_to_the_central_formula():
    p = problem(None, differences=Differences("2-point", np.ones(3)))
    exact = DECAY.jac(X)

    def error():
        return np.abs(p.jacobian(X, DECAY.fun(X)) - exact).max()

    rough = error()
    assert rough < 1e-6 and p.derivative_error() == 2.0**-26
    assert p.refine_derivatives()
    assert error() < 0.05 * rough
    assert p.derivative_error() < 1e-10
    assert not p.refine_derivatives()
    assert not problem().refine_derivatives() and problem().derivative_error() == 0


def test_a_function_that_fills_one_array():
    buffer = np.empty(40)

    def fun(x):
        buffer[:] = DECAY.fun(x)
        return buffer

    p = Problem(np, fun, None, m=40)
    first = p.residual(X)
    second = p.residual(2 * X)
    np.testing.assert_array_equal(first, DECAY.fun(X))
    np.testing.assert_array_equal(second, DECAY.fun(2 * X))


def test_a_user_may_write_into_x():
    def fun(x):
        x *= 0
        return x

    x = np.ones(3)
    UserFunction(fun, (), {}, "fun")(x)
    np.testing.assert_array_equal(x, 1)


def test_one_function_for_both_is_called_once_per_point():
    counted = Counted(lambda x: (DECAY.fun(x), DECAY.jac(x)))
    both = ResidualAndJacobian(UserFunction(counted, (), {}, "fun"))
    both(X)
    np.testing.assert_array_equal(both.jac(X), DECAY.jac(X))
    assert counted.calls == 1
    trial = 2 * X
    both(trial)  # rejected: the Jacobian at X is asked for again
    np.testing.assert_array_equal(both.jac(X), DECAY.jac(X))
    assert counted.calls == 3


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"jac": lambda x: np.ones((40, 4))}, ValueError, r"\(m, n\) = \(40, 3\), got \(40, 4\)"),
        ({"jac": lambda x: None}, TypeError, "got None"),
        ({"jac": lambda x: DECAY.jac(x) * np.nan}, ValueError, "120 entries"),
        ({"jac": lambda x: DECAY.jac(x) * 1j}, TypeError, "complex"),
        ({"jac": lambda x: iter([(np.ones(3), np.ones((3, 3)))])}, ValueError, "40, got 3"),
        ({"jac": lambda x: iter([(np.ones(3), np.ones((4, 3)))])}, ValueError, r"\(4, 3\)"),
        ({"jac": lambda x: iter([])}, ValueError, "40, got 0"),
    ],
)
def test_wrong_jacobians(change, error, text):
    with pytest.raises(error, match=text):
        problem(**change).linearize(X, DECAY.fun(X))


def test_a_residual_that_changes_its_length():
    lengths = iter([40, 39])
    p = Problem(np, lambda x: np.ones(next(lengths)), None, m=40)
    p.residual(X)
    with pytest.raises(ValueError, match="40 at the start, got 39 now"):
        p.residual(X)
