"""Checks at the front doors: each error names the argument, the rule, what was expected and got."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ._bounds import Box
from ._loss import LOSSES, Loss, UserLoss
from ._xp import (
    FLOAT,
    Array,
    all_finite,
    array_namespace,
    convert,
    copied,
    is_array,
    is_foreign,
    is_numpy,
    to_numpy,
)

METHODS = ("lm", "trf", "dogbox")
DIFFERENCES = ("2-point", "3-point", "cs")
BACKENDS = (None, "auto", "numpy", "cupynumeric")
TR_SOLVERS = (None, "exact", "lsmr")
LSMR_OPTIONS = ("atol", "btol", "maxiter", "regularize")
#: NumPy's letters for single and double precision, in which LAPACK computes.
LAPACK = "fd"


def one_of(value: Any, name: str, allowed: Sequence[Any]) -> None:
    """ValueError unless a value is one of those allowed."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def parameters(x0: Any, name: str = "x0") -> Array:
    """x0 as a floating array (n,) that the caller does not share."""
    if type(x0) is np.ndarray and x0.dtype.char in LAPACK and x0.dtype.isnative and x0.ndim == 1:
        x = x0.copy()
    elif is_foreign(x0):
        x = _foreign_parameters(x0, name)
    else:
        x = _numpy_parameters(x0, name)
    if x.ndim > 1:
        raise ValueError(f"`{name}` must have at most 1 dimension, got shape {tuple(x.shape)}.")
    if x.shape[0] == 0:
        raise ValueError(f"`{name}` must have at least one element, got none.")
    if not all_finite(x):
        host = to_numpy(x)
        where = np.flatnonzero(~np.isfinite(host))
        raise ValueError(
            f"`{name}` must be finite, got {host[where[0]]} at index {where[0]}"
            f"{f' and {where.size - 1} more' if where.size > 1 else ''}."
        )
    return x


def flat_parameters(x0: Any, name: str) -> Array:
    """x0 as MINPACK's front doors take it: of any shape, in double precision unless foreign."""
    if (type(x0) is np.ndarray and x0.dtype is FLOAT and x0.ndim == 1) or is_foreign(x0):
        return parameters(x0, name)
    x = parameters(np.ravel(_numpy_parameters(x0, name)), name)
    return x.astype(float) if x.dtype.kind == "f" else x


def _numpy_parameters(x0: Any, name: str) -> np.ndarray:
    if isinstance(x0, np.ma.MaskedArray) and np.ma.is_masked(x0):
        raise ValueError(
            f"`{name}` must not be masked, got {int(np.ma.getmaskarray(x0).sum())} masked values."
        )
    try:
        x = np.atleast_1d(np.asarray(x0))
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a sequence of numbers, got {type(x0).__name__}: {error}."
        ) from error
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if x.dtype.kind in "biuf" and x.dtype.char not in LAPACK:
        return x.astype(float)
    if x.dtype.char == "G":
        return x.astype(complex)
    if x.dtype.kind == "O" and not any(value is None for value in x.flat):
        try:
            return x.astype(float)
        except (TypeError, ValueError):
            pass
    if x.dtype.kind not in "fc":
        raise TypeError(f"`{name}` must hold real or complex numbers, got dtype {x.dtype}.")
    return x.copy()


def _foreign_parameters(x0: Any, name: str) -> Array:
    xp = array_namespace(x0)
    if not xp.isdtype(x0.dtype, ("real floating", "complex floating")):
        raise TypeError(f"`{name}` must hold floating-point numbers, got dtype {x0.dtype}.")
    x = x0.detach() if hasattr(x0, "detach") else x0
    return xp.reshape(x, (1,)) if x.ndim == 0 else copied(x)


def tolerances(ftol: Any, xtol: Any, gtol: Any, precision: float) -> tuple[float, float, float]:
    """Tolerances as floats, None as 0, and none finer than what the precision can resolve."""
    plain = ftol.__class__ is xtol.__class__ is gtol.__class__ is float and precision < 1e-10
    if plain and 1e-15 < ftol < 1.0 and 1e-15 < xtol < 1.0 and 1e-15 < gtol < 1.0:
        return ftol, xtol, gtol
    values = []
    for name, tol in (("ftol", ftol), ("xtol", xtol), ("gtol", gtol)):
        if tol is None:
            tol = 0.0
        if not isinstance(tol, numbers.Real) or not 0.0 <= float(tol) < math.inf:
            raise ValueError(f"`{name}` must be a number of at least 0 or None, got {tol!r}.")
        values.append(float(tol))
    if all(v < np.finfo(float).eps for v in values):
        raise ValueError(
            "At least one of `ftol`, `xtol` and `gtol` must be at least "
            f"{np.finfo(float).eps:.2e}, got {ftol!r}, {xtol!r} and {gtol!r}."
        )
    floor = 4.0 * precision if precision > 1e-10 else 0.0
    f, x, g = (max(v, floor) if v else 0.0 for v in values)
    return f, x, g


