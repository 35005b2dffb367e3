"""The step on the trust region has the length asked for, whatever solves for it."""

import numpy as np
import pytest

from lmsolve import _trust
from lmsolve._bounds import Box
from lmsolve._damping import Damping
from lmsolve._linalg import LinAlgError
from lmsolve._lm import Point
from lmsolve._sparse import OperatorSubproblem
from lmsolve._subproblem import NormalEquations, dense_subproblem

EPS = 2.0**-52


def problem(m=20, n=5, seed=0):
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((m, n)) * 10.0 ** rng.integers(-3, 4, n)
    return J, rng.standard_normal(m)


class WithoutSecular:
    """A subproblem that only solves: served by the secant."""

    def __init__(self, inner):
        self.solve, self.reduction = inner.solve, inner.reduction
        self.grad, self.norms, self.escalated = inner.grad, inner.norms, False


@pytest.mark.parametrize("kind", ["newton", "secant"])
@pytest.mark.parametrize("share", [1e-6, 1e-2, 0.5, 0.95])
@pytest.mark.parametrize("shape", [(20, 5), (4, 9)], ids=["tall", "wide"])
def test_length_is_the_radius(xp, shape, share, kind):
    J, r = problem(*shape)
    ns = xp.namespace
    sub = dense_subproblem(ns, xp.array(J), xp.array(r))
    sub = sub if kind == "newton" else WithoutSecular(sub)
    D = sub.norms
    d = 1 / D
    full = np.linalg.lstsq(J / np.linalg.norm(J, axis=0), -r)[0]
    radius = share * float(np.linalg.norm(full))
    s = _trust.step(ns, sub, d, D, radius, 0.0, xp.eps)
    slack = _trust.SLACK * (1 + 1e-3)
    assert (1 - slack) * radius <= s.length <= (1 + slack) * radius
    assert s.mu > 0 or s.length >= (1 - slack) * np.linalg.norm(full)
    expected = np.linalg.norm(xp.host(s.p) * xp.host(D))
    assert s.length == pytest.approx(expected, rel=100 * xp.eps)


def test_a_long_radius_gives_the_undamped_step():
    J, r = problem()
    sub = dense_subproblem(np, J, r)
    s = _trust.step(np, sub, 1 / sub.norms, sub.norms, 1e6, 0.0, EPS)
    assert s.mu == 0
    np.testing.assert_allclose(s.p, np.linalg.lstsq(J, -r)[0], rtol=1e-8)
    np.testing.assert_array_equal(s.p, _trust.gauss_newton(np, sub, 1 / sub.norms, sub.norms).p)


def test_a_singular_system_is_damped():
    sub = NormalEquations(np, np.ones((2, 2)), np.ones(2))
    assert _trust.gauss_newton(np, sub, np.ones(2), np.ones(2)) is None
    s = _trust.step(np, sub, np.ones(2), np.ones(2), 0.1, 0.0, EPS)
    np.testing.assert_allclose(s.p[0], s.p[1], rtol=1e-6)
    assert s.length == pytest.approx(0.1, rel=_trust.SLACK)


def test_a_system_that_no_damping_saves_raises():
    sub = NormalEquations(np, np.full((2, 2), np.nan), np.ones(2))
    with pytest.raises(LinAlgError):
        _trust.step(np, sub, np.ones(2), np.ones(2), 0.1, 0.0, EPS)


@pytest.mark.parametrize("share", [1e-3, 0.3, 0.9])
def test_truncated_gradients_end_on_the_sphere(share):
    J, r = problem()
    norms = np.linalg.norm(J, axis=0)
    radius = share * np.linalg.norm(np.linalg.lstsq(J / norms, -r)[0])
    s = _trust.step(np, OperatorSubproblem(J, r, norms), 1 / norms, norms, radius, 0.0, EPS)
    assert s.length == pytest.approx(radius, rel=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_bounded_steps_stay_inside_and_decrease_the_model(xp, seed):
    rng = np.random.default_rng(seed)
    J, r = problem(12, 5, seed)
    x = rng.standard_normal(5) / np.linalg.norm(J, axis=0)
    room = rng.uniform(0, 0.5, (2, 5)) / np.linalg.norm(J, axis=0)
    x, lb, ub = xp.array(x), xp.array(x - room[0]), xp.array(x + room[1])
    ns = xp.namespace
    box = Box(lb, ub)
    sub = dense_subproblem(ns, xp.array(J), xp.array(r))
    D = sub.norms
    held = box.held(x, sub.grad)
    d = ns.where(held, 0 * D, 1 / D)
    s = _trust.bounded_step(ns, Point(None, sub, D, d, held), box, x, Damping(10.0), xp.eps)
    assert not bool(ns.any(box.outside(box.clip(ns, x + s.p))))
    np.testing.assert_allclose(
        xp.host(box.clip(ns, x + s.p)), xp.host(x + s.p), rtol=2 * xp.eps, atol=1e-30
    )
    assert float(sub.reduction(s.p)) > 0
    # Not worse than the best of the points on the path of the projected gradient.
    t = np.logspace(-6, 2, 200)[:, None] / np.linalg.norm(J, 2) ** 2
    g = J.T @ r
    path = np.clip(xp.host(x) - t * g, xp.host(lb), xp.host(ub)) - xp.host(x)
    cauchy = max(-(g @ p + 0.5 * np.sum((J @ p) ** 2)) for p in path)
    assert float(sub.reduction(s.p)) >= 0.5 * cauchy
