"""The residual function as the solver sees it: the only caller of user code.

A problem answers three questions: the residuals at x, their cost, and the linearisation at an
accepted x. The last is asked only there, so that a rejected trial costs one residual evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import _numdiff
from ._loss import Loss
from ._numdiff import Differences
from ._subproblem import ILL, NormalEquations, Rows, Subproblem, dense_subproblem
from ._subproblem import gram as gram_of
from ._xp import (
    Array,
    Namespace,
    array_namespace,
    copied,
    is_complex,
    is_cupynumeric,
    is_numpy,
    on_host,
    sum_squares,
    to_floats,
    to_numpy,
)


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


class UserFunction:
    """A user's function with its extra arguments, returning arrays of one kind.

    It can be pickled where the user's function can, for workers in other processes.
    """

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> None:
        self.function, self.args, self.kwargs, self.name = function, args, kwargs, name
        self.dtype: Any = None
        self.shape: tuple[int, ...] | None = None

    def expect(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Hold every further call to the shape (m,) of the first, and convert to the dtype."""
        self.shape, self.dtype = shape, dtype

    def __call__(self, x: Array) -> Array:
        """Residuals (m,) at x (n,); a scalar becomes one residual."""
        return self.residuals(self.raw(x), x)

    def raw(self, x: Array) -> Any:
        """What the function returns at x (n,), whatever it is."""
        if type(x) is np.ndarray:
            x = x.copy()  # the user may write into its argument
        return self.function(x, *self.args, **self.kwargs)

    def bare(self) -> Callable[[Array], Any]:
        """The function of x alone, for a loop that copies x and sees to the value itself."""
        if self.args or self.kwargs:
            return self.raw
        if type(self.function) is FunctionType:
            return self.function
        # A method is called faster than the object whose call it is.
        method = vars(type(self.function)).get("__call__")
        return method.__get__(self.function) if isinstance(method, FunctionType) else self.function

    def residuals(self, r: Any, x: Array) -> Array:
        """``r`` as an array (m,) of the kind of x."""
        plain = type(r) is np.ndarray is type(x) and r.dtype == (self.dtype or x.dtype)
        if plain and (r.shape == self.shape or (self.shape is None and r.ndim == 1)):
            return r
        if r is None:
            raise TypeError(f"`{self.name}` must return an array of residuals, got None.")
        xp = array_namespace(x)
        if is_numpy(xp):
            if not (is_cupynumeric(r) and hasattr(self.function, "stays")):
                r = _numpy_residuals(r, self.name)
            if self.dtype is not None and r.dtype != self.dtype and r.dtype.kind != "c":
                r = r.astype(self.dtype)
        elif array_namespace(r) is not xp:
            raise TypeError(
                f"`{self.name}` must return an array of the library of `x0`, "
                f"{xp.__name__}, got {type(r).__name__}."
            )
        if r.ndim == 0:
            r = xp.reshape(r, (1,))
        if r.ndim != 1:
            raise ValueError(
                f"`{self.name}` must return at most 1-d residuals, got shape {tuple(r.shape)}."
            )
        if self.shape is not None and r.shape != self.shape:
            raise _other_length(self.name, self.shape[0], r.shape[0])
        return r


def _other_length(name: str, expected: int, actual: int) -> ValueError:
    """The error for residuals whose number changes."""
    return ValueError(
        f"`{name}` must return the same number of residuals at every call: {expected} at the "
        f"start, got {actual} now."
    )


def _numpy_residuals(r: Any, name: str) -> np.ndarray:
    """``r`` as a NumPy array of numbers."""
    if isinstance(r, np.ma.MaskedArray) and np.ma.is_masked(r):
        masked = int(np.ma.getmaskarray(r).sum())
        raise ValueError(f"`{name}` must return unmasked residuals, got {masked} masked ones.")
    try:
        a = np.asarray(r)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must return one array of numbers, got {type(r).__name__}: {error}."
        ) from error
    if a.dtype.kind in "biu":
        return a.astype(float)
    if a.dtype.kind not in "fc":
        try:
            return a.astype(float)
        except (TypeError, ValueError):
            raise TypeError(
                f"`{name}` must return numbers, got an array of dtype {a.dtype}."
            ) from None
    return a


