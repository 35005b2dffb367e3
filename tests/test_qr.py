"""QR of tall rows, in blocks and in threads, and what is asked of its triangle."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lmsolve import _qr, _threads
from lmsolve._linalg import LinAlgError

EPS = 2.0**-52


@pytest.mark.parametrize("m", [5, 40, 20_000], ids=["square", "one block", "three blocks"])
def test_triangle_keeps_every_model_cost(xp, m):
    rng = np.random.default_rng(m)
    J, r, d = rng.standard_normal((m, 5)), rng.standard_normal(m), rng.uniform(0.5, 2, 5)
    found = _qr.triangle(xp.namespace, xp.array(J), xp.array(r), xp.array(d))
    R, c = np.hsplit(xp.host(found).astype(float), [5])
    np.testing.assert_array_equal(np.tril(R[:5], -1), 0)
    tolerance = 50 * xp.eps * m
    np.testing.assert_allclose(R.T @ R, (J * d).T @ (J * d), atol=tolerance)
    np.testing.assert_allclose(R.T @ c[:, 0], d * (J.T @ r), atol=tolerance)


def test_triangle_of_a_matrix_with_nan_raises():
    with pytest.raises(LinAlgError):
        _qr.triangle(np, np.full((4, 2), np.nan), np.zeros(4), np.ones(2))


@pytest.mark.parametrize("condition", [1e2, 1e7, 1e12])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_triangle_of_many_blocks_is_accurate(condition, weighted, order):
    rng = np.random.default_rng(5)
    m, n = 9000, 12
    Q = np.linalg.qr(rng.standard_normal((m, n)))[0]
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    J = np.array((Q * np.logspace(0, -np.log10(condition), n)) @ V.T, order=order)
    w = rng.uniform(0.5, 2.0, m) if weighted else None
    B = J if w is None else J * w[:, None]
    d = 1 / np.linalg.norm(B, axis=0)
    r = rng.standard_normal(m)
    R = _qr.triangle(np, J, r, d, w)
    A = np.column_stack([B * d, r])
    Q = np.linalg.solve(R.T, A.T).T
    assert np.abs(Q.T @ Q - np.eye(n + 1)).max() < 1e-16 * condition * n + 1e-13
    size = np.linalg.norm(A, axis=0)
    assert np.abs((R.T @ R - A.T @ A) / np.outer(size, size)).max() < 1e-13


def test_a_diagonal_below_a_triangle():
    rng = np.random.default_rng(2)
    R, diagonal = np.triu(rng.standard_normal((41, 41))), rng.uniform(0, 2, 40)
    found = _qr.with_diagonal(R, diagonal)
    below = np.column_stack([np.diag(diagonal), np.zeros(40)])
    expected = np.linalg.qr(np.concatenate([R, below]), mode="r")
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-13)


@pytest.mark.parametrize("smallest", [1.0, 1e-6, 1e-11])
def test_the_rank_of_a_triangle(smallest):
    rng = np.random.default_rng(5)
    U, V = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    R = np.linalg.qr(U @ np.diag(np.geomspace(10.0, smallest, 40)) @ V, mode="r")
    assert _qr.has_full_rank(R, 0.2 * smallest / 10.0)
    assert not _qr.has_full_rank(R, 1.1 * smallest / 10.0)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_a_triangle_that_is_singular_has_no_full_rank(bad):
    R = np.triu(np.ones((3, 3)))
    R[1, 1] = bad
    assert not _qr.has_full_rank(R, 1e-15)


@pytest.mark.parametrize(("m", "n"), [(3, 8), (50, 3), (5000, 3), (5000, 80)])
def test_singular_values_of_dependent_columns_are_negligible(m, n):
    A = np.random.default_rng(4).standard_normal((m, n))
    A[:, -1] = A[:, 0] + A[:, 1]
    s = np.linalg.svd(_qr.triangle(np, A, A[:, 0], np.ones(n))[:, :n], compute_uv=False)
    assert s[-1] <= _qr.negligible(m, n, EPS) * s[0]
    assert s[min(m, n) - 2] > 100 * _qr.negligible(m, n, EPS) * s[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_back_substitution(transposed):
    R = np.triu(np.random.default_rng(6).standard_normal((5, 5))) + 4 * np.eye(5)
    y = _qr.back_substituted(R, np.arange(5.0), transposed)
    np.testing.assert_allclose((R.T if transposed else R) @ y, np.arange(5.0), atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_threads_share_the_rows(monkeypatch, dtype, weighted):
    rng = np.random.default_rng(9)
    m, n = 1303, 9
    J, r = rng.standard_normal((m, n)).astype(dtype), rng.standard_normal(m).astype(dtype)
    w = rng.uniform(0.5, 2.0, m).astype(dtype) if weighted else None
    expected = np.abs(_qr.triangle(np, J, r, np.ones(n, dtype), w))
    seen, reduced = [], _qr._reduced

    def noted(J, r, weights):
        seen.append((threading.get_ident(), J.shape[0]))
        return reduced(J, r, weights)

    monkeypatch.setattr(_qr, "_reduced", noted)
    monkeypatch.setattr(_qr, "threads", lambda: 3)
    monkeypatch.setattr(_qr, "WORTHWHILE", 1)
    found = np.abs(_qr.triangle(np, J, r, np.ones(n, dtype), w))
    assert sum(rows for _, rows in seen) == m and len(seen) == 3
    assert threading.get_ident() not in {thread for thread, _ in seen}
    np.testing.assert_allclose(found, expected, atol=100 * np.finfo(dtype).eps * np.sqrt(m))


def test_blas_has_one_thread_while_threads_share_the_rows(monkeypatch):
    found = _threads.libraries()
    if not found:
        pytest.skip("no OpenBLAS whose threads can be set")
    counts, reduced = set(), _qr._reduced

    def noted(*rows):
        counts.update(get() for get, _ in found)
        return reduced(*rows)

    monkeypatch.setattr(_qr, "_reduced", noted)
    monkeypatch.setattr(_qr, "WORTHWHILE", 1)
    before = [get() for get, _ in found]
    try:
        for _, set_to in found:
            set_to(2)
        J = np.random.default_rng(1).standard_normal((200, 3))
        _qr.triangle(np, J, J[:, 0], np.ones(3))
        assert counts == {1}
        assert [get() for get, _ in found] == [2] * len(found)
    finally:
        for (_, set_to), count in zip(found, before, strict=True):
            set_to(count)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_wrapper_and_the_routine_that_frees_the_interpreter_agree(monkeypatch, dtype):
    J = np.random.default_rng(7).standard_normal((900, 70)).astype(dtype)
    r, d = J @ np.ones(70, dtype), np.ones(70, dtype)
    assert _qr._lapack("tpqrt", "iiiiriririri", J.dtype.char) is not None
    assert _qr._lapack("geqrt", "iiiririri", J.dtype.char) is not None
    found = _qr.triangle(np, J, r, d)
    damped = _qr.with_diagonal(found, d)
    monkeypatch.setattr(_qr, "_lapack", lambda *routine: None)
    tolerance = 100 * np.finfo(dtype).eps * np.abs(found).max()
    np.testing.assert_allclose(np.abs(_qr.triangle(np, J, r, d)), np.abs(found), atol=tolerance)
    np.testing.assert_array_equal(_qr.with_diagonal(found, d), damped)
