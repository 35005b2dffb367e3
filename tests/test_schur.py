"""Block elimination finds the blocks and solves as a dense factorisation does."""

import numpy as np
import pytest
from scipy.sparse import block_diag, csr_array, hstack, vstack

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
@pytest.mark.parametrize("kinds", [0, 1000])
@pytest.mark.parametrize("held", [None, [2, 40, 41]])
@pytest.mark.parametrize("lonely", [False, True])
def test_solves_like_a_dense_factorisation(monkeypatch, mu, kinds, held, lonely):
    monkeypatch.setattr(_schur, "KINDS", kinds)
    monkeypatch.setattr(_schur, "CHUNK", 30)
    A = jacobian()
    if lonely:  # rows of no block first, between and last, and an empty one
        alone = csr_array(hstack([RNG.standard_normal((3, 5)), csr_array((3, A.shape[1] - 5))]))
        A = csr_array(vstack([alone, A[:50], csr_array((1, A.shape[1])), A[50:], 2 * alone]))
    gram = (A.T @ A).toarray()
    mask = None
    if held is not None:
        mask = np.isin(np.arange(A.shape[1]), held)
        A = csr_array(A.multiply(np.where(mask, 0.0, 1.0)))
        gram = (A.T @ A).toarray() + np.diag(mask.astype(float))
    layout = _schur.layout(A)
    factor = _schur.SchurComplement(_schur.Eliminated(A.data, layout, mask), mu)
    b = RNG.standard_normal(A.shape[1])
    expected = np.linalg.solve(gram + mu * np.eye(A.shape[1]), b)
    np.testing.assert_allclose(factor.solve(b), expected, rtol=1e-9, atol=1e-12)


def test_an_indefinite_matrix_is_refused():
    A = jacobian()
    matrix = _schur.Eliminated(A.data, _schur.layout(A))
    with pytest.raises(np.linalg.LinAlgError):
        _schur.SchurComplement(matrix, -1e6)


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


@pytest.mark.parametrize("groups", [3, 90])  # a sparse LU, and blocks
def test_entries_in_several_parts_count_as_their_sum(groups):
    A = jacobian(groups=groups)
    y = RNG.standard_normal(A.shape[0])
    parts = csr_array(
        (np.repeat(0.5 * A.data, 2), np.repeat(A.indices, 2), 2 * A.indptr), shape=A.shape
    )
    whole, halves = (
        least_squares(lambda x: A @ x - y, np.ones(A.shape[1]), lambda x, J=J: J)
        for J in (A, parts)
    )
    np.testing.assert_allclose(halves.x, whole.x, rtol=1e-9, atol=1e-12)
    assert not parts.has_canonical_format  # the caller's matrix is as it was