class ResidualAndJacobian:
    """One function that returns both (``jac=True``), split in two with the last pair kept."""

    def __init__(self, function: UserFunction) -> None:
        self._function = function
        self._last: tuple[Array, Any] | None = None

    def expect(self, shape: tuple[int, ...], dtype: Any) -> None:
        """See UserFunction."""
        self._function.expect(shape, dtype)

    def __call__(self, x: Array) -> Array:
        """Residuals (m,) at x; the Jacobian is kept."""
        inner = self._function
        argument = x.copy() if type(x) is np.ndarray else x
        pair = inner.function(argument, *inner.args, **inner.kwargs)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                "`fun` must return the pair (residuals, Jacobian) where `jac` is True, "
                f"got {type(pair).__name__}."
            )
        self._last = (x, pair[1])
        return inner.residuals(pair[0], x)

    def jac(self, x: Array) -> Any:
        """Jacobian at x, which has been evaluated already unless a later trial came between."""
        if self._last is None or not _is_at(self._last[0], x):
            self(x)
        assert self._last is not None
        return self._last[1]


def _is_at(trial: Array, x: Array) -> bool:
    """Whether x is the point of a trial: itself, or what the host has read of it from Legate."""
    return trial is x or getattr(trial, "host", None) is x


class LocalSums:
    """Sums over rows, taken where and by what library the arrays are."""

    def covers(self, m: int, n: int) -> bool:
        """Whether this is all there is to a dense problem of m rows and n parameters."""
        return True

    def cost(self, xp: Namespace, r: Array, loss: Loss | None) -> Array:
        """0-d cost of residuals r (m,), summed in float64."""
        if loss is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # a trial may be anywhere
                return loss.cost(xp, r)
        return 0.5 * sum_squares(xp, r)

    def subproblem(
        self,
        xp: Namespace,
        J: Array,
        r: Array,
        loss: Loss | None,
        memory: dict[str, Any] | None = None,
    ) -> Subproblem:
        """Subproblem of a dense J (m, n) and r (m,); memory: what those before it have left."""
        w = None
        if loss is not None:
            w, r = loss.weights(xp, r)
        return dense_subproblem(xp, J, r, w, memory)

    def iterated(
        self, xp: Namespace, J: Array, r: Array, loss: Loss | None, options: dict[str, Any]
    ) -> Subproblem:
        """Subproblem of a dense J (m, n) that is to be iterated on, and r (m,)."""
        from . import _sparse

        w = None
        if loss is not None:
            w, r = loss.weights(xp, r)
        return _sparse.iterated_subproblem(J, r, w, options)

    def curvature_rows(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Some rows (k, n) with the curvature of the cost, and its scores if there is a loss.

        They stand for all m where those should not come to the host; None where they may.
        """
        return None

    def columns(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[Any, np.ndarray | None] | None:
        """`Columns` of rows with the curvature of the cost, and what gives their scores.

        Where J (m, n) has m < n and should not come to the host; else None. The second are
        factors (m,) of those rows, or None without a loss.
        """
        return None

    def reserve(self, r: Array, n: int) -> None:
        """Raise MemoryError if a Jacobian by differences of residuals r (m,) would not fit."""

    def block_costs(self, xp: Namespace, loss: Loss | None) -> BlockCosts:
        """Where the costs of blocks of residuals add up."""
        return BlockCosts(xp, loss)

    def block_sums(self, xp: Namespace, loss: Loss | None, n: int) -> BlockSums:
        """Where J'J and J'r of blocks of rows add up."""
        return BlockSums(xp, loss, n)


LOCAL = LocalSums()


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
    sums : LocalSums
        Takes the sums over rows.
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
        if self.first is None or r is self.first:
            self.first = r
            r = copied(r)
        else:
            self.first = False  # every call makes an array of its own
        if self.m is not None and r.shape[0] != self.m:
            raise _other_length("fun", self.m, r.shape[0])
        return r

    def cost(self, r: Array) -> Array:
        """0-d cost, summed in float64."""
        return self.sums.cost(self.xp, r, self.loss)

    def jacobian(self, x: Array, r: Array) -> Any:
        """J at x (n,): array (m, n), sparse, operator, or an iterator over blocks of rows."""
        if self._pending is not None:
            J, self._pending = self._pending, None
            return J
        return self.taken(self._differenced(x, r) if self.jac is None else self.jac(x), x, r)

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
                raise _complex_jacobian()
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


class BlockCosts:
    """Running cost over blocks of residuals."""

    def __init__(self, xp: Namespace, loss: Loss | None) -> None:
        self._xp, self._loss = xp, loss
        self._cost = 0.0
        self.m = 0

    def add(self, r: Array) -> None:
        """Add a block of residuals (k,)."""
        self.m += r.shape[0]
        self._add(r)

    def _add(self, r: Array) -> None:
        self._cost += to_floats(LOCAL.cost(self._xp, r, self._loss))[0]

    def result(self) -> float:
        """The cost."""
        return self._cost


class BlockSums:
    """Running sums J'J (n, n) and J'r (n,) over blocks of weighted rows."""

    def __init__(self, xp: Namespace, loss: Loss | None, n: int) -> None:
        self._xp, self._loss, self._n = xp, loss, n
        self._gram: Array = None
        self._grad: Array = None
        self.m = 0

    def add(self, r: Array, J: Array) -> None:
        """Add a block of residuals (k,) and rows (k, n)."""
        if tuple(J.shape) != (r.shape[0], self._n):
            raise wrong_shape(J.shape, (r.shape[0], self._n), " in a block")
        self.m += r.shape[0]
        self._add(r, J)

    def _add(self, r: Array, J: Array) -> None:
        w = None
        if self._loss is not None:
            w, r = self._loss.weights(self._xp, r)
        G, g = gram_of(self._xp, Rows(self._xp, J, r, w))
        self._add_sums(G, g)

    def _add_sums(self, G: Array, g: Array) -> None:
        if self._gram is None:
            self._gram, self._grad = G, g
        else:
            self._gram, self._grad = self._gram + G, self._grad + g

    def result(self) -> tuple[Array, Array]:
        """The sums."""
        if self._gram is None:
            raise ValueError("`jac` must yield at least one block of rows, got none.")
        return self._gram, self._grad


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


def is_dense(J: Any) -> bool:
    """Whether J is an array, not a sparse matrix or an operator."""
    return type(J) is np.ndarray or not (hasattr(J, "tocsr") or hasattr(J, "rmatvec"))


def as_jacobian(J: Any, dtype: Any) -> Any:
    """A user's Jacobian as a NumPy array of the dtype, sparse matrix or operator."""
    if hasattr(J, "tocsr"):
        return J if J.format in ("csr", "csc") else J.tocsr()
    if hasattr(J, "rmatvec"):
        return J
    try:
        a = np.asarray(J)
    except ValueError as error:
        raise ValueError(
            f"`jac` must return one matrix of numbers, got {type(J).__name__}: {error}."
        ) from error
    if a.dtype.kind == "O" or a.dtype.kind in "USV":
        raise TypeError(f"`jac` must return numbers, got an array of dtype {a.dtype}.")
    if a.dtype.kind == "c":
        raise _complex_jacobian()
    return a.astype(dtype, copy=False)


def _complex_jacobian() -> TypeError:
    """The error for a complex Jacobian of real residuals."""
    return TypeError("`jac` must be real where `x0` and the residuals are real, got complex.")


def wrong_shape(actual: Any, expected: tuple[int, int], where: str = "") -> ValueError:
    """The error for a Jacobian of the wrong shape."""
    return ValueError(f"`jac` must return shape (m, n) = {expected}{where}, got {tuple(actual)}.")
