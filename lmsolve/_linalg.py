"""Small dense solves: symmetric positive definite systems and the SVD of a triangular factor.

NumPy systems go to LAPACK directly (dposv costs 2 us at n = 3, ``numpy.linalg.cholesky`` and two
solves 25), other namespaces through their own ``linalg``.
"""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
from scipy.linalg import blas, lapack

from ._xp import Array, Namespace, is_torch

LinAlgError = np.linalg.LinAlgError

#: From this size on LAPACK takes several threads. SciPy's and NumPy's, each with threads of its
#: own, keep each other waiting (80 ms for 13 at n = 1000, after a product of NumPy's): so NumPy's.
THREADED = 100
#: From this size on the wait counts for less than the two copies that NumPy's makes.
IN_PLACE = 1500
#: Entries of J from which Cholesky QR beats Householder's (measured: 3 to 4 times as fast).
CHOLESKY_QR = 200_000
#: Passes of Cholesky QR, the shift of the first in units of (n + 1) eps, and the deviation of Q'Q
#: from the identity below which the factor of it is accurate.
PASSES, SHIFT, ORTHONORMAL = 3, 10.0, 0.1


#: Rounds after which an inverse iteration knows the smallest singular value within a factor of two.
INVERSE_ITERATIONS = 3


class Cholesky:
    """Factor of a symmetric positive definite matrix (n, n); LinAlgError if it is not one.

    ``pivot`` is the smallest squared diagonal entry of the factor: for a matrix scaled to a unit
    diagonal, about the reciprocal of its condition number.
    """

    __slots__ = ("_factor", "_lower", "_potrs", "_xp", "pivot")

    def __init__(self, xp: Namespace, A: Array, overwrite: bool = False) -> None:
        self._xp = xp
        if xp is np:
            single = A.dtype == np.float32
            self._potrs = lapack.spotrs if single else lapack.dpotrs
            self._lower = A.shape[0] < THREADED or (overwrite and A.shape[0] >= IN_PLACE)
            if self._lower:
                potrf = lapack.spotrf if single else lapack.dpotrf
                # The transpose of a symmetric C-ordered matrix is itself, Fortran-ordered: no copy.
                self._factor, info = potrf(A.T, lower=1, overwrite_a=overwrite, clean=0)
                if info != 0:
                    raise LinAlgError(f"leading minor {info} is not positive definite")
            else:
                self._factor = np.linalg.cholesky(A).T
            root = self._factor.diagonal().min()
            self.pivot = float(root * root)
            if not self.pivot > 0:
                raise LinAlgError("the matrix is not finite")
            return
        self._factor = _cholesky(xp, A)
        diagonal = xp.linalg.diagonal(self._factor)
        self.pivot = float(xp.min(diagonal)) ** 2
        if not self.pivot > 0:
            raise LinAlgError("the matrix is singular or not finite")

    def solve(self, b: Array) -> Array:
        """Solution (n,) of ``A y = b``."""
        if self._xp is np:
            y, _ = self._potrs(self._factor, b, lower=self._lower)
            return y
        return _cholesky_solve(self._xp, self._factor, b)


def _cholesky(xp: Namespace, A: Array) -> Array:
    """Lower factor of ``A``; every library's own exception becomes LinAlgError."""
    if is_torch(A):
        factor, info = xp.linalg.cholesky_ex(A)
        if int(info) != 0:
            raise LinAlgError(f"leading minor {int(info)} is not positive definite")
        return factor
    return xp.linalg.cholesky(A)


def _cholesky_solve(xp: Namespace, L: Array, b: Array) -> Array:
    """Solution (n,) of ``L L' y = b``."""
    if is_torch(L):
        return xp.cholesky_solve(b[:, None], L)[:, 0]
    y = xp.linalg.solve(L, b[:, None])
    return xp.linalg.solve(xp.linalg.matrix_transpose(L), y)[:, 0]


def spd_matrix(xp: Namespace, gram: Array, d: Array) -> Array:
    """``diag(d) gram diag(d)``, a new matrix (n, n)."""
    if xp is np:
        A = gram * d
        A *= d[:, None]
        return A
    return gram * d[None, :] * d[:, None]


def add_diagonal(xp: Namespace, A: Array, mu: float) -> Array:
    """A copy of ``A`` with ``mu`` added on the diagonal."""
    if xp is np:
        B = A.copy()
        B.ravel()[:: A.shape[0] + 1] += mu
        return B
    return A + mu * identity(xp, A)


def identity(xp: Namespace, A: Array) -> Array:
    """Identity (n, n) of the dtype and device of the matrix ``A``."""
    return xp.eye(A.shape[0], dtype=A.dtype, device=array_api_compat.device(A))


