"""A factor in single precision with conjugate gradients in double, and fits that take it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import lapack

from lmsolve import _packed, _subproblem, least_squares
from lmsolve._linalg import LinAlgError
from lmsolve._packed import PackedCholesky


def paired(m: int, n: int, condition: float) -> np.ndarray:
    """Columns of unit length that nearly agree in pairs, (m, n)."""
    A = np.random.default_rng(n).standard_normal((m, n))
    A[:, n // 2 :] = A[:, : n - n // 2] + A[:, n // 2 :] * 2.0 / condition
    return A / np.linalg.norm(A, axis=0)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_the_places_of_a_packed_diagonal(n):
    A = np.tril(np.random.default_rng(n).standard_normal((n, n))).astype(np.float32)
    packed, _ = lapack.strttf(A, uplo="L")
    places = _packed.diagonal_places(n)
    np.testing.assert_array_equal(packed.ravel(order="F")[places], A.diagonal())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_it_solves_to_the_last_digits(order, weighted, mu):
    rng = np.random.default_rng(3)
    m, n = 700, 41
    J = np.array(rng.standard_normal((m, n)) * np.geomspace(1e-20, 1e20, n), order=order)
    w = rng.uniform(0.5, 2.0, m) if weighted else None
    B = J if w is None else J * w[:, None]
    d, b = 1 / np.linalg.norm(B, axis=0), rng.standard_normal(n)
    d[4] = 0.0
    A = (B * d).T @ (B * d) + np.diag(mu + (d == 0))
    factor = PackedCholesky(J, w, d, mu)
    np.testing.assert_allclose(factor.solve(b), np.linalg.solve(A, b), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(factor.product(b), A @ b, rtol=1e-12, atol=1e-13)
    pivot = np.linalg.cholesky(A).diagonal().min() ** 2
    assert factor.pivot == pytest.approx(pivot, rel=1e-4)
    np.testing.assert_array_equal(factor.solve(np.zeros(n)), 0.0)


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e5, 1e9])
def test_it_is_accurate_or_gives_up(condition):
    J = paired(900, 40, condition)
    b = J.T @ np.random.default_rng(1).standard_normal(900)
    try:
        y = PackedCholesky(J, None, np.ones(40), 0.0).solve(b)
    except LinAlgError:
        assert condition > 500
        return
    assert condition < 1e4
    expected = np.linalg.solve(J.T @ J, b)
    assert np.linalg.norm(y - expected) < 1e-14 * condition**2 * np.linalg.norm(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_beyond_single_precision_give_up(bad):
    J = np.ones((8, 2)) + np.eye(8, 2)
    J[3, 1] = bad
    with pytest.raises(LinAlgError):
        PackedCholesky(J, None, np.ones(2), 1.0)


@pytest.mark.parametrize("mu", [1e39, 1e200])
def test_a_damping_beyond_single_precision_gives_up_in_silence(mu):
    with pytest.raises(LinAlgError):
        PackedCholesky(np.eye(4, 2), None, np.ones(2), mu).solve(np.array([1.0, 0.0]))


@pytest.mark.parametrize("seed", range(12))
def test_the_slope_never_gives_up_where_the_step_did_not(monkeypatch, seed):
    monkeypatch.setattr(_subproblem, "LARGE", 30)
    J = paired(150, 40, 300.0 + 50.0 * seed)
    r, d = np.random.default_rng(seed).standard_normal(150), np.ones(40)
    sub = _subproblem.dense_subproblem(np, J, r, memory={})
    monkeypatch.setattr(_packed, "ROUNDS", 10_000)
    p = sub.solve(1e-6, d)
    monkeypatch.setattr(_packed, "ROUNDS", 1)
    expected = p @ np.linalg.solve(J.T @ J + 1e-6 * np.eye(40), p)
    assert isinstance(sub, _subproblem.PackedEquations)
    assert sub.secular(p, d) == pytest.approx(expected, rel=0.1)


def test_more_parameters_than_lapack_can_count_are_not_packed():
    def form(n):
        J = np.broadcast_to(0.0, (n, n))  # takes no memory
        return _subproblem._is_heavy(J)

    assert form(_packed.MOST) and not form(_packed.MOST + 1)
    assert _packed.MOST * (_packed.MOST + 1) // 2 < 2**31 <= (_packed.MOST + 2) ** 2 // 2


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "soft_l1", "f_scale": 0.01}, {"bounds": (-0.2, 0.15)}, {"x_scale": 1.0}],
    ids=["plain", "robust", "bounded", "scaled"],
)
def test_fits_take_it_and_end_alike(monkeypatch, condition, options):
    m, n = 150, 40
    A = (
        3 * paired(m, n, condition)
        if condition > 1
        else np.random.default_rng(0).normal(size=(m, n))
    )
    y = np.tanh(A @ np.random.default_rng(1).normal(0, 0.1, n))
    y += 0.01 * np.random.default_rng(2).standard_normal(m)

    def fun(x):
        return np.tanh(A @ x) - y

    def jac(x):
        return (1 - np.tanh(A @ x) ** 2)[:, None] * A

    expected = least_squares(fun, np.zeros(n), jac, **options)
    solved = []
    solve = PackedCholesky.solve
    monkeypatch.setattr(PackedCholesky, "solve", lambda self, b: solved.append(1) or solve(self, b))
    monkeypatch.setattr(_subproblem, "LARGE", 30)
    found = least_squares(fun, np.zeros(n), jac, **options)
    assert len(solved) >= 2 or condition > 500
    assert found.success
    assert found.cost == pytest.approx(expected.cost, rel=1e-9)
    assert found.rank == expected.rank
    if condition < 1e3:
        np.testing.assert_allclose(found.x, expected.x, atol=1e-7)
        np.testing.assert_allclose(found.standard_errors(), expected.standard_errors(), rtol=1e-6)


def test_what_was_too_coarse_once_is_not_tried_again(monkeypatch):
    A = paired(150, 40, 1e6)
    calls = []

    def noted(method):
        def call(self, *arguments):
            calls.append("tried")
            try:
                return method(self, *arguments)
            except LinAlgError:
                calls.append("failed")
                raise

        return call

    monkeypatch.setattr(PackedCholesky, "__init__", noted(PackedCholesky.__init__))
    monkeypatch.setattr(PackedCholesky, "solve", noted(PackedCholesky.solve))
    monkeypatch.setattr(_subproblem, "LARGE", 30)
    b = np.random.default_rng(4).standard_normal(150)

    def fun(x):
        return A @ x + 0.1 * np.sin(A @ x) - b

    def jac(x):
        return A + 0.1 * np.cos(A @ x)[:, None] * A

    result = least_squares(fun, np.zeros(40), jac)
    assert result.success
    assert calls.count("failed") == 1
    assert calls[-1] == "failed"
    assert result.njev > calls.count("tried")
