"""The step-wise solver: what a trial costs, when it ends, and what it never does."""

import itertools
import math

import numpy as np
import pytest

from lmsolve import LevenbergMarquardt, least_squares
from lmsolve._bounds import Box
from lmsolve._problem import Problem
from lmsolve._status import MAX_NFEV, NOT_FINITE
from tests.nist import load
from tests.problems import PROBLEMS
from tests.tools import Counted, Decay, rosenbrock, rosenbrock_jac

SOME = ["rosenbrock", "bard", "brown_dennis", "osborne_1", "watson_6", "linear_rank_1"]


def counted_problem(name="rosenbrock"):
    p = PROBLEMS[name]
    fun, jac = Counted(p.fun), Counted(p.jac)
    return Problem(np, fun, jac, m=p.m), fun, jac, p.x0


def noise(p, x):
    """What rounding in the model's values, about ``|J x|``, may add to the cost."""
    r, D = np.linalg.norm(p.fun(x)), np.linalg.norm(p.jac(x), axis=0)
    return 8 * np.finfo(float).eps * (p.cost(x) + r * np.linalg.norm(D * x))


def run(solver, problem, x0):
    """Every state of a run."""
    states = [solver.init(problem, x0)]
    while states[-1].status is None:
        states.append(solver.step(problem, states[-1]))
    return states


@pytest.mark.parametrize("name", SOME)
def test_a_trial_costs_one_residual_and_a_rejected_one_no_jacobian(name):
    problem, fun, jac, x0 = counted_problem(name)
    solver = LevenbergMarquardt()
    state, rejected = solver.init(problem, x0), 0
    while state.status is None:
        calls, jacobians, linearised = fun.calls, jac.calls, state.point.subproblem is not None
        state = solver.step(problem, state)
        if state.status is None:
            assert fun.calls == calls + 1
            assert jac.calls == jacobians + (not linearised)
            rejected += not state.accepted
        assert state.nfev == fun.calls and state.njev == jac.calls
        if not state.accepted:
            assert state.point.subproblem is not None  # kept for the next trial
    if name in ("rosenbrock", "osborne_1"):
        assert rejected > 0


@pytest.mark.parametrize("jac", ["exact", "differences"])
@pytest.mark.parametrize("name", ["rosenbrock", "bard", "watson_9"])
def test_max_nfev_is_exact(name, jac):
    p = PROBLEMS[name]
    options = {"jac": p.jac} if jac == "exact" else {}
    unlimited = least_squares(p.fun, p.x0, **options)
    best = math.inf
    for limit in range(1, unlimited.nfev + 1):
        fun = Counted(p.fun)
        result = least_squares(fun, p.x0, max_nfev=limit, **options)
        assert result.nfev <= limit
        if jac == "exact":
            assert fun.calls == result.nfev
        if limit < unlimited.nfev:
            assert (result.nfev, result.status, result.success) == (limit, MAX_NFEV, False)
            assert f"{limit} evaluations" in result.message
        assert result.cost == pytest.approx(p.cost(result.x), rel=1e-12, abs=1e-300)
        assert result.cost <= best + noise(p, result.x)
        best = min(best, result.cost)
    assert unlimited.cost <= best + noise(p, unlimited.x)


@pytest.mark.parametrize("name", SOME)
def test_the_cost_never_rises_and_the_result_is_the_best_point(name):
    p = PROBLEMS[name]
    fun = Counted(p.fun)
    result = least_squares(fun, p.x0, p.jac)
    costs = [p.cost(x) for x in fun.points]
    assert result.cost <= min(costs) + noise(p, result.x)
    history = [i.cost for i in result.history]
    rounding = noise(p, result.x)
    assert all(b <= a + rounding for a, b in itertools.pairwise(history))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_a_cost_that_is_not_finite_is_a_rejected_trial(bad):
    decay = Decay()

    def fun(x):
        return np.full(40, bad) if x[1] > 2.0 else decay.fun(x)

    x0 = np.array([1.0, 1.9, 0.0])
    result = least_squares(fun, x0, decay.jac)
    assert result.success
    np.testing.assert_allclose(result.x, least_squares(decay.fun, x0, decay.jac).x, rtol=1e-8)


def test_a_wall_of_nan_beside_the_start():
    fun = Counted(lambda x: np.array([x[0] - 5.0]) if x[0] < 1.0 else np.array([np.nan]))
    result = least_squares(fun, [0.5], lambda x: np.ones((1, 1)))
    assert 0.9 < result.x[0] < 1.0
    assert fun.calls == result.nfev <= 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("n", [2, 9], ids=["in floats", "in arrays"])