def evaluations(max_nfev: Any, n: int) -> int:
    """The limit on residual evaluations."""
    if max_nfev is None:
        return 1000 * (n + 1)
    real = isinstance(max_nfev, numbers.Real) and not isinstance(max_nfev, bool)
    limit = float(max_nfev) if real else 0.0
    if not limit >= 1.0:
        raise ValueError(f"`max_nfev` must be None or a positive integer, got {max_nfev!r}.")
    return int(limit) if math.isfinite(limit) else 2**62


def scales(x_scale: Any, x: Array) -> Array | None:
    """x_scale as an array (n,), or None for the running column norms."""
    if x_scale is None or (isinstance(x_scale, str) and x_scale == "jac"):
        return None
    rule = "`x_scale` must be None, 'jac' or positive finite numbers"
    if isinstance(x_scale, str):
        raise ValueError(f"{rule}, got {x_scale!r}.")
    a = to_numpy(x_scale)
    if a.dtype.kind not in "biuf":
        raise ValueError(f"{rule}, got dtype {a.dtype}.")
    a = a.astype(float)
    if not (np.all(np.isfinite(a)) and np.all(a > 0)):
        raise ValueError(f"{rule}, got {a}.")
    if a.ndim and a.shape != tuple(x.shape):
        raise ValueError(f"`x_scale` must have the shape of `x0`, {tuple(x.shape)}, got {a.shape}.")
    return convert(np.broadcast_to(a, tuple(x.shape)), x)


