"""`curve_fit`: parameters of a function from data, on the same solver."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import scipy.optimize
from scipy.linalg.lapack import dposv
from scipy.optimize import OptimizeWarning

from . import _validate
from ._curve_data import data, start_at, whitening
from ._fit import UNBOUNDED, Fit, Options
from ._functions import ModelResidual, entries
from ._least_squares import least_squares
from ._leastsq import info, translated
from ._result import LeastSquaresResult
from ._state import LMState
from ._subproblem import NormalEquations
from ._tiny import Linearisation
from ._xp import Array, copied, to_numpy

#: Smallest squared pivot of the scaled normal matrix that `_well_conditioned` takes.
QUICK = 1e-5


class CurveFit(tuple):  # type: ignore[type-arg]
    """What `curve_fit` returns: SciPy's tuple, with the whole result as an attribute.

    Attributes
    ----------
    result : LeastSquaresResult
        Standard errors, confidence intervals, history and the report; ``print`` shows the report.
    """

    _result: LeastSquaresResult | Callable[[], LeastSquaresResult]

    def __new__(
        cls, values: Sequence[Any], result: LeastSquaresResult | Callable[[], LeastSquaresResult]
    ) -> CurveFit:
        self = super().__new__(cls, values)
        self._result = result
        return self

    @property
    def result(self) -> LeastSquaresResult:
        """The whole result; made when it is first asked for, which most small fits never are."""
        if callable(self._result):
            self._result = self._result()
        return self._result

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
        parameters open: ``curve_fit(...).result`` says which. By differences it may be that of the
        last Jacobian on the way, which differs by about 1e-6 of itself.
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
    start, n = start_at(p0, names, bounds, ydata)
    if names is not None and len(names) != n:
        names = None
    if names is None or f.__class__ is not FunctionType or f.__kwdefaults__:
        _check_number(f, n)
    _check_inside(start, bounds, n)
    xdata, ydata, sigma = data(xdata, ydata, sigma, check_finite, nan_policy)
    whiten = whitening(sigma, ydata)
    residual = ModelResidual(f, xdata, ydata, whiten)
    derivative = partial(_jacobian, jac, xdata, whiten) if callable(jac) else (jac or "2-point")
    if kwargs or type(start) is not np.ndarray:
        result = least_squares(
            residual, start, derivative, bounds, names=names, **translated(kwargs, n)
        )
        result._context.absolute_sigma = absolute_sigma
        return _complete(result, absolute_sigma, full_output)
    # As `least_squares` does, with all defaults; the result is made when it is asked for.
    fit = Fit(residual, start, bounds, None, (), None, Options(derivative), names)
    state = fit.run(defers=not full_output)
    made = partial(fit.result, state, absolute_sigma)
    pcov = None
    if fit.box is None and (state.status or 0) > 0 and not full_output:
        pcov = _well_conditioned(state, fit.problem.J, absolute_sigma)
    if pcov is None:
        return _complete(made(), absolute_sigma, full_output)
    return CurveFit((state.x.copy(), pcov), made)  # the caller may write into it


def _complete(result: LeastSquaresResult, absolute_sigma: bool, full_output: bool) -> CurveFit:
    """What `curve_fit` returns of a result."""
    if result.status <= 0:
        raise RuntimeError("Optimal parameters not found: " + result.message)
    values: tuple[Any, ...] = (copied(result.x), _pcov(result, absolute_sigma))
    if full_output:
        values = (*values, info(result), result.message, result.status)
    return CurveFit(values, result)


def _jacobian(jac: Any, xdata: Any, whiten: Any, p: Array) -> Array:
    """Rows (m, n) of the user's Jacobian, whitened."""
    J = jac(xdata, *entries(p))
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
    if bounds is UNBOUNDED:
        return
    host = to_numpy(p0)
    if host.dtype.kind not in "biuf" or host.ndim > 1:
        return  # nothing to check, or another check's business
    lb, ub = _validate.host_bounds(bounds, n)
    outside = (host < lb) | (host > ub)
    if outside.any():
        j = int(np.argmax(outside))
        raise ValueError(
            f"Initial guess is outside of provided bounds: `p0` must lie inside `bounds`, got "
            f"{np.broadcast_to(host, (n,))[j]} outside [{lb[j]}, {ub[j]}] for parameter {j}."
        )


def _pcov(result: LeastSquaresResult, absolute_sigma: bool) -> np.ndarray:
    """Covariance for `curve_fit`, infinite throughout where the data leave a direction open.

    Parameters at a bound count as free, as in SciPy, unless the data do not determine them there.
    """
    context = result._context
    if context.loss is None and not context.held.any():
        quick = _well_conditioned(result.state, result.jac, absolute_sigma)
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
            stacklevel=4,
        )
        return np.full_like(cov, np.inf)
    return cov


def _well_conditioned(state: LMState, J: Any, absolute_sigma: bool) -> np.ndarray | None:
    """Covariance from the normal matrix, where its condition costs no digit that is printed.

    Relative errors are about ``eps / pivot``; a fifth of the time of `uncertainty`, which takes
    more of it than the rest of a small fit.
    """
    sub = state.point.subproblem
    if type(J) is not np.ndarray or J.shape[0] <= J.shape[1]:
        return None
    if type(sub) is Linearisation:
        inverse, pivot = sub.inverse()
    elif type(sub) is NormalEquations:
        L, inverse, info = dposv(sub.gram, np.eye(J.shape[1]), lower=1)
        pivot = 0.0 if info else ((L.diagonal() / sub.norms) ** 2).min()
    else:
        return None
    if not pivot >= QUICK:
        return None
    if not absolute_sigma:
        inverse *= 2.0 * state.cost / (J.shape[0] - J.shape[1])
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
