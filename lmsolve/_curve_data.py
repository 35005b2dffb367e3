"""What `curve_fit` is given: data, start and standard deviations, checked and as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from . import _validate
from ._xp import FLOAT, Array, all_finite, convert, is_foreign, to_numpy


class _Weights:
    """Division of residuals or rows by standard deviations (m,)."""

    def __init__(self, sigma: Array) -> None:
        self.weight = 1.0 / sigma

    def __call__(self, r: Array) -> Array:
        """Whitened residuals (m,) or rows (m, n)."""
        if r.ndim == 2 and self.weight.ndim == 1:
            return self.weight[:, None] * r
        return self.weight * r


class _Triangle:
    """Multiplication by L^-1, where L L' is the covariance (m, m) of the data."""

    def __init__(self, L: np.ndarray) -> None:
        self.L = L

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """Whitened residuals (m,) or rows (m, n)."""
        return np.asarray(solve_triangular(self.L, r, lower=True))


def start_at(p0: Any, names: list[str] | None, bounds: Any, ydata: Any) -> tuple[Any, int]:
    """p0 (n,), checked or found, and n."""
    if p0 is not None:
        p0 = _validate.flat_parameters(p0, "p0")
        return p0, p0.shape[0]
    if not names:
        raise ValueError(
            "`p0` must be given: Unable to determine number of fit parameters from `f`, got "
            f"`p0={p0}`."
        )
    n = len(names)
    lb, ub = _validate.host_bounds(bounds, n)
    start = _feasible(lb, ub)
    if is_foreign(ydata):
        start = convert(start, ydata)
    return start, n


def _feasible(lb: np.ndarray, ub: np.ndarray) -> np.ndarray:
    """A point inside the bounds: 1 where nothing bounds, else one off the bound, or the middle."""
    low, high = np.isfinite(lb), np.isfinite(ub)
    with np.errstate(invalid="ignore"):
        middle = 0.5 * (lb + ub)
    return np.where(
        low & high, middle, np.where(low, lb + 1.0, np.where(high, ub - 1.0, np.ones_like(lb)))
    )


def data(
    xdata: Any, ydata: Any, sigma: Any, check_finite: bool | None, nan_policy: str | None
) -> tuple[Any, Any, Any]:
    """Data as arrays, checked, with NaN left out where asked for."""
    if nan_policy == "propagate":
        raise ValueError("`nan_policy='propagate'` is not supported by this function.")
    if nan_policy not in (None, "raise", "omit"):
        raise ValueError(
            f"nan_policy must be one of {{None, 'raise', 'omit'}}, got `nan_policy={nan_policy!r}`."
        )
    check = nan_policy is None if check_finite is None else check_finite
    if is_foreign(ydata):
        _finite(ydata, "ydata", check)
        return xdata, ydata, sigma
    y = _floats(ydata, "ydata", check)
    if type(xdata) is np.ndarray or isinstance(xdata, list | tuple | np.ndarray):
        xdata = _floats(xdata, "xdata", check)
    elif hasattr(xdata, "to_numpy") and getattr(xdata.dtype, "kind", "") in tuple("fiu"):
        # A column of a table: in single precision its model's differences would be too.
        _floats(xdata, "xdata", check)
        xdata = xdata.astype(float)
    shape = y.shape
    if not check and nan_policy is not None:
        xdata, y, sigma = _without_nan(xdata, y, sigma, nan_policy)
    if y.size == 0:
        nan = " of NaN" if shape != y.shape else ""
        raise ValueError(f"`ydata` must not be empty, got shape {shape}{nan}.")
    return xdata, y, sigma


def _floats(a: Any, name: str, check: bool) -> np.ndarray:
    """``a`` as float64, complex kept, with NaN and infinity refused."""
    if type(a) is np.ndarray and a.dtype is FLOAT:
        _finite(a, name, check)
        return a
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise ValueError(f"`{name}` must not be masked, got {np.ma.count_masked(a)} masked values.")
    try:
        b = np.asarray(a)
        b = b if b.dtype.kind == "c" else b.astype(float, copy=False)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"`{name}` must hold numbers, got {type(a).__name__}: {error}."
        ) from error
    _finite(b, name, check)
    return b


def _finite(a: Array, name: str, check: bool) -> None:
    if check and not all_finite(a):
        bad = int(np.sum(~np.isfinite(to_numpy(a))))
        raise ValueError(f"`{name}` must not contain infs or NaNs, got {bad}.")


def _without_nan(xdata: Any, y: np.ndarray, sigma: Any, policy: str) -> tuple[Any, Any, Any]:
    x_nan = isinstance(xdata, np.ndarray) and bool(np.isnan(xdata).any())
    y_nan = bool(np.isnan(y).any())
    if not (x_nan or y_nan):
        return xdata, y, sigma
    if policy == "raise":
        raise ValueError(f"The input contains nan values: `{'xdata' if x_nan else 'ydata'}`.")
    bad = np.isnan(y)
    if isinstance(xdata, np.ndarray):
        bad = bad | np.isnan(xdata).any(axis=tuple(range(xdata.ndim - 1)))
        xdata = xdata[..., ~bad]
    if sigma is not None:
        sigma = np.asarray(sigma)
        if sigma.ndim == 1 and sigma.size > 1:
            sigma = sigma[~bad]
        elif sigma.ndim == 2:
            sigma = sigma[~bad][:, ~bad]
    return xdata, y[~bad], sigma


def whitening(sigma: Any, ydata: Array) -> Any:
    """What turns residuals into ones of unit variance, or None."""
    if sigma is None:
        return None
    if is_foreign(sigma):
        return _Weights(sigma)
    sigma = np.asarray(sigma)
    if sigma.dtype.kind not in "biuf":
        raise TypeError(f"`sigma` must hold real numbers, got dtype {sigma.dtype}.")
    size = int(np.prod(ydata.shape))
    if sigma.size == 1 or sigma.shape == (size,):
        if not (sigma > 0).all():
            worst = sigma.ravel()[np.argmin(np.nan_to_num(sigma.ravel(), nan=-np.inf))]
            raise ValueError(f"`sigma` must be positive, got {worst}.")
        return _Weights(convert(np.squeeze(sigma) if sigma.size == 1 else sigma, ydata))
    if sigma.shape == (size, size):
        try:
            return _Triangle(np.linalg.cholesky(sigma))
        except np.linalg.LinAlgError as error:
            lowest = np.linalg.eigvalsh(sigma)[0] if np.isfinite(sigma).all() else np.nan
            raise ValueError(
                f"`sigma` must be positive definite, got a lowest eigenvalue of {lowest:.3g}."
            ) from error
    raise ValueError(
        f"`sigma` has incorrect shape: expected a number, {(size,)} or {(size, size)}, got "
        f"{sigma.shape}."
    )
