"""Block elimination finds the blocks and solves as a dense factorisation does."""

import numpy as np
import pytest
from scipy.sparse import block_diag, csr_array, hstack

from lmsolve import _schur, least_squares

RNG = np.random.default_rng(11)


def jacobian(shared=5, groups=70, sizes=(1, 3)):
    """Rows that touch all shared columns and the columns of one group."""
    blocks, rows = [], []
    for g in range(groups):
        k = sizes[g % len(sizes)]
        blocks.append(RNG.standard_normal((k + 4, k)))
        rows.append(RNG.standard_normal((k + 4, shared)))
    return csr_array(hstack([csr_array(np.vstack(rows)), block_diag(blocks)]))


def test_partition_finds_the_groups():
    A = jacobian()
    p = _schur.partition(A)
    assert p is not None
    assert p.kept.tolist() == list(range(5))
    assert p.blocks == 70
    assert p.size == 3
    assert sorted(p.eliminated.tolist()) == list(range(5, A.shape[1]))


def test_no_partition_of_a_band():
    n = 300
    A = csr_array(np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1))
    assert _schur.partition(A) is None


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("dense_entries", [0, 10**7])
def test_solves_like_a_dense_factorisation(monkeypatch, mu, dense_entries):
    monkeypatch.setattr(_schur, "DENSE_ENTRIES", dense_entries)
    monkeypatch.setattr(_schur, "CHUNK", 30)
    A = jacobian()
    gram = csr_array(A.T @ A)
    gram.sort_indices()
    s = _schur.layout(gram, _schur.partition(A))
    factor = _schur.SchurComplement(_schur.Eliminated(gram.data, s), mu)
    b = RNG.standard_normal(A.shape[1])
    expected = np.linalg.solve(gram.toarray() + mu * np.eye(A.shape[1]), b)
    np.testing.assert_allclose(factor.solve(b), expected, rtol=1e-9, atol=1e-12)


def test_an_indefinite_matrix_is_refused():
    A = jacobian()
    gram = csr_array(A.T @ A)
    gram.sort_indices()
    s = _schur.layout(gram, _schur.partition(A))
    with pytest.raises(np.linalg.LinAlgError):
        _schur.SchurComplement(_schur.Eliminated(gram.data, s), -1e6)


def test_least_squares_takes_it_and_agrees_with_the_dense_fit():
    A = jacobian(groups=90)
    truth = RNG.standard_normal(A.shape[1])
    y = np.tanh(A @ truth) + 0.01 * RNG.standard_normal(A.shape[0])

    def fun(x):
        return np.tanh(A @ x) - y

    def jac(x):
        return csr_array(A.multiply((1 - np.tanh(A @ x) ** 2)[:, None]))

    x0 = truth + 0.1 * RNG.standard_normal(truth.shape)
    sparse = least_squares(fun, x0, jac)
    dense = least_squares(fun, x0, lambda x: jac(x).toarray())
    assert sparse.success
    np.testing.assert_allclose(sparse.x, dense.x, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(sparse.standard_errors(), dense.standard_errors(), rtol=1e-4)
