"""The caller's functions: the only place that calls user code, and what it takes from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from ._xp import FLOAT, Array, array_namespace, is_cupynumeric, is_numpy, shares_memory


class Wrapped:
    """A function of the caller in one of ours: attributes of his own say nothing to us."""

    words = ("fun", "x0")  # the arguments that errors are about
    stays: bool = False  # whether it may return cuPyNumeric arrays


class UserFunction:
    """A user's function with its extra arguments, returning arrays of one kind.

    It can be pickled where the user's function can, for workers in other processes.
    """

    def __init__(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
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
            stays = isinstance(self.function, Wrapped) and self.function.stays
            if not (stays and is_cupynumeric(r)):
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
            raise other_length(self.name, self.shape[0], r.shape[0])
        return r


def is_problem(fun: Any) -> bool:
    """Whether ``fun`` is a whole problem, with methods `residual`, `cost` and `linearize`.

    Of a callable its class must have them: a function may have attributes, or any that is asked
    for (a mock).
    """
    if not hasattr(fun, "linearize"):  # a class would format an error before it says no
        return False
    owner = type(fun) if callable(fun) else fun
    return all(hasattr(owner, name) for name in ("residual", "cost", "linearize"))


def other_length(name: str, expected: int, actual: int) -> ValueError:
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
        return _as_numbers(name, a, float)
    return a


def _as_numbers(name: str, a: np.ndarray, dtype: Any) -> np.ndarray:
    """An array of objects, say, as one of numbers; TypeError, which names the function, if not."""
    try:
        return a.astype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must return numbers, got an array of dtype {a.dtype}.") from None


class ResidualAndJacobian:
    """One function that returns both (``jac=True``), split in two with the last pair kept."""

    def __init__(self, function: UserFunction) -> None:
        self._function = function
        self._last: tuple[Array, Any] | None = None
        self._reused: bool | None = None  # whether one matrix is filled at every call, once known

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
        if self._last is not None and not self._reused:
            self._reused = shares_memory(pair[1], self._last[1])
        self._last = (x, pair[1])
        return inner.residuals(pair[0], x)

    def jac(self, x: Array) -> Any:
        """Jacobian at x, which has been evaluated already unless a later trial came between."""
        if self._last is None or not _is_at(self._last[0], x):
            self(x)
        assert self._last is not None
        J = self._last[1]
        # The next trial may be rejected, and this matrix is needed again.
        return J if self._reused is False or not hasattr(J, "copy") else J.copy()


def _is_at(trial: Array, x: Array) -> bool:
    """Whether x is the point of a trial: itself, or what the host has read of it from Legate."""
    return trial is x or getattr(trial, "host", None) is x


def entries(p: Array) -> Any:
    """The parameters (n,) one by one; `flat` ends without the error that ``*p`` formats and drops.

    It takes a third of the time.
    """
    return p.flat if type(p) is np.ndarray else p


class ModelResidual(Wrapped):
    """``whiten(f(xdata, *parameters) - ydata)``; can be pickled where f can."""

    words = ("f", "p0")

    def __init__(self, f: Any, xdata: Any, ydata: Array, whiten: Any) -> None:
        self.f, self.xdata, self.ydata, self.whiten = f, xdata, ydata, whiten

    def __call__(self, p: Array) -> Array:
        """Residuals (m,)."""
        values = self.f(self.xdata, *entries(p))
        try:
            r = values - self.ydata
        except (TypeError, ValueError) as error:
            if values is None:
                raise TypeError(
                    "`f` must return an array of the shape of `ydata`, got None."
                ) from None
            if isinstance(error, TypeError):
                raise
            raise self._other_shape(values) from error
        if r.ndim > 1:  # (m,) against (m, 1), say: broadcast to (m, m)
            raise self._other_shape(values)
        return r if self.whiten is None else self.whiten(r)

    def differences(
        self, x: np.ndarray, steps: Sequence[float], r: np.ndarray, rows: np.ndarray
    ) -> bool:
        """Rows (n, m) of J' by one-sided differences of the model; False if it is unusual."""
        if self.whiten is not None:
            return False
        f, xdata, p = self.f, self.xdata, list(entries(x))
        here = r + self.ydata  # f at x: to a rounding error, none where f is near the data
        shape = r.shape
        for j, h in enumerate(steps):
            own = p[j]
            p[j] = own + h
            values = f(xdata, *p)
            p[j] = own
            if type(values) is not np.ndarray or values.dtype is not FLOAT or values.shape != shape:
                return False
            row = rows[j]
            np.subtract(values, here, row)
            row *= 1.0 / h
        return True

    def _other_shape(self, values: Any) -> ValueError:
        expected, got = tuple(self.ydata.shape), np.shape(values)
        if got == expected:
            return ValueError(f"`ydata` must have 1 dimension, got shape {expected}.")
        return ValueError(
            f"`f` must return an array of the shape of `ydata`, {expected}, got {got}."
        )


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
    if a.dtype.kind in "OUSV":
        return _as_numbers("jac", a, dtype)
    if a.dtype.kind == "c":
        raise complex_jacobian()
    return a.astype(dtype, copy=False)


def complex_jacobian() -> TypeError:
    """The error for a complex Jacobian of real residuals."""
    return TypeError("`jac` must be real where `x0` and the residuals are real, got complex.")


def wrong_shape(actual: Any, expected: tuple[int, int], where: str = "") -> ValueError:
    """The error for a Jacobian of the wrong shape."""
    return ValueError(f"`jac` must return shape (m, n) = {expected}{where}, got {tuple(actual)}.")
