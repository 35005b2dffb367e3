"""One damped step, four ways: normal equations, their dual, the factored form, streamed sums."""

import numpy as np
import pytest

from lmsolve import _linalg, _subproblem
from lmsolve._factored import Factored, Rows
from lmsolve._linalg import LinAlgError
from lmsolve._loss import LOSSES, Loss
from lmsolve._subproblem import (
    DualEquations,
    NormalEquations,
    dense_subproblem,
    gram,
)
from lmsolve._sums import BlockSums
from tests.tools import Library


def rows(xp, m, n, seed=0, weighted=False):
    """Host J, r, w of a random problem and its Rows."""
    rng = np.random.default_rng(seed)
    J, r, w = rng.standard_normal((m, n)), rng.standard_normal(m), rng.uniform(0.2, 2, m)
    w = w if weighted else np.ones(m)
    weights = xp.array(w) if weighted else None
    return J * w[:, None], r, Rows(xp.namespace, xp.array(J), xp.array(r), weights)


def expected_step(J, r, d, mu, start=0.0):
    """Minimiser of |J d q + J start + r|^2 + mu |q|^2, from the augmented system."""
    n = d.size
    top, bottom = J * d, np.sqrt(mu) * np.eye(n)
    right = -np.concatenate([r + J @ (start * np.ones(n)), np.zeros(n)])
    return d * np.linalg.lstsq(np.concatenate([top, bottom]), right)[0]


def forms(xp, Rw):
    """Every form of the rows; the dual of wide ones only, for which it is made."""
    ns = xp.namespace
    G, g = gram(ns, Rw)
    norms = ns.sqrt(ns.linalg.diagonal(G)) if xp.name != "numpy" else np.sqrt(G.diagonal())
    found = {
        "normal": NormalEquations(ns, G, g, Rw),
        "streamed": NormalEquations(ns, G, g),
        "factored": Factored(ns, Rw, g, norms),
    }
    m, n = Rw.J.shape
    return found if m > n else {**found, "dual": DualEquations(ns, Rw)}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mu", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(12, 4), (5, 5), (3, 7)], ids=["tall", "square", "wide"])
def test_all_forms_take_the_same_step(xp, shape, mu, weighted):
    J, r, Rw = rows(xp, *shape, weighted=weighted)
    d = np.random.default_rng(3).uniform(0.3, 3, shape[1])
    expected = expected_step(J, r, d, mu)
    for name, sub in forms(xp, Rw).items():
        p = xp.host(sub.solve(mu, xp.array(d)))
        close = {"rtol": 1e5 * xp.eps, "atol": 1e4 * xp.eps * np.abs(expected).max()}
        np.testing.assert_allclose(p, expected, err_msg=name, **close)
        decrease = -(r @ (J @ expected) + 0.5 * np.sum((J @ expected) ** 2))
        assert float(sub.reduction(xp.array(expected))) == pytest.approx(decrease, rel=1e4 * xp.eps)
        q = expected / d
        H = (J * d).T @ (J * d) + mu * np.eye(d.size)
        secular = float(sub.secular(xp.array(expected), xp.array(d)))
        assert secular == pytest.approx(q @ np.linalg.solve(H, q), rel=1e5 * xp.eps), name


@pytest.mark.parametrize("shape", [(12, 4), (3, 7)], ids=["tall", "wide"])
def test_a_held_column_stays_and_the_others_ignore_it(xp, shape):
    J, r, Rw = rows(xp, *shape)
    d = np.ones(shape[1])
    d[1] = 0.0
    free = np.flatnonzero(d)
    expected = np.zeros(shape[1])
    expected[free] = expected_step(J[:, free], r, d[free], 0.1)
    for name, sub in forms(xp, Rw).items():
        p = xp.host(sub.solve(0.1, xp.array(d)))
        assert p[1] == 0, name
        np.testing.assert_allclose(p, expected, atol=1e4 * xp.eps, err_msg=name)


@pytest.mark.parametrize("shape", [(12, 4), (3, 7)], ids=["tall", "wide"])
def test_a_start_shifts_the_residuals(xp, shape):
    J, r, Rw = rows(xp, *shape)
    d, start = np.ones(shape[1]), np.full(shape[1], 0.5)
    expected = expected_step(J, r, d, 0.1, start=0.5)
    for name, sub in forms(xp, Rw).items():
        p = xp.host(sub.solve(0.1, xp.array(d), xp.array(start)))
        np.testing.assert_allclose(p, expected, atol=1e4 * xp.eps, err_msg=name)


def test_streamed_sums_equal_dense_ones(xp):
    J, r, _ = rows(xp, 90, 4)
    loss = Loss(LOSSES["cauchy"], 0.7)
    w, r_w = loss.weights(xp.namespace, xp.array(r))
    whole = gram(xp.namespace, Rows(xp.namespace, xp.array(J), r_w, w))
    sums = BlockSums(xp.namespace, loss, 4)
    for i in (0, 30, 60):
        sums.add(xp.array(r[i : i + 30]), xp.array(J[i : i + 30]))
    assert sums.m == 90
    for a, b in zip(sums.result(), whole, strict=True):
        np.testing.assert_allclose(xp.host(a), xp.host(b), atol=1e3 * xp.eps)


def near_dependent(size):
    """Two unit columns at the angle ``size``, and a right side."""
    rng = np.random.default_rng(5)
    Q = np.linalg.qr(rng.standard_normal((10, 2)))[0]
    return np.stack([Q[:, 0], Q[:, 0] + size * Q[:, 1]], axis=1), rng.standard_normal(10)


