"""`curve_fit` and `leastsq`: SciPy's other two front doors on the same solver."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import scipy.optimize
from scipy.linalg import qr, solve_triangular
from scipy.linalg.lapack import dposv
from scipy.optimize import OptimizeWarning

from . import _validate
from ._fit import UNBOUNDED
from ._least_squares import least_squares
from ._result import LeastSquaresResult
from ._subproblem import NormalEquations
from ._xp import Array, all_finite, convert, is_array, is_foreign, to_numpy

#: Smallest squared pivot of the scaled normal matrix that `_well_conditioned` takes.
QUICK = 1e-5


class CurveFit(tuple):  # type: ignore[type-arg]
    """What `curve_fit` returns: SciPy's tuple, with the whole result as an attribute.

    Attributes
    ----------
    result : LeastSquaresResult
        Standard errors, confidence intervals, history and the report; ``print`` shows the report.
    """

    result: LeastSquaresResult

    def __new__(cls, values: Sequence[Any], result: LeastSquaresResult) -> CurveFit:
        self = super().__new__(cls, values)
        self.result = result
        return self

    def __str__(self) -> str:
        return str(self.result)

    def __reduce__(self) -> tuple[Any, ...]:
        return (CurveFit, (tuple(self), self.result))


def curve_fit(
    f: Callable[..., Any],
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Any = UNBOUNDED,
    method: str | None = None,
    jac: Any = None,
    *,
    full_output: bool = False,
    nan_policy: str | None = None,
    **kwargs: Any,
) -> CurveFit:
    """Fit the parameters of a function to data, by least squares.

    SciPy's signature and return. One method serves every call, with or without bounds.

    Parameters
    ----------
    f : callable
        The model, ``f(xdata, *parameters)``, returning an array of the shape of ``ydata``. Its
        parameters' names appear in the report.
    xdata : array_like or object
        Where the data were measured; handed to ``f`` as it is, lists as arrays.
    ydata : array_like, shape (m,)
        The data.
    p0 : array_like, shape (n,), optional
        Initial guess. By default all ones, or a point inside the bounds, n being the number of
        parameters of ``f``.
    sigma : None, number, or array_like, shape (m,) or (m, m), optional
        Standard deviations of the data, or their covariance matrix.
    absolute_sigma : bool, optional
        Whether ``sigma`` is absolute; otherwise ``pcov`` is scaled to a reduced chi-square of 1.
    check_finite : bool, optional
        Whether to refuse NaN and infinity in the data. The default is True, and False if
        ``nan_policy`` is given.
    bounds : pair of array_like or Bounds, optional
        Lower and upper bounds on the parameters.
    method : {None, 'lm', 'trf', 'dogbox'}, optional
        None and 'lm' are this package's; the others hand the call to SciPy unchanged.
    jac : callable or str, optional
        ``jac(xdata, *parameters)`` returning the Jacobian, shape (m, n), or one of the difference
        schemes of `least_squares`.
    full_output : bool, optional
        Whether to return ``infodict``, ``mesg`` and ``ier`` as well.
    nan_policy : {None, 'raise', 'omit'}, optional
        What to do with NaN in the data.
    **kwargs
        Further arguments of `least_squares`; ``maxfev``, ``epsfcn``, ``diag`` and ``factor`` of
        `leastsq` are understood.

    Returns
    -------
    popt : array, shape (n,)
        Parameters.
    pcov : array, shape (n, n)
        Their covariance; all infinite, with a warning, where the data leave a direction of the
        parameters open: ``curve_fit(...).result`` says which.
    infodict : dict
        ``nfev``, ``fvec``, and ``fjac``, ``ipvt`` and ``qtf``, a pivoted QR factorisation of the
        Jacobian, with ``full_output``.
    mesg : str
        Why it stopped, with ``full_output``.
    ier : int
        The status, with ``full_output``.

    Raises
    ------
    ValueError
        If an argument breaks the rule that the message names.
    RuntimeError
        If the fit did not converge.

    Warns
    -----
    OptimizeWarning
        If the covariance could not be estimated.

    Examples
    --------
    >>> import numpy as np
    >>> from lmsolve import curve_fit
    >>> def decay(t, amplitude, rate):
    ...     return amplitude * np.exp(-rate * t)
    >>> t = np.linspace(0, 3, 20)
    >>> popt, pcov = curve_fit(decay, t, decay(t, 2.5, 1.3))
    >>> np.round(popt, 6).tolist()
    [2.5, 1.3]
    """
    if not callable(f):
        raise TypeError(f"`f` must be callable, got {type(f).__name__}.")
    if method in ("trf", "dogbox"):
        return _scipy_curve_fit(
            f, xdata, ydata, p0, sigma, absolute_sigma, check_finite, bounds, method, jac,
            full_output, nan_policy, kwargs,
        )  # fmt: skip
    _validate.one_of(method, "method", (None, "lm", "trf", "dogbox"))
    if "args" in kwargs:
        raise ValueError(
            "`args` is not supported by curve_fit: bind them by functools.partial, got "
            f"`args={kwargs['args']!r}`."
        )
    names = _parameter_names(f)
    start, n = _start(p0, names, bounds, ydata)
    if names is not None and len(names) != n:
        names = None
    start = _validate.parameters(start, "p0")
    if names is None or f.__class__ is not FunctionType or f.__kwdefaults__:
        _check_number(f, n)
    _check_inside(start, bounds, n)
    xdata, ydata, sigma = _data(xdata, ydata, sigma, check_finite, nan_policy)
    whiten = _whitening(sigma, ydata)
    residual = _Residual(f, xdata, ydata, whiten)
    derivative = partial(_jacobian, jac, xdata, whiten) if callable(jac) else (jac or "2-point")
    result = least_squares(
        residual, start, derivative, bounds, names=names, **_translated(kwargs, n)
    )
    if result["status"] <= 0:
        raise RuntimeError("Optimal parameters not found: " + result.message)
    result._context.absolute_sigma = absolute_sigma
    pcov = _pcov(result, absolute_sigma)
    popt = result["x"]
    values: tuple[Any, ...] = (popt, pcov)
    if full_output:
        values = (popt, pcov, _info(result), result.message, result.status)
    return CurveFit(values, result)


class _Residual:
    """``whiten(f(xdata, *parameters) - ydata)``; can be pickled where f can."""

    words = ("f", "p0")  # the arguments that errors are about

    def __init__(self, f: Any, xdata: Any, ydata: Array, whiten: Any) -> None:
        self.f, self.xdata, self.ydata, self.whiten = f, xdata, ydata, whiten

    def __call__(self, p: Array) -> Array:
        """Residuals (m,)."""
        values = self.f(self.xdata, *p)
        try:
            r = values - self.ydata
        except (TypeError, ValueError) as error:
            if values is None:
                raise TypeError(
                    "`f` must return an array of the shape of `ydata`, got None."
                ) from None
            if isinstance(error, TypeError):
                raise
            raise ValueError(
                f"`f` must return an array of the shape of `ydata`, {tuple(self.ydata.shape)}, "
                f"got {np.shape(values)}."
            ) from error
        return r if self.whiten is None else self.whiten(r)


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


def _jacobian(jac: Any, xdata: Any, whiten: Any, p: Array) -> Array:
    """Rows (m, n) of the user's Jacobian, whitened."""
    J = jac(xdata, *p)
    return J if whiten is None else whiten(J if hasattr(J, "ndim") else np.asarray(J))


