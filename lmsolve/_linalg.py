"""Small dense solves: symmetric positive definite systems and the SVD.

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
#: Rows of a symmetric matrix that are mirrored at a time.
MIRRORED = 64
#: Rows that are weighted at a time.
ROWS = 520


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
            self._lower = overwrite or A.shape[0] < THREADED
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


class Halves:
    """A symmetric matrix (n, n) in one triangle of an array; the other has room for a factor."""

    def __init__(self, A: np.ndarray) -> None:
        self._array = A  # C-ordered; what it holds above the diagonal is given up
        self._diagonal = A.diagonal().copy()

    def scaled(self, d: np.ndarray, mu: float) -> np.ndarray:
        """The array, with ``d A d + mu I`` on and above the diagonal, and a 1 there where d is 0.

        It holds that until the next call, or until a factor takes its place.
        """
        A, n = self._array, d.shape[0]
        for i in range(0, n, MIRRORED):
            j = min(i + MIRRORED, n)
            right = A[i:j, j:]
            np.copyto(right, A[j:, i:j].T)
            right *= d[j:]
            right *= d[i:j, None]
            below = np.tril(A[i:j, i:j], -1)
            A[i:j, i:j] = below + below.T * np.outer(d[i:j], d[i:j])
        np.fill_diagonal(A, d * d * self._diagonal + (mu + (d == 0)))
        return A

    def product(self, p: np.ndarray) -> np.ndarray:
        """``A p`` (n,)."""
        A, n = self._array, p.shape[0]
        product: np.ndarray = self._diagonal * p
        for i in range(0, n, MIRRORED):
            j = min(i + MIRRORED, n)
            left, below = A[i:j, :i], np.tril(A[i:j, i:j], -1)
            product[i:j] += left @ p[:i] + below @ p[i:j] + below.T @ p[i:j]
            product[:i] += left.T @ p[i:j]
        return product

    def matrix(self) -> np.ndarray:
        """A new array with the whole matrix."""
        return Halves(self._array.copy()).whole(self._diagonal)

    def whole(self, diagonal: np.ndarray) -> np.ndarray:
        """The array with the whole matrix in it."""
        A = self.scaled(np.ones_like(diagonal), 0.0)
        np.fill_diagonal(A, diagonal)
        return A


def weighted_gram(J: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``J'W W J`` (n, n), added up in one array, with a weighted copy of some rows at a time."""
    m, n = J.shape
    syrk = blas.ssyrk if J.dtype == np.float32 else blas.dsyrk
    G = np.zeros((n, n), dtype=J.dtype, order="F")
    for i in range(0, m, ROWS):
        rows = J[i : i + ROWS] * weights[i : i + ROWS, None]
        G = syrk(1.0, rows.T, beta=1.0, c=G, overwrite_c=1)
    halves = Halves(G.T)
    return halves.whole(G.diagonal().copy())


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


def svd(xp: Namespace, A: Array) -> tuple[Array, Array, Array]:
    """Thin SVD ``A = U diag(s) V'``; returns U, s and V'. LinAlgError if it does not converge."""
    result: Any = xp.linalg.svd(A, full_matrices=False)
    return result[0], result[1], result[2]