def triangle(
    xp: Namespace,
    J: Array,
    r: Array,
    d: Array,
    weights: Array | None = None,
    gram: Array | None = None,
) -> tuple[Array, Array]:
    """R (k, n) and c (k,) with ``|W J diag(d) q + r| = |R q + c| + const`` for every q.

    A tall J is reduced block of rows by block of rows, so that no copy of it exceeds a block.
    A large one whose Gram matrix ``gram`` (n, n) is known goes by `cholesky_qr`, which does its
    work in products of matrices; where that fails, and for smaller ones, each block is stacked on
    the R of those before it (Demmel, Grigori, Hoemmen, Langou 2012, "Communication-optimal
    parallel and sequential QR and LU factorizations", section 2: sequential tall-skinny QR).
    """
    m, n = J.shape
    if xp is np and gram is not None and m * n >= CHOLESKY_QR:
        R = cholesky_qr(J, r, d, weights, gram)
        if R is not None:
            return R[:, :n], R[:, n]
    rows = max(4 * (n + 1), 8192)
    R = None
    for start in range(0, m, rows):
        stop = min(start + rows, m)  # the standard leaves slices beyond the end undefined
        w = None if weights is None else weights[start:stop]
        block = _augmented(xp, J[start:stop, :], r[start:stop], d, w)
        if R is not None:
            block = xp.concat([R, block], axis=0)
        R = qr_r(xp, block)
    assert R is not None
    return R[:, :n], R[:, n]


def cholesky_qr(
    J: np.ndarray, r: np.ndarray, d: np.ndarray, weights: np.ndarray | None, gram: np.ndarray
) -> np.ndarray | None:
    """R (n + 1, n + 1) of ``[W J diag(d), r]`` by Cholesky factors of Gram matrices, or None.

    Each pass divides the rows by the R so far and factors the Gram matrix Q'Q of what results,
    until Q is close to orthonormal; the first factor, of the matrix itself, is shifted so that it
    exists for scaled condition numbers up to 1e12 (T. Fukaya et al. 2020, "Shifted Cholesky QR for
    computing the QR factorization of ill-conditioned matrices").
    The check of Q'Q against the identity is what makes the result as good as Householder's.
    """
    m, n = J.shape
    single = J.dtype == np.float32
    trsm = blas.strsm if single else blas.dtrsm
    A = np.empty((n + 1, n + 1), dtype=J.dtype)
    A[:n, :n] = spd_matrix(np, gram, d)
    weighted = r if weights is None else weights * r
    A[:n, n] = A[n, :n] = d * J.T.dot(weighted)
    A[n, n] = r.dot(r)
    scale = np.sqrt(A.diagonal())
    if not (np.isfinite(scale).all() and scale.all()):
        return None
    A /= np.outer(scale, scale)
    A.ravel()[:: n + 2] += SHIFT * (n + 1) * float(np.finfo(J.dtype).eps)
    block = max(1024, 2**19 // (n + 1))
    try:
        R = np.linalg.cholesky(A).T * scale
        for _ in range(PASSES):
            G = np.zeros_like(A)
            for start in range(0, m, block):
                w = None if weights is None else weights[start : start + block]
                B = _augmented(np, J[start : start + block], r[start : start + block], d, w)
                Q = trsm(1.0, R, B, side=1, overwrite_b=1)
                G += Q.T.dot(Q)
            R = np.triu(np.linalg.cholesky(G).T.dot(R))
            if np.abs(G - np.eye(n + 1)).max() < ORTHONORMAL:
                return R
    except LinAlgError:
        pass
    return None


def _augmented(xp: Namespace, J: Array, r: Array, d: Array, weights: Array | None = None) -> Array:
    """``[W J diag(d), r]`` (m, n + 1)."""
    if xp is np:
        block = np.empty((J.shape[0], J.shape[1] + 1), dtype=J.dtype, order="F")
        np.multiply(J, d, out=block[:, :-1])
        if weights is not None:
            block[:, :-1] *= weights[:, None]
        block[:, -1] = r
        return block
    scaled = J * d[None, :]
    if weights is not None:
        scaled = scaled * weights[:, None]
    return xp.concat([scaled, r[:, None]], axis=1)


def qr_r(xp: Namespace, A: Array) -> Array:
    """Upper triangular factor R (min(m, n), n) of ``A`` (m, n)."""
    if xp is np:
        if not np.isfinite(A[-1].sum()):
            raise LinAlgError("the matrix is not finite")
        geqrf = lapack.sgeqrf if A.dtype == np.float32 else lapack.dgeqrf
        factor = geqrf(A, overwrite_a=1)[0]
        return np.triu(factor[: min(A.shape)])
    return xp.linalg.qr(A, mode="reduced")[1]


def smallest_singular_value(R: np.ndarray) -> float:
    """Estimate of that of an upper triangle R (n, n), not below it, by inverse iteration.

    Zero if R is singular or has a NaN.
    """
    v, size = np.ones(R.shape[0], dtype=R.dtype), 0.0
    for _ in range(INVERSE_ITERATIONS):
        v = back_substituted(R, back_substituted(R, v, transposed=True))
        size = float(np.linalg.norm(v))
        if not 0.0 < size < np.inf:
            return 0.0
        v /= size
    return float(size**-0.5)


def back_substituted(R: np.ndarray, c: np.ndarray, transposed: bool = False) -> np.ndarray:
    """Solution (n,) of ``R y = c`` or ``R' y = c`` for an upper triangle R (n, n); NaN if none."""
    trtrs = lapack.strtrs if R.dtype == np.float32 else lapack.dtrtrs
    y, info = trtrs(R, c, lower=0, trans=int(transposed))
    return np.full_like(c, np.nan) if info else np.asarray(y)


def svd(xp: Namespace, A: Array) -> tuple[Array, Array, Array]:
    """Thin SVD ``A = U diag(s) V'``; returns U, s and V'. LinAlgError if it does not converge."""
    result: Any = xp.linalg.svd(A, full_matrices=False)
    return result[0], result[1], result[2]