def _parameter_names(f: Any) -> list[str] | None:
    """Names of the model's parameters, or None where they cannot be told."""
    if type(f) is FunctionType and not hasattr(f, "__wrapped__"):  # inspect takes 40 us to say it
        code = f.__code__
        if code.co_flags & inspect.CO_VARARGS:
            return None
        return list(code.co_varnames[1 : code.co_argcount])
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in kinds][1:]


def _check_number(f: Any, n: int) -> None:
    """TypeError unless f can be called with the data and n parameters."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, *range(n))
    except TypeError as error:
        raise TypeError(
            f"`p0` must have one value for each parameter of `f`, got {n} for {signature}: {error}."
        ) from error


def _check_inside(p0: Any, bounds: Any, n: int) -> None:
    """ValueError, in the words of this front door, unless p0 lies inside the bounds."""
    host = to_numpy(p0)
    if bounds is UNBOUNDED or host.dtype.kind not in "biuf" or host.ndim > 1:
        return  # nothing to check, or another check's business
    lb, ub = _validate.host_bounds(bounds, n)
    outside = (host < lb) | (host > ub)
    if outside.any():
        j = int(np.argmax(outside))
        raise ValueError(
            f"Initial guess is outside of provided bounds: `p0` must lie inside `bounds`, got "
            f"{np.broadcast_to(host, (n,))[j]} outside [{lb[j]}, {ub[j]}] for parameter {j}."
        )


def _start(p0: Any, names: list[str] | None, bounds: Any, ydata: Any) -> tuple[Any, int]:
    """p0 and its length."""
    if p0 is not None:
        p0 = p0 if is_array(p0) else np.atleast_1d(p0)
        return p0, math.prod(p0.shape)
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


def _data(
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
    if isinstance(xdata, list | tuple | np.ndarray):
        xdata = _floats(xdata, "xdata", check)
    elif hasattr(xdata, "to_numpy") and getattr(xdata.dtype, "kind", "") in tuple("fiu"):
        # A column of a table: in single precision its model's differences would be too.
        _floats(xdata, "xdata", check)
        xdata = xdata.astype(float)
    if y.size == 0:
        raise ValueError(f"`ydata` must not be empty, got shape {y.shape}.")
    if not check and nan_policy is not None:
        return _without_nan(xdata, y, sigma, nan_policy)
    return xdata, y, sigma


def _floats(a: Any, name: str, check: bool) -> np.ndarray:
    """``a`` as float64, complex kept, with NaN and infinity refused."""
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


def _whitening(sigma: Any, ydata: Array) -> Any:
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


def _translated(kwargs: dict[str, Any], n: int) -> dict[str, Any]:
    """Keyword arguments of `leastsq` in the words of `least_squares`."""
    out = dict(kwargs)
    known = inspect.signature(least_squares).parameters if kwargs else ()
    for name in set(kwargs) - set(known) - {"maxfev", "epsfcn", "diag", "factor"}:
        raise TypeError(f"`{name}` is no argument of curve_fit or least_squares, got {name}.")
    if "maxfev" in out:
        limit = out.pop("maxfev")
        out.setdefault("max_nfev", limit or None)
    if out.get("epsfcn") is not None:
        out.setdefault("diff_step", float(np.sqrt(out["epsfcn"])))
    out.pop("epsfcn", None)
    if out.get("diag") is not None:
        out.setdefault("x_scale", 1.0 / np.asarray(out["diag"], dtype=float))
    out.pop("diag", None)
    out.pop("factor", None)  # the size of the first step: found from the first solve here
    return out


def _info(result: LeastSquaresResult) -> dict[str, Any]:
    """infodict of MINPACK's front doors: counts, residuals and a pivoted QR of the Jacobian."""
    info = {"nfev": result.nfev, "fvec": result.fun}
    J = to_numpy(result.jac)
    Q, R, info["ipvt"] = qr(J, mode="economic", pivoting=True)
    info["fjac"] = np.zeros((J.shape[1], J.shape[0]), dtype=R.dtype)
    info["fjac"][:, : R.shape[0]] = R.T
    info["qtf"] = Q.conj().T @ to_numpy(result.fun)
    return info


