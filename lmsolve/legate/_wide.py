"""The step of a wide Jacobian, m < n, whose rows are products away in Legate's tasks.

The columns of J are the rows of a tall matrix J' (n, m), which the jobs of `_reduce` take shard by
shard. With w (m,) the weights of a robust loss they give, at an accepted point, the gradient and
the norms of the columns, n numbers each, and for column scales d

    K = A A',    A = diag(w) J diag(d) = L Q,    L L' = K,    Q Q' = I.

q = Q'y is as long as y (m,), so the trust region of the step ``q = p / d`` is one of m parameters
whose Jacobian is L: the host solves it, and a trial takes one product, ``p = d A' z`` with
``L'z = y``. Where K is ill-conditioned L is the triangular factor of A' instead.

The model's values at a step follow from y alone, and so p and x + p stay in Legate's memory, where
the user's functions want them: a trial reads its cost. The host has x + p once that is accepted.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import solve_triangular

from lmsolve._factored import ESCALATE, Rows
from lmsolve._linalg import LinAlgError
from lmsolve._subproblem import DualEquations
from lmsolve._xp import Array, array_namespace, is_cupynumeric, to_numpy

from . import _memory
from ._reduce import RowJob, RowSums, rows_of_block

if TYPE_CHECKING:
    from ._blocks import NumpyBlocks, TorchBlocks
    from ._reduce import Layout
    from ._tasks import Shard


class WideEquations:
    """Subproblem of J (m, n) with m < n; r and the weights w (m,) of its rows are NumPy's."""

    def __init__(
        self,
        J: Array,
        w: np.ndarray,
        r: np.ndarray,
        blocks: NumpyBlocks | TorchBlocks,
        stays: bool,
    ) -> None:
        self._sums = RowSums(ColumnFunctions(J.shape[0], blocks))
        self._Jt, self._r, self._w = J.T, r, w
        self._stays = stays and is_cupynumeric(J)  # whether the trials do, too
        layout = self._layout()
        # The shards of columns may be copies, where the array was cut into rows.
        _memory.require(2 * layout.resident, layout.option, "A wide Jacobian and its columns")
        both = self._columns(ColumnJob, layout, np.stack([w * r, w]), 2)
        self.grad, self.norms = both[0], np.sqrt(both[1])
        self._d: np.ndarray | None = None
        self._L = np.empty((0, 0))
        self._small: DualEquations | None = None
        self._last: tuple[Any, np.ndarray] = (None, r)  # a step and its J p
        self.escalated = False

    def reduced(self, d: np.ndarray, start: np.ndarray | None) -> DualEquations:
        """The subproblem in y (m,), whose column scales are ones."""
        if self._d is not d:
            self._factor(d)
        r = self._r if start is None else self._r + self.matvec(start)
        self._small = DualEquations(np, Rows(np, self._L, r))
        return self._small

    def lifted(self, y: np.ndarray) -> Any:
        """The step p (n,) of y (m,), an array or what stands for it."""
        if self.escalated:  # L may be singular, and y is in the range of L'
            z = np.linalg.lstsq(self._L.T, y, rcond=None)[0]
        else:
            z = solve_triangular(self._L, y, trans=1, lower=True)
        step = WideStep(self, self._w * z, self._L @ y)
        return step if self._stays else to_numpy(step)

    def sent(self, x: np.ndarray, z: np.ndarray) -> Array:
        """``x + d^2 J'z`` (n,) in Legate's memory."""
        assert self._d is not None
        J, xp = self._Jt, array_namespace(self._Jt)
        product = J @ xp.array(z.astype(J.dtype, copy=False))
        return xp.astype(xp.array(x) + xp.array(self._d**2) * product, x.dtype, copy=False)

    def read(self, step: WideStep) -> np.ndarray:
        """The step p (n,): one launch, and one read of n numbers."""
        assert self._d is not None
        p = self._d**2 * self._columns(ColumnJob, self._layout(), step.z[None, :], 1)[0]
        p = p.astype(self._r.dtype, copy=False)
        self._last = p, step.Jp
        return p

    def solve(self, mu: float, d: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Step p (n,); see Subproblem."""
        return to_numpy(self.lifted(self.reduced(d, start).solve(mu, np.ones_like(self._r))))

    def reduction(self, p: Any) -> Array:
        """0-d model decrease: without a launch for a step that was just lifted, or asked for."""
        if isinstance(p, WideStep):
            Jp = p.Jp  # the step knows this object: kept here, it would keep J in a cycle
        else:
            if p is not self._last[0]:
                self._last = p, self.matvec(p)
            Jp = self._last[1]
        return -(self._r @ Jp + 0.5 * (Jp @ Jp))

    def slope(self, Jp: np.ndarray) -> Array:
        """0-d ``g'p`` of a step."""
        return self._r @ Jp

    def rank(self) -> int | None:
        """Numerical rank of J d, where the last solve knows it."""
        return None if self._small is None else self._small.rank()

    def _factor(self, d: np.ndarray) -> None:
        """L (m, m) for the column scales d (n,)."""
        layout = self._layout(d)
        K = self._sums.subproblem(layout, self._w).gram
        self._d, self.escalated = d, False
        try:
            self._L = np.linalg.cholesky(K)
            ill = self._L.diagonal().min() ** 2 < ESCALATE * K.diagonal().max()
        except LinAlgError:
            ill = True
        if ill:
            self._L, self.escalated = self.triangle(d), True

    def triangle(self, d: np.ndarray) -> np.ndarray:
        """L (m, m) for the column scales d (n,) from a QR factorisation of A'."""
        m = self._r.shape[0]
        return self._sums.triangle(self._layout(d), self._w)[:m, :m].T

    def squares(self, B: np.ndarray) -> np.ndarray:
        """``|B a|^2`` (n,) of every column a (m,) of diag(w) J, for B (k, m)."""
        return self._columns(SquaresJob, self._layout(), B * self._w, 1)[0]

    def _layout(self, *data: np.ndarray) -> Layout:
        doubles = [a.astype(float, copy=False) for a in data]
        return self._sums.layout(self._Jt.shape[0], (self._Jt, *doubles))

    def _columns(self, job: type[RowJob], layout: Layout, x: np.ndarray, count: int) -> np.ndarray:
        """What a job of columns says of x, array (count, n): one launch, one read."""
        place = self._sums.place(layout, count * layout.tile, "The columns of J")
        self._sums.launch(job(self._sums.functions, layout, x, place))
        found = place.read().reshape(layout.shards, count, layout.tile)
        return np.concatenate(list(found), axis=1)[:, : layout.m].astype(self._r.dtype)

    def rmatvec(self, z: np.ndarray) -> np.ndarray:
        """Weighted J'z (n,): one launch, and one read of n numbers."""
        return self._columns(ColumnJob, self._layout(), (self._w * z)[None, :], 1)[0]

    def matvec(self, p: np.ndarray) -> np.ndarray:
        """Weighted J p (m,): one launch, and one read of m numbers."""
        layout = self._layout(p)
        place = self._sums.place(layout, self._r.shape[0], "The products with J")
        self._sums.launch(MatvecJob(self._sums.functions, layout, self._w, place))
        return place.total().astype(self._r.dtype)


class WideStep:
    """The step ``p = d^2 J'z`` (n,), z (m,) with the weights in it, which the host may ask for.

    A trial ``x + p`` is made in Legate's memory, and ``g @ p`` is known from J p (m,).
    """

    __array_ufunc__ = None  # NumPy's operators leave it to those below

    def __init__(self, equations: WideEquations, z: np.ndarray, Jp: np.ndarray) -> None:
        self._equations, self.z, self.Jp = equations, z, Jp

    def __rmul__(self, factor: float) -> WideStep:
        return WideStep(self._equations, factor * self.z, factor * self.Jp)

    def __radd__(self, x: np.ndarray) -> WideTrial:
        return WideTrial(self._equations.sent(x, self.z))

    def __rmatmul__(self, grad: np.ndarray) -> Array:
        return self._equations.slope(self.Jp)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._equations.read(self)


class WideTrial:
    """Parameters (n,) in Legate's memory, which the host reads if the step is accepted."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: Any) -> Array:
        return self.array[key]

    @cached_property
    def host(self) -> np.ndarray:
        """The array on the host."""
        return np.array(to_numpy(self.array))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.host


class ColumnFunctions:
    """What the jobs of `_reduce` ask for, from rows of J' with their column scales."""

    numbered = False

    def __init__(self, m: int, blocks: NumpyBlocks | TorchBlocks) -> None:
        self.n, self.blocks, self.block_rows = m, blocks, rows_of_block(m)

    def linear(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array, None]:
        """Zeros (b,) and A' (b, m) at weights x (m,)."""
        Jt, d = block
        return 0.0 * d, Jt * d[:, None] * x[None, :], None


class ColumnJob(RowJob):
    """J'x for the columns of a shard, x[0] (m,), and the squared norms of diag(x[1]) J if given."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        out = np.zeros((x.shape[0], self.layout.tile))
        done = 0
        xp = array_namespace(x)
        for (Jt,), b in self._blocks(shard):
            Jt = xp.astype(Jt, x.dtype, copy=False)
            out[0, done : done + b] = to_numpy(Jt @ x[0])
            if x.shape[0] == 2:
                out[1, done : done + b] = to_numpy(xp.sum((Jt * x[1]) ** 2, axis=1))
            done += b
        self._put(shard, out)
        return 0.0


class SquaresJob(RowJob):
    """The squared lengths of the products of a matrix x (k, m) with the columns of a shard."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        out = np.zeros((1, self.layout.tile))
        done = 0
        xp = array_namespace(x)
        for (Jt,), b in self._blocks(shard):
            product = xp.astype(Jt, x.dtype, copy=False) @ x.T
            out[0, done : done + b] = to_numpy(xp.sum(product * product, axis=1))
            done += b
        self._put(shard, out)
        return 0.0


class MatvecJob(RowJob):
    """The part of a shard's columns in the product with a vector, at weights x (m,)."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        total = np.zeros(self._functions.n)
        xp = array_namespace(x)
        for (Jt, p), _ in self._blocks(shard):
            Jt = xp.astype(Jt, x.dtype, copy=False)
            total += to_numpy(x * (Jt.T @ p))
        self._put(shard, total)
        return 0.0
