"""A damped normal matrix that is never formed: single precision guides, double precision decides.

With m / n of a few, J'J and a factor take more memory than a solver should add to J: 0.8 of it at
m = 2.5 n. Here the Cholesky factor alone is kept, in single precision and packed (LAPACK's
rectangular full format), a quarter of J'J. It solves the system to some digits, and conjugate
gradients that it preconditions, with products by J in double precision, to all of them: two or
three rounds at a condition of J of 10, seven at 100 (compare N. J. Higham, T. Mary 2022, "Mixed
precision algorithms in numerical linear algebra", sections 6 and 8).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

LinAlgError = np.linalg.LinAlgError

#: Rows that are rounded to single precision at a time.
ROWS = 256
#: Parameters at most: LAPACK counts the entries of the packed factor in 32 bits.
MOST = 65535
#: Conjugate gradients end at this residual, of the right-hand side's, or after so many rounds.
RESIDUAL, ROUNDS = 1e-12, 12


class PackedCholesky:
    """``d J'W W J d + mu I`` (n, n), with a unit more on the diagonal where d is zero, to solve by.

    ``pivot`` is as of `Cholesky`, in single precision. LinAlgError where that is too coarse.
    """

    def __init__(self, J: np.ndarray, weights: np.ndarray | None, d: np.ndarray, mu: float) -> None:
        self._J, self._weights, self._d = J, weights, d
        self._diagonal = mu + (d == 0)
        m, n = J.shape
        packed: np.ndarray = np.zeros(n * (n + 1) // 2, dtype=np.float32)
        rounded = np.empty((min(m, ROWS), n), dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, m, ROWS):
                rows = slice(start, min(start + ROWS, m))
                block = rounded[: rows.stop - start]
                np.multiply(J[rows], d, out=block, casting="same_kind")
                if weights is not None:
                    block *= weights[rows, None]
                packed = lapack.ssfrk(
                    n, block.shape[0], 1.0, block.T, 1.0, packed, uplo="L", overwrite_c=1
                )
            places = diagonal_places(n)
            packed[places] += self._diagonal
            self._factor, info = lapack.spftrf(n, packed, uplo="L", overwrite_a=1)
            self.pivot = float(self._factor[places].min()) ** 2
        if info != 0 or not self.pivot > 0:
            raise LinAlgError("not positive definite in single precision")

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) for the right-hand side b; LinAlgError if it does not settle."""
        y, r = np.zeros_like(b), b.copy()
        enough = RESIDUAL * float(np.linalg.norm(b))
        z = p = self.roughly(r)
        rz = r @ z
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # mu may be beyond it
            for _ in range(ROUNDS):
                if np.linalg.norm(r) <= enough:
                    return y
                Ap = self.product(p)
                step = rz / (p @ Ap)
                y += step * p
                r -= step * Ap
                z = self.roughly(r)
                rz, before = r @ z, rz
                p = z + rz / before * p
        raise LinAlgError("single precision is too coarse a guide")

    def product(self, p: np.ndarray) -> np.ndarray:
        """The matrix times p (n,)."""
        Jp = self._J @ (self._d * p)
        if self._weights is not None:
            Jp *= self._weights * self._weights
        product: np.ndarray = self._d * (self._J.T @ Jp) + self._diagonal * p
        return product

    def roughly(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) in single precision; b is scaled to fit its range."""
        size = float(np.linalg.norm(b)) or 1.0
        column = (b / size).astype(np.float32)[:, None]
        y, _ = lapack.spftrs(b.shape[0], self._factor, column, uplo="L")
        return size * y[:, 0].astype(np.float64)


def diagonal_places(n: int) -> np.ndarray:
    """Where the diagonal (n,) of a lower triangle is in LAPACK's rectangular full packed format.

    The columns of one array hold the first half of the triangle, and the second, transposed, in
    the corner that it leaves free (F. G. Gustavson et al. 2010, "Rectangular full packed format
    for Cholesky's algorithm", section 2).
    """
    even = 1 - n % 2
    rows, first = n + even, (n + 1) // 2
    i = np.arange(n)
    j = i - first
    return np.where(i < first, i + even + i * rows, j + (j + 1 - even) * rows)