def test_a_jacobian_that_is_no_longer_finite_ends_the_run(n, column, bad):
    def fun(x):
        return np.concatenate([rosenbrock(x[:2]), x[2:]])

    def jac(x):
        J = np.eye(n)
        J[:2, :2] = rosenbrock_jac(x[:2])
        if x[0] > -1.0:
            J[0, column] = bad
        return J

    x0 = np.ones(n)
    x0[0] = -1.2
    with np.errstate(over="ignore", invalid="ignore"):
        result = least_squares(fun, x0, jac)
    assert (result.status, result.success) == (NOT_FINITE, False)
    assert "not finite" in result.message
    assert result.cost < 0.5 * np.sum(fun(x0) ** 2) and np.isfinite(result.x).all()


@pytest.mark.parametrize("stop", ["raise", "return"])
@pytest.mark.parametrize("after", [1, 3])
def test_a_callback_stops_the_run(stop, after):
    seen = []

    def callback(intermediate_result):
        seen.append(intermediate_result)
        if len(seen) == after:
            if stop == "raise":
                raise StopIteration
            return True
        return False

    result = least_squares(rosenbrock, [-1.2, 1.0], rosenbrock_jac, callback=callback)
    assert (result.status, result.success, len(seen)) == (-2, False, after)
    assert result.nit == after and seen[-1].nit == after
    np.testing.assert_array_equal(result.x, seen[-1].x)
    assert result.cost == seen[-1].cost == 0.5 * np.sum(seen[-1].fun ** 2)


def test_a_callback_of_x_alone():
    points = []
    result = least_squares(rosenbrock, [-1.2, 1.0], callback=points.append)
    assert len(points) == result.nit
    np.testing.assert_array_equal(points[-1], result.x)
    points[0][:] = 99.0  # a copy: the caller may keep or change it


@pytest.mark.parametrize("when", ["fun", "jac", "callback"])
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=repr)
def test_exceptions_of_the_user_pass_untouched(when, error):
    calls = []

    def faulty(function, name):
        def wrapped(x):
            calls.append(name)
            if calls.count(name) == 3 and name == when:
                raise error
            return function(x)

        return wrapped

    with pytest.raises(type(error)) as caught:
        least_squares(
            faulty(rosenbrock, "fun"),
            [-1.2, 1.0],
            faulty(rosenbrock_jac, "jac"),
            callback=faulty(lambda x: None, "callback"),
        )
    assert caught.value is error


@pytest.mark.parametrize("scale", [1e-90, 1e-12, 1e12, 1e90])
def test_units_of_parameters_and_residuals_do_not_matter(scale):
    decay = Decay()
    units = np.array([scale ** (1 / 3), 1.0, scale ** (-1 / 3)])
    x0 = np.array([1.0, 0.3, 0.1])  # a start at zero would have no unit
    plain = least_squares(decay.fun, x0, decay.jac)
    result = least_squares(
        lambda x: scale * decay.fun(x * units),
        x0 / units,
        lambda x: scale * decay.jac(x * units) * units,
    )
    assert result.success
    np.testing.assert_allclose(result.x * units, plain.x, rtol=1e-8)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-1e9, 1e9)])  # the tiny path, the general
def test_from_zero_the_unit_of_the_residuals_does_not_matter(bounds):
    t = np.linspace(0, 1, 20)

    def run(unit):
        return least_squares(
            lambda x: unit * (np.expm1(x[0] + x[1] * t) - 2 * t - 1),
            [0.0, 0.0],
            lambda x: unit * np.exp(x[0] + x[1] * t)[:, None] * np.stack([t**0, t], axis=1),
            bounds,
        )

    plain = run(1.0)
    for unit in (2.0**-40, 2.0**40):
        scaled = run(unit)
        assert (scaled.nfev, scaled.njev) == (plain.nfev, plain.njev)
        np.testing.assert_allclose(scaled.x, plain.x, rtol=1e-12)


def test_a_start_at_the_solution_ends_at_once():
    decay = Decay(noise=0.0)
    result = least_squares(decay.fun, [2.5, 1.3, 0.5], decay.jac)
    assert (result.nfev, result.njev, result.nit, result.status) == (1, 1, 0, 1)
    assert result.cost == 0


def test_a_cost_that_is_not_finite_at_the_start_is_an_error():
    p = Problem(np, lambda x: x * np.nan, lambda x: np.eye(1))
    with pytest.raises(ValueError, match="finite at `x0`"):
        LevenbergMarquardt().init(p, np.ones(1))


