"""The step by conjugate gradients on a dense Jacobian whose products are taken in Legate's tasks.

CGLS works with vectors of m entries (`_sparse`), of which there are the residuals r and products
with J alone: sums ``c r + J q``. So each is kept as c, q (n,) and ``J'J q`` (n,), which give its
inner products and its product with J'. An iteration takes one launch, and n numbers come back.
Of m < n rows such vectors are short, and are what they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmsolve._sparse import OperatorSubproblem, stopping
from lmsolve._xp import Array, array_namespace, to_numpy

from ._reduce import Layout, RowSums, SumsJob

if TYPE_CHECKING:
    from ._tasks import Shard
    from ._wide import WideEquations


class IteratedEquations(OperatorSubproblem):
    """Subproblem of the rows J (m, n) of a layout, weighted by their loss."""

    def __init__(self, sums: RowSums, layout: Layout, dtype: Any, options: Mapping[str, Any]):
        self._sums, self._layout, self._dtype = sums, layout, dtype
        n = sums.functions.n
        found = self._summed(GradientJob, np.zeros(1), 2 * n + 1)
        self._residuals = Residuals(found[:n], float(found[2 * n]))
        zero = np.zeros(n)
        norms = np.sqrt(found[n : 2 * n]).astype(dtype)
        r = Combination(self._residuals, 1.0, zero, zero)
        super().__init__(None, r, norms, **stopping(options))

    def _times(self, p: np.ndarray) -> Combination:
        p = p.astype(float)
        return Combination(self._residuals, 0.0, p, self._summed(ProductJob, p, p.shape[0]))

    def _back(self, z: Combination) -> np.ndarray:
        return (z.c * self._residuals.gradient + z.gram).astype(self._dtype)

    def _size(self, z: Combination) -> float:
        return math.sqrt(max(z @ z, 0.0))

    def _summed(self, job: type[GradientJob | ProductJob], x: np.ndarray, size: int) -> np.ndarray:
        """The sums of a job over the rows: one launch, one read."""
        place = self._sums.place(self._layout, size, "The products with J")
        self._sums.launch(job(self._sums.functions, self._layout, x, place))
        return place.total()


class Residuals(NamedTuple):
    """What is known of the weighted residuals r: J'r (n,) and r'r."""

    gradient: np.ndarray
    square: float


class Combination:
    """``c r + J q`` of weighted rows, with gram = ``J'J q`` (n,)."""

    def __init__(self, r: Residuals, c: float, q: np.ndarray, gram: np.ndarray) -> None:
        self._r, self.c, self.q, self.gram = r, c, q, gram

    def __add__(self, other: Combination) -> Combination:
        return Combination(self._r, self.c + other.c, self.q + other.q, self.gram + other.gram)

    def __rmul__(self, a: float) -> Combination:
        return Combination(self._r, a * self.c, a * self.q, a * self.gram)

    def __matmul__(self, other: Combination) -> float:
        cross = self._r.gradient @ (self.c * other.q + other.c * self.q)
        return float(self.c * other.c * self._r.square + cross + self.q @ other.gram)


class GradientJob(SumsJob):
    """J'r (n,), the squared norms of the columns (n,), and r'r of a shard."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        n = self._functions.n
        out = np.zeros(2 * n + 1)
        for J, r in self._weighted_rows(x, shard):
            xp = array_namespace(r)
            J, r = xp.astype(J, xp.float64, copy=False), xp.astype(r, xp.float64, copy=False)
            out[:n] += to_numpy(J.T @ r)
            out[n:-1] += to_numpy(xp.sum(J * J, axis=0))
            out[-1] += float(r @ r)
        self._put(shard, out)
        return 0.0


class ProductJob(SumsJob):
    """J'J x (n,) of a shard, of functions that do not depend on x."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        out = np.zeros(self._functions.n)
        for J, _ in self._weighted_rows(x, shard):
            J = array_namespace(J).astype(J, x.dtype, copy=False)
            out += to_numpy(J.T @ (J @ x))
        self._put(shard, out)
        return 0.0


class WideProducts(OperatorSubproblem):
    """Subproblem of a J with m < n, whose products are those of its columns."""

    def __init__(self, wide: WideEquations, r: np.ndarray, options: Mapping[str, Any]) -> None:
        self._wide = wide
        super().__init__(None, r, wide.norms, **stopping(options))

    def _times(self, p: np.ndarray) -> np.ndarray:
        return self._wide.matvec(p)

    def _back(self, z: np.ndarray) -> np.ndarray:
        return self._wide.rmatvec(z)