def _pcov(result: LeastSquaresResult, absolute_sigma: bool) -> np.ndarray:
    """Covariance for `curve_fit`, infinite throughout where the data leave a direction open.

    Parameters at a bound count as free, as in SciPy, unless the data do not determine them there.
    """
    context = result._context
    if context.loss is None and not context.held.any():
        quick = _well_conditioned(result, absolute_sigma)
        if quick is not None:
            return quick
    held, context.held = context.held, context.lb == context.ub
    try:
        cov = result.uncertainty(absolute_sigma=absolute_sigma).covariance
    finally:
        context.held = held
    if context.held.any() and not np.isfinite(cov).all():
        cov = result.uncertainty(absolute_sigma=absolute_sigma).covariance
    if not np.isfinite(cov).all():
        warnings.warn(
            "Covariance of the parameters could not be estimated",
            category=OptimizeWarning,
            stacklevel=3,
        )
        return np.full_like(cov, np.inf)
    return cov


def _well_conditioned(result: LeastSquaresResult, absolute_sigma: bool) -> np.ndarray | None:
    """Covariance from the normal matrix, where its condition costs no digit that is printed.

    Relative errors are about ``eps / pivot``; a fifth of the time of `uncertainty`, which takes
    more of it than the rest of a small fit.
    """
    sub, J = result["state"].point.subproblem, result["jac"]
    if type(J) is not np.ndarray or type(sub) is not NormalEquations or J.shape[0] <= J.shape[1]:
        return None
    L, inverse, info = dposv(sub.gram, np.eye(J.shape[1]), lower=1)
    if info != 0 or ((L.diagonal() / sub.norms) ** 2).min() < QUICK:
        return None
    if not absolute_sigma:
        inverse *= 2.0 * result["cost"] / (J.shape[0] - J.shape[1])
    return np.asarray(inverse)


