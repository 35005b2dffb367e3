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


@pytest.mark.parametrize("m", [5, 40, 20_000], ids=["square", "one block", "three blocks"])
def test_triangle_keeps_every_model_cost(xp, m):
    rng = np.random.default_rng(m)
    J, r, d = rng.standard_normal((m, 5)), rng.standard_normal(m), rng.uniform(0.5, 2, 5)
    R, c = _linalg.triangle(xp.namespace, xp.array(J), xp.array(r), xp.array(d))
    R, c = xp.host(R).astype(float), xp.host(c).astype(float)
    np.testing.assert_array_equal(np.tril(R[:5], -1), 0)
    tolerance = 50 * xp.eps * m
    np.testing.assert_allclose(R.T @ R, (J * d).T @ (J * d), atol=tolerance)
    np.testing.assert_allclose(R.T @ c, d * (J.T @ r), atol=tolerance)


def test_triangle_of_a_matrix_with_nan_raises():
    with pytest.raises(LinAlgError):
        _linalg.triangle(np, np.full((4, 2), np.nan), np.zeros(4), np.ones(2))


def test_svd_is_thin(xp):
    U, s, Vt = _linalg.svd(xp.namespace, xp.array(A))
    U, s, Vt = xp.host(U), xp.host(s), xp.host(Vt)
    assert (U.shape, s.shape, Vt.shape) == ((9, 5), (5,), (5, 5))
    np.testing.assert_allclose((U * s) @ Vt, A, atol=50 * xp.eps)