def test_well_conditioned_rows_do_not_escalate():
    J, r = near_dependent(1e-2)
    sub = dense_subproblem(np, J, r)
    sub.solve(0.0, 1 / sub.norms)
    assert not sub.escalated and sub.rank() is None


def test_ill_conditioned_rows_escalate_and_lose_nothing():
    J, r = near_dependent(1e-7)  # squared: 1e-14, where the normal equations know nothing
    sub = dense_subproblem(np, J, r)
    p = sub.solve(0.0, 1 / sub.norms)
    assert sub.escalated and sub.rank() == 2
    np.testing.assert_allclose(p, np.linalg.lstsq(J, -r)[0], rtol=1e-7)
    with pytest.raises(LinAlgError):  # where there are no rows to go back to
        NormalEquations(np, np.ones((2, 2)), np.ones(2)).solve(0.0, np.ones(2))


@pytest.mark.parametrize("shape", [(12, 5), (4, 9)], ids=["tall", "wide"])
def test_rank_deficient_rows_get_the_minimum_norm_step(xp, shape):
    m, n = shape
    rng = np.random.default_rng(7)
    J, r = rng.standard_normal((m, 3)) @ rng.standard_normal((3, n)), rng.standard_normal(m)
    d = rng.uniform(0.5, 2, n)
    sub = Factored(
        xp.namespace, Rows(xp.namespace, xp.array(J), xp.array(r)), xp.array(J.T @ r), None
    )
    p = xp.host(sub.solve(0.0, xp.array(d)))
    expected = -d * (np.linalg.pinv(J * d, rcond=1e-6) @ r)
    np.testing.assert_allclose(p, expected, atol=1e4 * xp.eps)
    assert sub.rank() == 3


def test_tall_goes_to_the_normal_equations_and_wide_to_the_dual():
    assert isinstance(dense_subproblem(np, np.ones((3, 2)), np.ones(3)), NormalEquations)
    assert isinstance(dense_subproblem(np, np.ones((2, 3)), np.ones(2)), DualEquations)


@pytest.mark.parametrize("large", [1, 100])
def test_matrices_that_are_not_kept_take_the_same_steps(monkeypatch, large):
    """Where they are made anew, and where J'J itself is scaled in its memory."""
    J, _, Rw = rows(Library.named("numpy"), 30, 8)
    G, g = gram(np, Rw)
    kept, frugal = NormalEquations(np, G, g), NormalEquations(np, G.copy(), g)
    rng = np.random.default_rng(3)
    free, other = rng.uniform(0.3, 3, (2, 8))
    for d in (free, np.where(np.arange(8) < 3, 0.0, free), other):
        for mu in (0.0, 1e-2, 10.0, 0.0):
            expected = kept.solve(mu, d), kept.secular(g, d), kept.reduction(g)
            with monkeypatch.context() as patched:
                patched.setattr(_subproblem, "LARGE", large)
                patched.setattr(_linalg, "THREADED", 1)
                found = frugal.solve(mu, d), frugal.secular(g, d), frugal.reduction(g)
                started = frugal.solve(mu, d, free), frugal.smallest_pivot(d)
            expected += kept.solve(mu, d, free), kept.smallest_pivot(d)
            for a, b in zip(found + started, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    assert frugal._scaled is None
    assert (frugal._by is None) == (large == 1)
    np.testing.assert_allclose(frugal.gram, J.T @ J, rtol=1e-14)


@pytest.mark.parametrize("mu", [0.0, 1e-3])
@pytest.mark.parametrize("held", [False, True])
def test_steps_of_full_rank_need_no_singular_values(mu, held):
    J, r, Rw = rows(Library.named("numpy"), 30, 8)
    sub = Factored(np, Rw, J.T @ r, np.linalg.norm(J, axis=0))
    d = np.random.default_rng(3).uniform(0.3, 3, 8)
    if held:
        d[2] = 0.0
    step, g = sub.solve(mu, d), np.arange(8.0) * d
    secular = sub.secular(g, d)
    assert sub._svd is None and sub.rank() == 8 - held
    free = d > 0
    np.testing.assert_allclose(step[free], expected_step(J[:, free], r, d[free], mu), rtol=1e-12)
    assert held == (step[2] == 0)
    sub._regular = sub._damped = None
    np.testing.assert_allclose(sub.solve(mu, d), step, rtol=1e-12)  # by the decomposition
    assert sub.rank() == 8 - held
    if not held:
        A = (J * d).T @ (J * d) + mu * np.eye(8)
        assert secular == pytest.approx(g / d @ np.linalg.solve(A, g / d), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_problem_stays_with_qr_as_long_as_its_steps_need_that(weighted):
    J, r = near_dependent(1e-7)
    w = np.linspace(0.5, 2.0, 10) if weighted else None
    memory = {}
    first = dense_subproblem(np, J, r, w, memory)
    d = 1 / first.norms
    step = first.solve(0.0, d)
    second = dense_subproblem(np, J, r, w, memory)
    assert isinstance(first, NormalEquations) and isinstance(second, Factored)
    np.testing.assert_allclose(second.solve(0.0, d), step, rtol=1e-12)
    np.testing.assert_allclose(second.grad, first.grad, rtol=1e-12)
    np.testing.assert_allclose(second.norms, first.norms, rtol=1e-12)
    second.solve(1e-3, d)  # which normal equations would serve as well
    assert isinstance(dense_subproblem(np, J, r, w, memory), NormalEquations)
