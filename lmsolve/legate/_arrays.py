"""cuPyNumeric arrays, and NumPy's large products, in `least_squares`: what `backend` does.

The parameters, and all that is n-sized, are NumPy on the host, alike on every rank: an operation
of Legate costs some 300 us, and a trial has dozens of n-sized ones. The user's functions see
cuPyNumeric arrays all the same. The Jacobian stays where it is, and J'J, J'r and, where those are
ill-conditioned, the triangular factor of J are reduced by Legate's tasks, a row shard each: a
Jacobian of NumPy is read by them in place, block by block, and not copied. The residuals (m,)
come to the host at each trial, a view of Legate's memory where that is the host's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lmsolve._subproblem import NormalEquations, Subproblem, dense_subproblem
from lmsolve._xp import Array, Namespace, is_cupynumeric, to_numpy

from ._blocks import NumpyBlocks
from ._rows import BlockFunctions, RowProblem, rows_of_block
from ._start import check_startable, start

#: With fewer multiplications than this in J'J (m n^2) a launch costs more than it saves.
SMALL = 2e8


@dataclass(frozen=True)
class Placement:
    """A call of `least_squares` moved to NumPy parameters, and its result moved back."""

    fun: Any
    x0: Any
    jac: Any
    callback: Any
    dense: Callable[..., Subproblem]
    finish: Callable[[Any], Any]


def place(fun: Any, x0: Any, jac: Any, callback: Any, backend: str | None) -> Placement:
    """The call as ``backend`` (None, 'auto', 'numpy', 'cupynumeric') and x0 ask for it."""
    if backend == "cupynumeric":
        start()
    dense: Callable[..., Subproblem] = dense_subproblem
    if backend != "numpy":
        dense = ShardedSums(0.0 if backend == "cupynumeric" else SMALL)
    if not is_cupynumeric(x0):
        return Placement(fun, x0, jac, callback, dense, lambda result: result)
    return Placement(
        fun if hasattr(fun, "linearize") or not callable(fun) else partial(_called, fun),
        to_numpy(x0).copy(),
        partial(_called_jacobian, jac, backend != "numpy") if callable(jac) else jac,
        None if callback is None else _callback(callback),
        dense,
        _moved_back,
    )


class ShardedSums:
    """`dense_subproblem` with its sums over rows taken by Legate, where that pays."""

    def __init__(self, smallest: float) -> None:
        self._smallest = smallest
        self._problem: RowProblem | None = None

    def __call__(
        self, xp: Namespace, J: Array, r: Array, weights: Array | None = None
    ) -> Subproblem:
        """Subproblem of J (m, n) with weights (m,), and residuals r (m,) weighted already."""
        m, n = J.shape
        if m < n or m * n * n < self._smallest or not _startable():
            return dense_subproblem(xp, to_numpy(J), r, weights)
        data = (J, r) if weights is None else (J, r, weights)
        if self._problem is None:
            functions = BlockFunctions(
                _residuals,
                _weighted_rows,
                n=n,
                blocks=NumpyBlocks("float64"),
                loss=None,
                block_rows=rows_of_block(n),
            )
            self._problem = RowProblem(functions, m, data)
        else:
            self._problem.place(m, data)
        sums = self._problem.linearize(np.zeros(n, dtype=r.dtype))
        assert isinstance(sums, NormalEquations)
        return sums


def _residuals(x: Array, J: Array, r: Array, *weights: Array) -> Array:
    return r


def _weighted_rows(x: Array, J: Array, r: Array, *weights: Array) -> tuple[Array, Array]:
    return r, J * weights[0][:, None] if weights else J


def _startable() -> bool:
    """Whether Legate runs, or would start."""
    try:
        check_startable()
    except (ImportError, RuntimeError):
        return False
    return True


def _called(fun: Callable[..., Any], x: np.ndarray, *args: Any, **kwargs: Any) -> Any:
    """What ``fun`` makes of x as a cuPyNumeric array, on the host."""
    return _on_host(fun(start().array(x), *args, **kwargs))


def _called_jacobian(
    jac: Callable[..., Any], stay: bool, x: np.ndarray, *args: Any, **kwargs: Any
) -> Any:
    """What ``jac`` makes of x; a real matrix stays in Legate's memory if it may."""
    J = jac(start().array(x), *args, **kwargs)
    if stay and is_cupynumeric(J) and J.ndim == 2 and J.dtype.kind == "f":
        return J
    return _on_host(J)


def _on_host(value: Any) -> Any:
    """cuPyNumeric arrays in a function's value as NumPy's: one, a pair, or an iterator of them."""
    if is_cupynumeric(value):
        return to_numpy(value)
    if isinstance(value, tuple):
        return tuple(_on_host(v) for v in value)
    if hasattr(value, "__next__"):
        return _each(value)
    return value


def _each(values: Iterator[Any]) -> Iterator[Any]:
    return (_on_host(value) for value in values)


def _callback(callback: Any) -> Any:
    """The user's callback, which sees cuPyNumeric arrays."""
    import inspect

    if not callable(callback):
        return callback  # refused, with its message, by the front door
    if set(inspect.signature(callback).parameters) == {"intermediate_result"}:
        return lambda intermediate_result: callback(
            intermediate_result=_moved_back(intermediate_result)
        )
    return lambda x: callback(start().array(x))


def _moved_back(result: Any) -> Any:
    """A result whose arrays are cuPyNumeric's."""
    xp = sys.modules["cupynumeric"]
    for name in ("x", "fun", "jac", "grad"):
        if isinstance(result.get(name), np.ndarray):
            result[name] = xp.array(result[name])
    return result