def _scipy_curve_fit(
    f: Any,
    xdata: Any,
    ydata: Any,
    p0: Any,
    sigma: Any,
    absolute_sigma: bool,
    check_finite: bool | None,
    bounds: Any,
    method: str,
    jac: Any,
    full_output: bool,
    nan_policy: str | None,
    kwargs: dict[str, Any],
) -> CurveFit:
    """SciPy's own `curve_fit` for the methods that are SciPy's."""
    values = scipy.optimize.curve_fit(
        f, xdata, ydata, p0, sigma, absolute_sigma, check_finite, bounds, method, jac,
        full_output=full_output, nan_policy=nan_policy, **kwargs,
    )  # fmt: skip
    return CurveFit(values, LeastSquaresResult(x=values[0]))


def leastsq(
    func: Callable[..., Any],
    x0: Any,
    args: Any = (),
    Dfun: Callable[..., Any] | None = None,
    full_output: bool = False,
    col_deriv: bool = False,
    ftol: float = 1.49012e-8,
    xtol: float = 1.49012e-8,
    gtol: float = 0.0,
    maxfev: int = 0,
    epsfcn: float | None = None,
    factor: float = 100,
    diag: Any = None,
) -> tuple[Any, ...]:
    """Minimise a sum of squares with the calling sequence of ``scipy.optimize.leastsq``.

    Parameters
    ----------
    func : callable
        ``func(x, *args)`` returns the residuals, shape (m,).
    x0 : array_like, shape (n,)
        Initial guess.
    args : tuple, optional
        Further arguments of ``func`` and ``Dfun``.
    Dfun : callable, optional
        ``Dfun(x, *args)`` returns the Jacobian, shape (m, n), or (n, m) with ``col_deriv``.
    full_output : bool, optional
        Whether to return all that is below.
    col_deriv : bool, optional
        Whether ``Dfun`` returns derivatives down the columns.
    ftol, xtol, gtol : float, optional
        Tolerances; see `least_squares`.
    maxfev : int, optional
        Residual evaluations at most, 0 for the default of `least_squares`.
    epsfcn : float, optional
        Square of the relative step of the differences.
    factor : float, optional
        Accepted, without effect: the size of the first step is found from the first solve.
    diag : array_like, shape (n,), optional
        Reciprocals of the characteristic sizes of the parameters.

    Returns
    -------
    x : ndarray, shape (n,)
        Solution.
    cov_x : ndarray, shape (n, n), or None
        Inverse of J'J, with ``full_output``; None if it is singular.
    infodict : dict
        ``nfev``, ``fvec``, and ``fjac``, ``ipvt`` and ``qtf``, a pivoted QR factorisation of the
        Jacobian, with ``full_output``.
    mesg : str
        Why it stopped, with ``full_output``.
    ier : int
        1 to 4 for success, 5 if ``maxfev`` was reached.

    Raises
    ------
    ValueError
        If an argument breaks the rule that the message names.
    """
    jac: Any = "2-point"
    if Dfun is not None:
        derivative = Dfun
        jac = (lambda x, *a: np.asarray(derivative(x, *a)).T) if col_deriv else Dfun
    result = least_squares(
        func,
        x0,
        jac,
        ftol=ftol,
        xtol=xtol,
        gtol=gtol,
        args=args if isinstance(args, tuple) else (args,),
        **_translated({"maxfev": maxfev, "epsfcn": epsfcn, "diag": diag}, 0),
    )
    # MINPACK's info: 1 and 2 for ftol and xtol, 3 for both, 4 for gtol, 5 for too many calls.
    ier = {1: 4, 2: 1, 3: 2, 4: 3}.get(result.status, 5)
    if not full_output:
        return result.x, ier
    cov = result.covariance(absolute_sigma=True)
    cov_x = cov if np.isfinite(cov).all() else None
    return result.x, cov_x, _info(result), result.message, ier