def host_bounds(bounds: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """lb and ub as host arrays (n,) of float."""
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        pair: Any = (bounds.lb, bounds.ub)
    else:
        try:
            pair = tuple(bounds)
        except TypeError:
            raise TypeError(
                "`bounds` must be a pair (lb, ub) or scipy.optimize.Bounds, got "
                f"{type(bounds).__name__}."
            ) from None
        if len(pair) != 2:
            raise ValueError(f"`bounds` must contain 2 elements (lb, ub), got {len(pair)}.")
    ends = []
    for name, end, missing in (("lb", pair[0], -np.inf), ("ub", pair[1], np.inf)):
        try:
            a = np.asarray(missing if end is None else to_numpy(end))
            a = a if a.dtype.kind == "c" else a.astype(float)
        except (TypeError, ValueError):
            raise TypeError(f"`bounds` must hold numbers, got {end!r} for {name}.") from None
        if a.dtype.kind == "c":
            raise TypeError(f"`bounds` must hold real numbers, got {end!r} for {name}.")
        if a.ndim == 0 or (a.shape == (1,) and hasattr(bounds, "lb")):
            a = np.full(n, float(a.reshape(())))
        if a.shape != (n,):
            raise ValueError(
                f"`bounds` must have the shape of `x0`, {(n,)}, got {a.shape} for {name}."
            )
        if np.isnan(a).any():
            raise ValueError(f"`bounds` must not be NaN, got one in {name}.")
        ends.append(a)
    lb, ub = ends
    if np.any(lb > ub):
        j = int(np.argmax(lb > ub))
        raise ValueError(f"`bounds` must have lb <= ub, got {lb[j]} > {ub[j]} for parameter {j}.")
    return lb, ub


@lru_cache
def unbounded(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends of no bounds, (n,) each, read-only."""
    lb, ub = np.full(n, -np.inf), np.full(n, np.inf)
    lb.flags.writeable = ub.flags.writeable = False
    return lb, ub


def box(
    bounds: Any, fixed: Any, x: Array, names: Sequence[str] | None = None
) -> tuple[Box | None, np.ndarray, np.ndarray]:
    """Bounds as a Box in the namespace of x (None if there are none), and on the host."""
    n = x.shape[0]
    lb, ub = host_bounds(bounds, n)
    host = to_numpy(x)
    if np.any(host < lb) or np.any(host > ub):
        j = int(np.argmax((host < lb) | (host > ub)))
        raise ValueError(
            f"`x0` must lie inside `bounds`, got {host[j]} outside [{lb[j]}, {ub[j]}] for "
            f"parameter {names[j] if names else j}."
        )
    if fixed is not None:
        mask = fixed_mask(fixed, n)
        lb, ub = np.where(mask, host, lb), np.where(mask, host, ub)
    if not (np.isfinite(lb).any() or np.isfinite(ub).any()):
        return None, lb, ub
    lower, upper = convert(lb, x), convert(ub, x)
    if not is_numpy(array_namespace(x)) or lower.dtype != lb.dtype:
        # A narrower dtype may round a bound outwards; the host copies stay what was asked for.
        lb, ub = to_numpy(lower).astype(float), to_numpy(upper).astype(float)
    return Box(lower, upper), lb, ub


def fixed_mask(fixed: Any, n: int) -> np.ndarray:
    """``fixed`` as a mask (n,) of bool."""
    mask = np.asarray(fixed)
    if mask.dtype != bool or mask.shape != (n,):
        raise ValueError(
            f"`fixed` must be a mask of bool with the shape of `x0`, {(n,)}, got dtype "
            f"{mask.dtype} and shape {mask.shape}."
        )
    if mask.all():
        raise ValueError("`fixed` must leave at least one parameter free, got none.")
    return mask


def loss_function(loss: Any, f_scale: Any) -> Loss | None:
    """The robust loss, or None for the sum of squares."""
    if f_scale.__class__ is float and f_scale == 1.0 and loss.__class__ is str and loss == "linear":
        return None
    scale = np.asarray(to_numpy(f_scale) if is_array(f_scale) else f_scale)
    if scale.dtype.kind not in "biuf" or not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise ValueError(f"`f_scale` must be positive and finite, got {f_scale!r}.")
    if scale.ndim:
        raise ValueError(f"`f_scale` must be a number, got shape {scale.shape}.")
    if callable(loss):
        return Loss(UserLoss(loss), float(scale))
    if not isinstance(loss, str) or loss not in LOSSES:
        listed = ", ".join(repr(name) for name in LOSSES)
        raise ValueError(f"`loss` must be one of {listed} or a callable, got {loss!r}.")
    rho = LOSSES[loss]
    return None if rho is None else Loss(rho, float(scale))


def loss_values(loss: Loss, r: Array) -> None:
    """ValueError unless a callable loss returns shape (3, m)."""
    if isinstance(loss.rho, UserLoss):
        values = loss.rho.function((r / loss.f_scale) ** 2)
        expected, got = (3, r.shape[0]), tuple(getattr(values, "shape", ()))
        if got != expected:
            raise ValueError(
                f"`loss` must return shape (3, m) = {expected}, got "
                f"{got if got else type(values).__name__}."
            )


def iterative_options(tr_solver: Any, tr_options: Any) -> dict[str, Any]:
    """tr_options checked against what the solver named by tr_solver takes."""
    if tr_options is None:
        return {}
    if not isinstance(tr_options, dict):
        raise TypeError(f"`tr_options` must be a dict, got {type(tr_options).__name__}.")
    for name in tr_options:
        if name not in LSMR_OPTIONS:
            raise TypeError(
                f"`tr_options` takes {', '.join(LSMR_OPTIONS)} for an iterative solver, got "
                f"{name!r}: the damping of the method takes the place of any other option."
            )
    return dict(tr_options)


def difference_step(diff_step: Any, n: int) -> np.ndarray | None:
    """diff_step as relative steps (n,), or None."""
    if diff_step is None:
        return None
    try:
        a = np.asarray(diff_step, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"`diff_step` must be a number or numbers, got {diff_step!r}.") from None
    if a.ndim and a.shape != (n,):
        raise ValueError(f"`diff_step` must have the shape of `x0`, {(n,)}, got {a.shape}.")
    if not (np.all(np.isfinite(a)) and np.all(a != 0)):
        raise ValueError(f"`diff_step` must be finite and not zero, got {diff_step!r}.")
    return np.broadcast_to(np.abs(a), (n,)).copy()


def finite_residuals(r: Array, fun: str = "fun", x0: str = "x0") -> None:
    """ValueError that says which residuals are not finite at x0."""
    if all_finite(r):
        return
    host = to_numpy(r)
    bad = np.flatnonzero(~np.isfinite(host))
    shown = ", ".join(str(i) for i in bad[:5]) + (", ..." if bad.size > 5 else "")
    raise ValueError(
        f"`{fun}` must return finite residuals at `{x0}`, got {host[bad[0]]}: {bad.size} of "
        f"{r.shape[0]} are not finite (indices {shown})."
    )