def test_states_are_immutable_and_a_step_can_be_repeated():
    problem, *_, x0 = counted_problem()
    solver = LevenbergMarquardt()
    state = solver.step(problem, solver.init(problem, x0))
    once, again = solver.step(problem, state), solver.step(problem, state)
    np.testing.assert_array_equal(once.x, again.x)
    assert (once.cost, once.damping, once.nfev) == (again.cost, again.damping, again.nfev)
    with pytest.raises(AttributeError):
        state.x = x0


def test_a_final_state_stays_final():
    problem, fun, _, x0 = counted_problem("bard")
    solver = LevenbergMarquardt(max_nfev=4)
    final = run(solver, problem, x0)[-1]
    calls = fun.calls
    assert final.status == MAX_NFEV == 0
    assert solver.step(problem, final).status == MAX_NFEV
    assert fun.calls == calls


def test_linearize_completes_a_point():
    problem, *_, x0 = counted_problem()
    solver = LevenbergMarquardt()
    state = solver.linearize(problem, solver.init(problem, x0))
    np.testing.assert_allclose(state.point.subproblem.grad, rosenbrock_jac(x0).T @ rosenbrock(x0))


@pytest.mark.parametrize("name", ["Rat42", "Gauss1"])
def test_the_last_look_takes_no_differences_where_the_last_step_was_below_ten_of_them(name):
    p = load(name)
    fun = Counted(p.fun)
    result = least_squares(fun, p.starts[0])
    assert result.success and result.history[-1].accepted
    assert result.njev == result.nit  # one at each point but the last
    assert fun.calls == result.nfev + p.n * result.njev
    step = least_squares(p.fun, result.x, p.jac).x - result.x
    assert np.all(np.abs(step) <= 1e-7 * np.abs(result.x))


@pytest.mark.parametrize("polish", [True, False])
def test_the_polish_is_what_brings_the_last_digits(polish):
    p = PROBLEMS["osborne_1"]
    result = least_squares(p.fun, p.x0, p.jac, polish=polish)
    assert result.success
    J, r = p.jac(result.x), p.fun(result.x)
    cosine = np.max(np.abs(J.T @ r) / (np.linalg.norm(J, axis=0) * np.linalg.norm(r)))
    assert (cosine < 1e-11) == polish


def test_single_precision_stays_and_converges():
    decay = Decay()

    def fun(x):
        assert x.dtype == np.float32
        return decay.fun(x).astype(np.float32)

    result = least_squares(fun, decay.x0.astype(np.float32))
    exact = least_squares(decay.fun, decay.x0)
    assert result.success
    for value in (result.x, result.fun, result.jac, result.grad):
        assert value.dtype == np.float32
    np.testing.assert_allclose(result.x, exact.x, rtol=2e-4)


def test_bounds_belong_to_the_solver_and_copy_changes_them():
    solver = LevenbergMarquardt(ftol=1e-5, max_nfev=7, polish=False)
    box = Box(np.zeros(2), np.ones(2))
    other = solver.copy(bounds=box)
    assert other.bounds is box and solver.bounds is None
    assert (other.ftol, other.max_nfev, other.polish) == (1e-5, 7, False)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), ([200.0, 4e-4], [260.0, 7e-4])])
@pytest.mark.parametrize("loss", ["huber", "cauchy", "soft_l1", "arctan"])
def test_robust_fits_do_not_crawl(loss, bounds):
    """Weights alone leave out curvature: a Huber fit of Misra1a took 238 evaluations so."""
    p = load("Misra1a")
    scale = 0.5 * float(np.sqrt(np.mean(p.fun(p.certified) ** 2)))
    options = {"loss": loss, "f_scale": scale, "bounds": bounds}
    result = least_squares(p.fun, p.certified * 1.05, p.jac, **options)
    assert result.success
    assert result.nfev < 100
    assert result.grad == pytest.approx(0.0, abs=1e-4 * np.abs(result.jac).max() * scale)


@pytest.mark.parametrize("condition", [1e5, 1e7, 1e9])
def test_an_ill_conditioned_fit_ends_where_rounding_moves_it(condition):
    rng = np.random.default_rng(1)
    A = rng.standard_normal((3000, 12))
    A[:, 6:] = A[:, :6] + A[:, 6:] / condition
    y = np.tanh(A @ rng.normal(0, 0.3, 12)) + 0.01 * rng.standard_normal(3000)

    def jac(x):
        return (1 - np.tanh(A @ x) ** 2)[:, None] * A

    result = least_squares(lambda x: np.tanh(A @ x) - y, np.zeros(12), jac)
    assert result.success
    polish = [i for i in result.history if i.polishing]
    assert len(polish) <= 6
    assert all(i.escalated for i in polish)
