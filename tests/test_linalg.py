"""Cholesky factors, triangles and SVDs in every namespace."""

import numpy as np
import pytest

from lmsolve import _linalg
from lmsolve._linalg import Cholesky, LinAlgError

RNG = np.random.default_rng(1)
A = RNG.standard_normal((9, 5))
SPD = A.T @ A
B = RNG.standard_normal(5)
EPS = 2.0**-52


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
    found = _linalg.triangle(xp.namespace, xp.array(J), xp.array(r), xp.array(d))
    R, c = np.hsplit(xp.host(found).astype(float), [5])
    np.testing.assert_array_equal(np.tril(R[:5], -1), 0)
    tolerance = 50 * xp.eps * m
    np.testing.assert_allclose(R.T @ R, (J * d).T @ (J * d), atol=tolerance)
    np.testing.assert_allclose(R.T @ c[:, 0], d * (J.T @ r), atol=tolerance)


def test_triangle_of_a_matrix_with_nan_raises():
    with pytest.raises(LinAlgError):
        _linalg.triangle(np, np.full((4, 2), np.nan), np.zeros(4), np.ones(2))


def test_svd_is_thin(xp):
    U, s, Vt = _linalg.svd(xp.namespace, xp.array(A))
    U, s, Vt = xp.host(U), xp.host(s), xp.host(Vt)
    assert (U.shape, s.shape, Vt.shape) == ((9, 5), (5,), (5, 5))
    np.testing.assert_allclose((U * s) @ Vt, A, atol=50 * xp.eps)


@pytest.mark.parametrize("condition", [1e2, 1e7, 1e12])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_triangle_of_many_blocks_is_accurate(condition, weighted, order):
    rng = np.random.default_rng(5)
    m, n = 3000, 12
    Q = np.linalg.qr(rng.standard_normal((m, n)))[0]
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    J = np.array((Q * np.logspace(0, -np.log10(condition), n)) @ V.T, order=order)
    w = rng.uniform(0.5, 2.0, m) if weighted else None
    B = J if w is None else J * w[:, None]
    d = 1 / np.linalg.norm(B, axis=0)
    r = rng.standard_normal(m)
    R = _linalg.triangle(np, J, r, d, w)
    A = np.column_stack([B * d, r])
    Q = np.linalg.solve(R.T, A.T).T
    assert np.abs(Q.T @ Q - np.eye(n + 1)).max() < 1e-16 * condition * n + 1e-13
    size = np.linalg.norm(A, axis=0)
    assert np.abs((R.T @ R - A.T @ A) / np.outer(size, size)).max() < 1e-13


def test_a_diagonal_below_a_triangle():
    rng = np.random.default_rng(2)
    R, diagonal = np.triu(rng.standard_normal((41, 41))), rng.uniform(0, 2, 40)
    found = _linalg.with_diagonal(R, diagonal)
    below = np.column_stack([np.diag(diagonal), np.zeros(40)])
    expected = np.linalg.qr(np.concatenate([R, below]), mode="r")
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-13)


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-11])
def test_the_rank_of_a_triangle(smallest):
    rng = np.random.default_rng(5)
    U, V = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    R = np.linalg.qr(U @ np.diag(np.geomspace(10.0, smallest, 40)) @ V, mode="r")
    assert _linalg.has_full_rank(R, 0.2 * smallest / 10.0)
    assert not _linalg.has_full_rank(R, 1.1 * smallest / 10.0)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_a_triangle_that_is_singular_has_no_full_rank(bad):
    R = np.triu(np.ones((3, 3)))
    R[1, 1] = bad
    assert not _linalg.has_full_rank(R, 1e-15)


@pytest.mark.parametrize(("m", "n"), [(3, 8), (50, 3), (5000, 3), (5000, 80)])
def test_singular_values_of_dependent_columns_are_negligible(m, n):
    A = np.random.default_rng(4).standard_normal((m, n))
    A[:, -1] = A[:, 0] + A[:, 1]
    s = np.linalg.svd(_linalg.triangle(np, A, A[:, 0], np.ones(n))[:, :n], compute_uv=False)
    assert s[-1] <= _linalg.negligible(m, n, EPS) * s[0]
    assert s[min(m, n) - 2] > 100 * _linalg.negligible(m, n, EPS) * s[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_back_substitution(transposed):
    R = np.triu(np.random.default_rng(6).standard_normal((5, 5))) + 4 * np.eye(5)
    y = _linalg.back_substituted(R, np.arange(5.0), transposed)
    np.testing.assert_allclose((R.T if transposed else R) @ y, np.arange(5.0), atol=1e-14)


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
