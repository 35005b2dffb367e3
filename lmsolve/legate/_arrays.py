"""cuPyNumeric arrays, and NumPy's large products, in `least_squares`: what `backend` does.

The parameters, and all that is n-sized, are NumPy on the host, alike on every rank: an operation
of Legate costs some 300 us, and a trial has dozens of n-sized ones. The user's functions see
cuPyNumeric arrays all the same. What they return, residuals (m,) and a Jacobian (m, n), stays
where it is, and is reduced there (`_sums`). Only what is too small to gain comes to the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmsolve._functions import Wrapped, is_problem
from lmsolve._sums import LOCAL, LocalSums
from lmsolve._xp import is_cupynumeric, to_numpy

from ._start import start
from ._sums import ShardedSums


@dataclass(frozen=True)
class Placement:
    """A call of `least_squares` moved to NumPy parameters, and its result moved back."""

    fun: Any
    x0: Any
    jac: Any
    callback: Any
    sums: LocalSums
    finish: Callable[[Any], Any]


def place(fun: Any, x0: Any, jac: Any, callback: Any, backend: str | None) -> Placement:
    """The call as ``backend`` (None, 'auto', 'numpy', 'cupynumeric') and x0 ask for it."""
    if backend == "cupynumeric":
        start()
    sums = LOCAL if backend == "numpy" else ShardedSums(backend == "cupynumeric")
    if not is_cupynumeric(x0):
        return Placement(fun, x0, jac, callback, sums, lambda result: result)
    pays = sums.pays if isinstance(sums, ShardedSums) else _never
    return Placement(
        fun if is_problem(fun) or not callable(fun) else Called(fun, pays),
        to_numpy(x0).copy(),
        Called(jac, pays) if callable(jac) else jac,
        None if callback is None else _callback(callback),
        sums,
        _moved_back,
    )


def _never(m: int, n: int) -> bool:
    return False


class Called(Wrapped):
    """A user's function at NumPy parameters (n,): it sees a cuPyNumeric array.

    Of what it returns arrays of as many rows as pay stay in Legate's memory.
    """

    stays = True

    def __init__(self, function: Any, pays: Callable[[int, int], bool]) -> None:
        self._function, self._pays = function, pays
        if isinstance(function, Wrapped):
            self.words = function.words

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """An array, a pair, or an iterator of either."""
        array = start().array(getattr(x, "array", x))  # the user may write into its argument
        return self._taken(self._function(array, *args, **kwargs), x)

    def _taken(self, value: Any, x: Any) -> Any:
        if is_cupynumeric(value):
            return value if self._stays(value, x.shape[0]) else to_numpy(value)
        if isinstance(value, tuple):
            return tuple(self._taken(v, x) for v in value)
        if hasattr(value, "__next__"):
            return (self._taken(v, x) for v in value)
        return value

    def _stays(self, value: Any, n: int) -> bool:
        """Whether residuals or a Jacobian stay; columns count as rows where m < n."""
        if value.dtype.kind not in "fc" or value.ndim not in (1, 2):
            return False
        m = value.shape[0]
        return self._pays(max(m, n), min(m, n))


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
