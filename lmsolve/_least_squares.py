"""`least_squares`: the front door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.optimize

from . import _validate
from ._fit import UNBOUNDED, Fit, Options
from ._result import Context, LeastSquaresResult
from ._state import LMState
from ._sums import LOCAL
from ._xp import is_cupynumeric


def least_squares(
    fun: Any,
    x0: Any,
    jac: Any = "2-point",
    bounds: Any = UNBOUNDED,
    method: str = "lm",
    ftol: float | None = 1e-8,
    xtol: float | None = 1e-8,
    gtol: float | None = 1e-8,
    x_scale: Any = None,
    loss: Any = "linear",
    f_scale: float = 1.0,
    diff_step: Any = None,
    tr_solver: str | None = None,
    tr_options: dict[str, Any] | None = None,
    jac_sparsity: Any = None,
    max_nfev: int | None = None,
    verbose: int = 0,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    callback: Callable[..., Any] | None = None,
    workers: Any = None,
    *,
    fixed: Any = None,
    names: Sequence[str] | None = None,
    polish: bool = True,
    resume: LMState | None = None,
    backend: str | None = None,
) -> LeastSquaresResult:
    """Minimise a sum of squares, or of robust losses, by Levenberg-Marquardt.

    Finds a local minimum of ``F(x) = 0.5 * sum(rho(f_i(x)**2))`` subject to ``lb <= x <= ub``. The
    signature is SciPy's; one method serves bounds, robust losses, m < n, sparse Jacobians and
    operators. Parameters after ``workers`` are keyword-only additions.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args, **kwargs)`` returns the residuals, array, shape (m,), of the library of
        ``x0``; or, with a ``jac`` that does so too, an iterator over blocks of them. Complex
        residuals are split into real and imaginary parts. An object with methods ``residual``,
        ``cost`` and ``linearize`` is taken as the whole problem.
    x0 : array_like, shape (n,), or number
        Initial guess, real or complex. An array of another library (PyTorch, cuPyNumeric) moves
        the whole fit there; its dtype is kept.
    jac : {'2-point', '3-point', 'cs', True} or callable, optional
        Differences of ``fun`` (relative to each parameter's own size), or ``jac(x, *args,
        **kwargs)`` returning the Jacobian: array (m, n), sparse matrix, LinearOperator, or an
        iterator over pairs (residuals (k,), rows (k, n)) that is summed and never held. True means
        that ``fun`` returns the pair (residuals, Jacobian).
    bounds : pair of array_like or Bounds, optional
        Lower and upper bounds, each a number or of shape (n,). Nothing is ever evaluated outside
        them. Equal bounds fix a parameter.
    method : {'lm', 'trf', 'dogbox'}, optional
        'lm' is this package's; the other two hand a NumPy problem to SciPy unchanged.
    ftol : float or None, optional
        Stop when the actual and the predicted relative decrease of the cost are at most this.
    xtol : float or None, optional
        Stop when the scaled step is at most this share of the scaled parameters.
    gtol : float or None, optional
        Stop when the largest cosine between the residuals and a column of the Jacobian is at most
        this, or the residuals vanish.
    x_scale : array_like, 'jac' or None, optional
        Characteristic sizes of the parameters. None and 'jac' take them from the column norms of
        the Jacobian, as a slowly fading running maximum.
    loss : {'linear', 'huber', 'soft_l1', 'cauchy', 'arctan'} or callable, optional
        rho(z); a callable returns rho, rho' and rho'' at z (m,) as an array (3, m).
    f_scale : float, optional
        Residuals beyond this are outliers: ``rho`` becomes ``f_scale**2 * rho(f**2 / f_scale**2)``.
    diff_step : float or array_like, optional
        Relative steps of the differences.
    tr_solver : {None, 'exact', 'lsmr'}, optional
        'exact' factors (dense Jacobians only), 'lsmr' iterates; None chooses by the Jacobian.
    tr_options : dict, optional
        ``atol``, ``btol`` and ``maxiter`` of the iterative solver; ``regularize`` is accepted and
        has no effect, since each step is damped.
    jac_sparsity : array_like or sparse matrix, shape (m, n), optional
        Structure of the Jacobian: independent columns are differenced together.
    max_nfev : int, optional
        Residual evaluations at most, differences not counted. The default is ``1000 * (n + 1)``.
    verbose : {0, 1, 2}, optional
        0 is silent, 1 prints why it ended, 2 prints each trial.
    args, kwargs : tuple and dict, optional
        Further arguments of ``fun`` and ``jac``.
    callback : callable, optional
        Called after each accepted step as ``callback(x)``, or as ``callback(intermediate_result)``
        if that is its parameter's name, with ``x``, ``fun``, ``cost``, ``nit``, ``nfev`` and
        ``state``. The run ends if it raises StopIteration or returns True.
    workers : int or map-like, optional
        Processes that evaluate the differences, or a map to evaluate them with.
    fixed : array_like of bool, shape (n,), optional
        Parameters to hold at their value in ``x0``.
    names : sequence of str, optional
        Names of the parameters, for the report.
    polish : bool, optional
        Whether a converged fit is polished by undamped steps to full accuracy.
    resume : LMState, optional
        State of an earlier run of the same problem to go on from.
    backend : {None, 'auto', 'numpy', 'cupynumeric'}, optional
        Where the sums over rows are taken: by Legate's tasks ('cupynumeric'), by NumPy, or by
        Legate where that pays ('auto'): from ``m n^2 = 2e8`` on, for arrays in Legate's memory
        also from a million residuals on. None is 'auto' for a cuPyNumeric ``x0``, else 'numpy'.

    Returns
    -------
    LeastSquaresResult
        SciPy's fields and ``nit``, ``history``, ``state``, with methods for standard errors,
        covariance, confidence intervals and a report.

    Raises
    ------
    ValueError
        If a value breaks the rule that its message names, or residuals at ``x0`` are not finite.
    TypeError
        If an argument is of the wrong kind.

    Notes
    -----
    A trial point whose cost is not finite is a rejected step. Exceptions of ``fun`` and ``jac``
    pass through. The step is More's trust-region form of Levenberg-Marquardt [1]_ with a polish by
    Anderson-accelerated Gauss-Newton steps; see ``lmsolve._lm`` for the convergence tests.

    References
    ----------
    .. [1] J. J. More, "The Levenberg-Marquardt algorithm: implementation and theory", Lecture Notes
       in Mathematics 630 (1978), 105-116.

    Examples
    --------
    >>> import numpy as np
    >>> from lmsolve import least_squares
    >>> t = np.linspace(0, 3, 20)
    >>> y = 2.5 * np.exp(-1.3 * t)
    >>> result = least_squares(lambda x: x[0] * np.exp(-x[1] * t) - y, [1.0, 1.0])
    >>> np.round(result.x, 6).tolist()
    [2.5, 1.3]
    """
    _validate.one_of(method, "method", _validate.METHODS)
    if verbose not in (0, 1, 2):
        raise ValueError(f"`verbose` must be 0, 1 or 2, got {verbose!r}.")
    if method != "lm":
        return _scipy(
            fun, x0, jac, bounds, method, ftol, xtol, gtol, x_scale, loss, f_scale, diff_step,
            tr_solver, tr_options, jac_sparsity, max_nfev, verbose, args, kwargs, callback, workers,
        )  # fmt: skip
    _validate.one_of(backend, "backend", _validate.BACKENDS)
    placement: Any = None
    if backend is not None or is_cupynumeric(x0):
        from .legate._arrays import place

        placement = place(fun, x0, jac, callback, backend)
        fun, x0, jac, callback = placement.fun, placement.x0, placement.jac, placement.callback
    x = _validate.parameters(x0)
    options = Options(
        jac=jac,
        loss=loss,
        f_scale=f_scale,
        diff_step=diff_step,
        tr_solver=tr_solver,
        tr_options=tr_options,
        jac_sparsity=jac_sparsity,
        workers=workers,
        sums=LOCAL if placement is None else placement.sums,
    )
    fit = Fit(fun, x, bounds, fixed, args, kwargs, options, names)
    state = fit.run(
        tolerances=(ftol, xtol, gtol),
        x_scale=x_scale,
        max_nfev=max_nfev,
        polish=polish,
        verbose=verbose,
        callback=callback,
        resume=resume,
    )
    result = fit.result(state)
    return result if placement is None else placement.finish(result)


def _scipy(*arguments: Any) -> LeastSquaresResult:
    """SciPy's own method, unchanged, with the result's methods added."""
    *others, workers = arguments
    result = scipy.optimize.least_squares(*others, workers=workers)
    wrapped = LeastSquaresResult(result)
    x = np.asarray(result.x)
    n = x.shape[0]
    try:
        lb, ub = _validate.host_bounds(arguments[3], n)
    except (TypeError, ValueError):
        lb, ub = np.full(n, -np.inf), np.full(n, np.inf)
    context = Context(
        m=np.asarray(result.fun).shape[0],
        loss=None,
        xp=np,
        held=np.asarray(result.active_mask != 0),
        lb=lb,
        ub=ub,
        gram=None,
        refit=None,
    )
    object.__setattr__(wrapped, "_context", context)
    return wrapped
