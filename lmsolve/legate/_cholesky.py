"""The normal equations of many parameters, factored by Legate where that is faster than LAPACK.

Of cuPyNumeric's solvers only `cholesky` is used: it is tiled over the processors (above n = 8192;
a GPU takes the whole of a smaller one), while `solve` is reported to crash on several GPUs from
n = 2048 on. Its factor is checked against the matrix, and goes back to LAPACK if it fails.

Measured at n = 9000: 7.9 s on two CPUs of Legate, 21 s on one, 6.6 s in LAPACK on one thread,
so CPUs have to be four or more. The threshold of GPUs is an estimate from their flops and PCIe.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import lapack

from lmsolve._linalg import Cholesky, LinAlgError
from lmsolve._subproblem import NormalEquations

from . import _memory
from ._start import start

GPU_FROM, CPU_FROM, CPUS = 2048, 8193, 4
#: Copies of the matrix that the tiled factorisation needs in Legate's memory.
COPIES = 3
#: A factor is right if it reproduces A v for a random v to this many units of n eps.
WRONG = 100.0


class LegateNormalEquations(NormalEquations):
    """`NormalEquations` of NumPy whose large matrices Legate factors."""

    def _shares_memory(self, n: int) -> bool:
        return super()._shares_memory(n) and (self._halves is not None or not pays(n))

    def _cholesky(self, A: np.ndarray, overwrite: bool) -> Cholesky | LegateCholesky:
        if pays(A.shape[0]):
            factor = LegateCholesky(A)
            if factor.reproduces(A):
                return factor
        return super()._cholesky(A, overwrite)


def pays(n: int) -> bool:
    """Whether Legate factors a matrix (n, n) faster than LAPACK, and has the memory for it."""
    from legate.core import TaskTarget

    from ._tasks import processors

    gpus = processors(TaskTarget.GPU)
    if not gpus and (n < CPU_FROM or processors(TaskTarget.CPU) < CPUS):
        return False
    fits = _memory.fitting(8 * n * n, "fbmem" if gpus else "sysmem") >= COPIES
    return fits and n >= (GPU_FROM if gpus else CPU_FROM)


class LegateCholesky:
    """Lower factor of a positive definite matrix (n, n), made by Legate and kept on the host."""

    def __init__(self, A: np.ndarray) -> None:
        if not np.isfinite(A.sum()):
            raise LinAlgError("the matrix is not finite")  # cuPyNumeric would not say so
        xp = start()
        # A view of Legate's memory; what lies above the diagonal is zero.
        self.factor = np.asarray(xp.linalg.cholesky(xp.array(A)))
        root = self.factor.diagonal().min()
        self.pivot = float(root * root)
        if not self.pivot > 0:
            raise LinAlgError("the matrix is singular or not finite")

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) of ``A y = b``."""
        single = self.factor.dtype == np.float32
        potrs = lapack.spotrs if single else lapack.dpotrs
        y: np.ndarray = potrs(self.factor.T, b, lower=0)[0]
        return y

    def reproduces(self, A: np.ndarray) -> bool:
        """Whether this is the factor of A: ``L (L' v)`` is ``A v`` to rounding."""
        v = np.random.default_rng(0).standard_normal(A.shape[0])
        expected = A @ v
        error = np.abs(self.factor @ (self.factor.T @ v) - expected).max()
        n, eps = A.shape[0], float(np.finfo(A.dtype).eps)
        return bool(error <= WRONG * n * eps * np.abs(expected).max())
