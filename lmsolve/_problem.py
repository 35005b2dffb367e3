"""The residual function as the solver sees it.

A problem answers three questions: the residuals at x, their cost, and the linearisation at an
accepted x. The last is asked only there, so that a rejected trial costs one residual evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import _numdiff
from ._factored import ILL
from ._functions import as_jacobian, complex_jacobian, is_dense, other_length, wrong_shape
from ._loss import Loss
from ._numdiff import Differences
from ._subproblem import COARSE, NormalEquations, Subproblem
from ._sums import LOCAL, LocalSums
from ._xp import (
    Array,
    Namespace,
    array_namespace,
    copied,
    is_complex,
    is_cupynumeric,
    is_numpy,
    on_host,
    shares_memory,
    to_numpy,
)

#: In place of a Jacobian that has served, so that its memory is free while `jac` makes another.
FREED = np.empty((0, 0))


class LeastSquaresProblem(Protocol):
    """The seam: what the solver needs. ``r`` may be any handle that the problem understands."""

    xp: Namespace

    def residual(self, x: Array) -> Any:
        """Residuals at x (n,), or a handle on them."""
        ...

    def cost(self, r: Any) -> Array:
        """0-d cost of residuals."""
        ...

    def linearize(self, x: Array, r: Any) -> Subproblem:
        """Subproblem at an accepted x, whose residuals are r."""
        ...


@dataclass
class Problem:
    """A user's residual function and Jacobian over arrays of one namespace.

    Parameters
    ----------
    xp : namespace
        Namespace of x and of the residuals.
    fun : callable
        ``fun(x)`` returns residuals, array, shape (m,).
    jac : callable or None
        ``jac(x)`` returns the Jacobian: array (m, n), sparse, operator, or an iterator over pairs
        of blocks of residuals and rows. None differences ``fun``.
    differences : Differences or None
        How to difference where ``jac`` is None.
    loss : Loss or None
        A robust loss; None is the plain sum of squares.
    sparsity : Sparsity or None
        Structure of the Jacobian to difference in groups of columns.
    linear_solver : pair or None
        What the caller said of it: a name or None, and options.
    sums : LocalSums
        Takes the sums over rows.
    norms_needed : bool
        Whether the caller asked for the scale of the columns by name, ``x_scale='jac'``.
    precision : float
        Relative error of the residuals.
    """

    xp: Namespace
    fun: Callable[[Array], Array]
    jac: Callable[[Array], Any] | None
    differences: Differences | None = None
    loss: Loss | None = None
    sparsity: _numdiff.Sparsity | None = None
    linear_solver: Any = None
    sums: LocalSums = LOCAL
    norms_needed: bool = False
    precision: float = 2.0**-52
    m: int | None = None
    J: Any = None
    nfev: int = 0
    njev: int = 0
    first: Any = None  # what `fun` returned first: some fill this array at every call
    _pending: Any = None
    _memory: dict[str, Any] = field(default_factory=dict)
    _buffer: Any = None

    def residual(self, x: Array) -> Array:
        """Residuals r (m,) at x (n,); one evaluation."""
        self.nfev += 1
        r = self.fun(x)
        if self.first is None or shares_memory(r, self.first):
            self.first = r
            r = copied(r)
        else:
            self.first = False  # every call makes an array of its own
        if self.m is not None and r.shape[0] != self.m:
            raise other_length("fun", self.m, r.shape[0])
        return r

    def cost(self, r: Array) -> Array:
        """0-d cost, summed in float64."""
        return self.sums.cost(self.xp, r, self.loss)

    def jacobian(self, x: Array, r: Array) -> Any:
        """J at x (n,): array (m, n), sparse, operator, or an iterator over blocks of rows."""
        if self._pending is not None:
            J, self._pending = self._pending, None
            return J
        if self.jac is None:
            return self.taken(self._differenced(x, r), x, r)
        if self.J is not None:
            self.J = FREED
        return self.taken(self.jac(x), x, r)

    def taken(self, J: Any, x: Array, r: Array) -> Any:
        """A Jacobian that was just made at x (n,), checked and kept."""
        self.njev += 1
        if type(J) is not np.ndarray or J.ndim != 2 or self.J is None or J.dtype != x.dtype:
            if hasattr(J, "__next__"):
                return J
            J = self._checked(J, x, r)
        elif J.shape != (r.shape[0], x.shape[0]):
            raise wrong_shape(J.shape, (r.shape[0], x.shape[0]))
        self.J = J
        return J

    def reuse(self, J: Any) -> None:
        """Let the next linearisation, at the same x, take this Jacobian instead of a new one."""
        self._pending = J

    def escalate(self) -> None:
        """Let the next linearisation begin with QR."""
        self._memory[ILL] = True

    def is_coarse(self) -> bool:
        """Whether a step has asked for J'J where single precision was to guide it."""
        return COARSE in self._memory

    def form_gram(self) -> None:
        """Let linearisations form J'J, however large."""
        self._memory[COARSE] = True

    def linearize(self, x: Array, r: Array) -> Subproblem:
        """Subproblem at x (n,) with residuals r (m,)."""
        J = self.jacobian(x, r)
        if hasattr(J, "__next__"):
            return self._from_blocks(J, x)
        if is_dense(J) and (self.linear_solver is None or self.linear_solver[0] != "lsmr"):
            return self.sums.subproblem(self.xp, J, r, self.loss, self._memory)
        if is_dense(J):
            return self.sums.iterated(self.xp, J, r, self.loss, self.linear_solver[1])
        w = None
        r = on_host(self.xp, r)
        if self.loss is not None:
            w, r = self.loss.weights(self.xp, r)
        return self._iterative(J, r, w)

    def _iterative(self, J: Any, r: Array, w: Array | None) -> Subproblem:
        """Subproblem of a sparse J or an operator."""
        from . import _sparse

        solver, options = self.linear_solver or (None, {})
        if solver == "exact":
            raise ValueError(
                "`tr_solver` must not be 'exact' where `jac` is sparse or an operator, got "
                f"{type(J).__name__}."
            )
        if hasattr(J, "tocsr"):
            return _sparse.sparse_subproblem(J, r, w, solver, options, self._memory)
        if self.norms_needed:
            raise ValueError(
                "`x_scale` must not be 'jac' where `jac` returns an operator, whose column norms "
                f"are unknown, got {type(J).__name__}: give None or sizes."
            )
        return _sparse.operator_subproblem(J, r, w, options)

    def curvature_rows(
        self, x: Array, r: Array, J: Any
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """See LocalSums, at x (n,) with residuals r (m,)."""
        return self.sums.curvature_rows(J, r, self.loss)

    def columns(self, x: Array, r: Array, J: Any) -> tuple[Any, np.ndarray | None] | None:
        """See LocalSums, at x (n,) with residuals r (m,)."""
        return self.sums.columns(J, r, self.loss)

    def derivative_error(self) -> float:
        """Relative error of the Jacobian's entries to expect from the way it is made."""
        diff = self.differences
        if self.jac is not None or diff is None or diff.kind == "cs":
            return 0.0
        return float(self.precision ** (0.5 if diff.kind == "2-point" else 2.0 / 3.0))

    def refine_derivatives(self) -> bool:
        """Go over from one-sided to central differences; False where that is not possible."""
        diff = self.differences
        if self.jac is not None or diff is None or diff.kind != "2-point":
            return False
        if diff.rel_step is not None:
            return False
        self.differences = replace(diff, kind="3-point")
        return True

    def _differenced(self, x: Array, r: Array) -> Any:
        diff = self.differences
        assert diff is not None
        if self.sparsity is not None and is_numpy(self.xp):
            fun = self.fun if type(r) is np.ndarray else self._host_fun
            return _numdiff.grouped(diff, self.sparsity, fun, x, to_numpy(r))
        if type(r) is not np.ndarray:
            self.sums.reserve(r, x.shape[0])
            squares = partial(self.sums.cost, array_namespace(r), loss=None)
            return _numdiff.dense_xp(diff, self.fun, x, to_numpy(x), r, squares)
        if self._buffer is None or self._buffer.shape[0] != r.shape[0]:
            self._buffer = np.empty((r.shape[0], x.shape[0]), dtype=r.dtype, order="F")
        return _numdiff.dense(diff, self.fun, x, r, self._buffer)

    def _host_fun(self, x: Array) -> np.ndarray:
        return to_numpy(self.fun(x))

    def _checked(self, J: Any, x: Array, r: Array) -> Any:
        """J as a matrix (m, n) that the subproblems understand; finite, at the first call."""
        shape = (r.shape[0], x.shape[0])
        if J is None:
            raise TypeError("`jac` must return the Jacobian, got None.")
        if is_numpy(self.xp):
            if not is_cupynumeric(J):  # that one stays where it is
                J = as_jacobian(J, x.dtype)
            elif is_complex(J):
                raise complex_jacobian()
        elif array_namespace(J) is not self.xp:
            raise TypeError(
                f"`jac` must return an array of the library of `x0`, {self.xp.__name__}, "
                f"got {type(J).__name__}."
            )
        if (len(J.shape) == 1 and shape[1] == 1) or (len(J.shape) < 2 and shape[0] == 1):
            J = self.xp.reshape(J, shape)
        if tuple(J.shape) != shape:
            raise wrong_shape(J.shape, shape)
        if self.J is None:
            self._check_finite(J)
        return J

    def _check_finite(self, J: Any) -> None:
        values = J.data if hasattr(J, "tocsr") else J
        if not is_dense(J) and values is J:
            return  # an operator has no entries to look at
        xp = self.xp if is_dense(J) else np
        if not bool(xp.all(xp.isfinite(values))):
            bad = int(np.sum(~np.isfinite(to_numpy(values))))
            raise ValueError(f"`jac` must be finite at `x0`, got {bad} entries that are not.")

    def _from_blocks(self, blocks: Iterator[tuple[Array, Array]], x: Array) -> NormalEquations:
        """Subproblem from the sums over (residuals, rows) blocks; J never exists."""
        sums = self.sums.block_sums(self.xp, self.loss, x.shape[0])
        for r, J in blocks:
            sums.add(r, J)
        if self.m is not None and sums.m != self.m:
            raise ValueError(
                f"`jac` must yield as many rows as `fun` has residuals, {self.m}, got {sums.m}."
            )
        return NormalEquations(self.xp, *sums.result())


class StreamedCost(NamedTuple):
    """What remains of streamed residuals: their cost and their number."""

    cost: float
    m: int


@dataclass
class StreamedProblem:
    """A problem whose residuals come in blocks too: neither r nor J is ever held.

    ``fun(x)`` iterates over residual blocks (k,), ``jac(x)`` over pairs of them and rows (k, n).
    """

    xp: Namespace
    fun: Callable[[Array], Iterator[Array]]
    jac: Callable[[Array], Iterator[tuple[Array, Array]]]
    loss: Loss | None = None
    sums: LocalSums = LOCAL
    m: int | None = None
    J: None = None
    nfev: int = 0
    njev: int = 0

    def residual(self, x: Array) -> StreamedCost:
        """Cost and number of the residuals at x (n,)."""
        self.nfev += 1
        costs = self.sums.block_costs(self.xp, self.loss)
        for r in self.fun(x):
            costs.add(r)
        self.m = costs.m
        return StreamedCost(costs.result(), costs.m)

    def cost(self, r: StreamedCost) -> float:
        """Cost of residuals that were summed already."""
        return r.cost

    def linearize(self, x: Array, r: StreamedCost) -> NormalEquations:
        """Subproblem at x (n,) from one pass over the row blocks."""
        self.njev += 1
        sums = self.sums.block_sums(self.xp, self.loss, x.shape[0])
        for block, J in self.jac(x):
            sums.add(block, J)
        if sums.m != r.m:
            raise ValueError(
                f"`jac` must yield as many rows as `fun` yields residuals, {r.m}, got {sums.m}."
            )
        return NormalEquations(self.xp, *sums.result())
