"""Cholesky factors, triangles and SVDs in every namespace."""

import numpy as np
import pytest

from lmsolve import _linalg
from lmsolve._linalg import Cholesky, LinAlgError

RNG = np.random.default_rng(1)
A = RNG.standard_normal((9, 5))
SPD = A.T @ A
B = RNG.standard_normal(5)


def test_cholesky_solves(xp):
    y = Cholesky(xp.namespace, xp.array(SPD)).solve(xp.array(B))
    np.testing.assert_allclose(xp.host(y), np.linalg.solve(SPD, B), rtol=1e4 * xp.eps)


def test_pivot_is_the_smallest_squared_diagonal_entry(xp):
    pivot = Cholesky(xp.namespace, xp.array(SPD)).pivot
    expected = np.linalg.cholesky(SPD).diagonal().min() ** 2
    assert pivot == pytest.approx(expected, rel=1e3 * xp.eps)


@pytest.mark.parametrize(
    "matrix",
    [np.diag([1.0, -1.0]), np.ones((2, 2)) - np.eye(2), np.zeros((2, 2)), np.diag([1.0, np.nan])],
    ids=["negative", "indefinite", "zero", "nan"],
)
def test_what_is_not_positive_definite_raises(xp, matrix):
    with pytest.raises(LinAlgError):
        Cholesky(xp.namespace, xp.array(matrix))


def test_add_diagonal_leaves_its_argument(xp):
    matrix = xp.array(SPD)
    damped = _linalg.add_diagonal(xp.namespace, matrix, 0.5)
    np.testing.assert_allclose(xp.host(damped), SPD + 0.5 * np.eye(5), rtol=2 * xp.eps)
    np.testing.assert_array_equal(xp.host(matrix), xp.host(xp.array(SPD)))


def test_spd_matrix_scales_both_sides(xp):
    scaled = _linalg.spd_matrix(xp.namespace, xp.array(SPD), xp.array(B))
    expected = np.diag(B) @ SPD @ np.diag(B)
    np.testing.assert_allclose(xp.host(scaled), expected, rtol=4 * xp.eps)


def test_svd_is_thin(xp):
    U, s, Vt = _linalg.svd(xp.namespace, xp.array(A))
    U, s, Vt = xp.host(U), xp.host(s), xp.host(Vt)
    assert (U.shape, s.shape, Vt.shape) == ((9, 5), (5,), (5, 5))
    np.testing.assert_allclose((U * s) @ Vt, A, atol=50 * xp.eps)


@pytest.mark.parametrize("n", [5, 64, 150])
def test_a_matrix_and_its_factor_share_an_array(n):
    rng = np.random.default_rng(n)
    J, d, p = rng.standard_normal((n + 20, n)), rng.uniform(0.5, 2, n), rng.standard_normal(n)
    d[1] = 0.0
    A = J.T @ J
    halves = _linalg.Halves(A.copy())
    for mu in (0.5, 2.0):
        factor = Cholesky(np, halves.scaled(d, mu), overwrite=True)
        expected = A * np.outer(d, d) + np.diag(mu + (d == 0))
        np.testing.assert_allclose(expected @ factor.solve(p), p, atol=1e-10)
        np.testing.assert_allclose(halves.product(p), A @ p, atol=1e-10)
        np.testing.assert_allclose(halves.matrix(), A, rtol=1e-15)
        np.testing.assert_allclose(expected @ factor.solve(p), p, atol=1e-10)  # not disturbed


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_gram_matrix_of_weighted_rows(order):
    rng = np.random.default_rng(8)
    J, w = np.array(rng.standard_normal((1200, 90)), order=order), rng.uniform(0, 2, 1200)
    B = J * w[:, None]
    np.testing.assert_allclose(_linalg.weighted_gram(J, w), B.T @ B, atol=1e-10)
