"""Many small fits at once: `curve_fit_many` and `least_squares_many`.

B independent problems of one shape, m residuals and n parameters each, advance side by side in
the arrays of any namespace. These are the front doors; `_batched_inputs` checks what they are
given, `_batched_run` has it run by the loop in `_batched_lm`, `_batched_model` is all that calls
the user's functions, and `_batched_result` is what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _batched_inputs as inputs
from ._batched_model import Function, Model, supplied
from ._batched_result import ManyFitsResult, as_result
from ._batched_run import quiet, run
from ._xp import Array, array_namespace, is_array

__all__ = ["ManyFitsResult", "curve_fit_many", "least_squares_many"]


def curve_fit_many(
    f: Callable[..., Array],
    xdata: Array | tuple[Array, ...],
    ydata: Array,
    p0: Array | Sequence[float],
    *,
    sigma: Array | None = None,
    absolute_sigma: bool = False,
    mask: Array | None = None,
    bounds: tuple[Any, Any] = (-np.inf, np.inf),
    loss: str = "linear",
    f_scale: float = 1.0,
    jac: Callable[..., Any] | str | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    gtol: float | None = None,
    max_nit: int = 200,
    memory: int | None = None,
    workers: int = 1,
    progress: bool = False,
) -> ManyFitsResult:
    """Fit one model to many data sets of the same length.

    Minimises ``0.5 * sum(f_scale**2 * rho(((f(x, *p) - y) / (sigma * f_scale))**2))`` over p
    for every row y of `ydata`, all of them side by side.

    Parameters
    ----------
    f : callable
        Model ``f(x, *params)``. Each parameter arrives with shape (b, 1), one row for each of
        the b fits that are worked on, so that ``a * exp(-k * x)`` broadcasts to (b, m).
    xdata : array, shape (m,) or (B, m), or tuple of such arrays
        Independent variable, shared by the fits or one row for each; a tuple of several.
    ydata : array, shape (B, m)
        Data. Its array library is the one all else is done in.
    p0 : array, shape (n,) or (B, n)
        Starting points. An array gives the dtype of the computation; a list takes that of `ydata`.
    sigma : array, shape (m,) or (B, m), optional
        Standard deviations of the data.
    absolute_sigma : bool, default False
        Whether `sigma` is absolute, and the covariance is not scaled by ``2 cost / dof``.
    mask : array of bool, shape (m,) or (B, m), optional
        True for data to use. Data, `sigma` and model may be NaN where it is False.
    bounds : tuple of (lower, upper)
        Each a number or an array of shape (n,) or (B, n).
    loss : {'linear', 'huber', 'soft_l1', 'cauchy', 'arctan'}
        The loss rho, as in `scipy.optimize.least_squares`.
    f_scale : float, default 1.0
        Residual at which the loss turns from square to robust.
    jac : callable, {'2-point', '3-point'} or None
        ``jac(x, *params)`` returns n columns that broadcast to (b, m), or an array (b, m, n). By
        default forward-mode differentiation for torch; for others forward differences, which
        give way to central ones near the solution, so that results agree with those of exact
        derivatives. The strings ask for forward or central differences throughout.
    ftol : float, optional
        A fit ends when the predicted reduction and the change of the cost are both at most
        ``ftol * cost``, and what the parameters have left to go, by the rate of the last two
        steps, is small to match. 4 eps by default, with eps of the dtype.
    xtol : float, optional
        A fit ends when ``|p_j| <= xtol * (|x_j| + max(|r|, |y| / 100) / s_j)`` for every j of its
        step p, s_j being the largest norm of column j of J so far, or when the next step would
        meet that by the rate of the last two. Default ``eps**(2/3)``: 3.7e-11 in float64.
    gtol : float, optional
        A fit ends when the cosine between the residuals and each column of J is at most `gtol`.
        Default ``eps**(2/3)``.
    max_nit : int, default 200
        Most trials for a fit.
    memory : int, optional
        Bytes for the working set. By default one that stays in the processor's cache (8 MiB), or
        1 GiB on accelerators.
    workers : int, default 1
        Threads, each with a working set of its own. NumPy only; `f` must be safe to call from
        several threads.
    progress : bool, default False
        Show a progress bar (needs tqdm).

    Returns
    -------
    ManyFitsResult
        Parameters, costs, statuses and counts with one row for each fit, and the methods
        ``covariance()`` and ``stderr()``.

    Raises
    ------
    ValueError
        If shapes or options do not fit together, or `p0` is outside the bounds.
    TypeError
        If an argument is of the wrong kind.
    ImportError
        If `progress` is asked for and tqdm is not installed.

    Notes
    -----
    A fit that meets NaN or infinity ends with status -3 and harms no other.

    Examples
    --------
    >>> import numpy as np
    >>> from lmsolve import curve_fit_many
    >>> x = np.linspace(0, 4, 50)
    >>> a, k = np.array([[2.0], [3.0], [4.0]]), np.array([[0.5], [1.0], [1.5]])
    >>> y = a * np.exp(-k * x)
    >>> result = curve_fit_many(lambda x, a, k: a * np.exp(-k * x), x, y, p0=[1.0, 1.0])
    >>> result.x.round(6)
    array([[2. , 0.5],
           [3. , 1. ],
           [4. , 1.5]])
    """
    xp, y, x0, start = inputs.data_and_start(ydata, p0)
    B, m = y.shape
    predictors = xdata if isinstance(xdata, tuple) else (xdata,)
    xs = [inputs.rows(xp, f"xdata[{i}]", a, x0, (B, m)) for i, a in enumerate(predictors)]
    per_fit = tuple(a for a in xs if a.shape[0] > 1)
    keep = None if mask is None else inputs.mask(xp, mask, start, (B, m))
    weight = None
    if sigma is not None:
        weight = 1 / inputs.positive(xp, inputs.rows(xp, "sigma", sigma, x0, (B, m)), keep)

    def call(function: Callable[..., Any]) -> Function:
        def evaluate(rows: Sequence[Array], args: tuple[Array, ...]) -> Any:
            waiting = iter(args)
            at = [next(waiting) if a.shape[0] > 1 else a[0, :] for a in xs]
            x = tuple(at) if isinstance(xdata, tuple) else at[0]
            return function(x, *[row if row.ndim == 2 else row[:, None] for row in rows])

        return evaluate

    options = inputs.options(xp, y, jac, ftol, xtol, gtol, max_nit, memory, workers, progress)
    lower, upper = inputs.bounds(xp, bounds, start)
    rho = inputs.loss(loss, f_scale)
    model = Model(call(f), m, "f", per_fit, y, weight, keep, lower, upper, rho, elementwise=True)
    dof = (m if keep is None else xp.sum(xp.astype(keep, start.dtype), axis=1)) - start.shape[0]
    dof = dof + xp.zeros_like(start[0, :])
    derivative = supplied(call(jac)) if callable(jac) else None
    fits = run(xp, model, derivative, start, options)
    return as_result(xp, model, fits, dof, absolute_sigma)


def least_squares_many(
    fun: Callable[..., Array],
    x0: Array,
    jac: Callable[..., Any] | str | None = None,
    *,
    args: tuple[Array, ...] = (),
    bounds: tuple[Any, Any] = (-np.inf, np.inf),
    loss: str = "linear",
    f_scale: float = 1.0,
    ftol: float | None = None,
    xtol: float | None = None,
    gtol: float | None = None,
    max_nit: int = 200,
    memory: int | None = None,
    workers: int = 1,
    progress: bool = False,
) -> ManyFitsResult:
    """Solve many nonlinear least-squares problems of one shape.

    Minimises ``0.5 * sum(f_scale**2 * rho((fun(x) / f_scale)**2))`` for each of B problems.

    Parameters
    ----------
    fun : callable
        Residuals ``fun(x, *args)`` of shape (b, m) for x of shape (b, n), b being the number of
        problems that are worked on at the time.
    x0 : array, shape (B, n)
        Starting points. Their library, dtype and device are those of the computation.
    jac : callable, {'2-point', '3-point'} or None
        ``jac(x, *args)`` of shape (b, m, n), or n columns that broadcast to (b, m); see
        `curve_fit_many` for the rest.
    args : tuple of arrays, each of shape (B, ...)
        Data of the problems, of which `fun` and `jac` get the rows of the b problems. What the
        problems share belongs into `fun` itself.
    bounds : tuple of (lower, upper)
        Each a number or an array of shape (n,) or (B, n).
    loss : {'linear', 'huber', 'soft_l1', 'cauchy', 'arctan'}
        The loss rho, as in `scipy.optimize.least_squares`.
    f_scale : float, default 1.0
        Residual at which the loss turns from square to robust.
    ftol, xtol, gtol : float, optional
        Tolerances, see `curve_fit_many`.
    max_nit : int, default 200
        Most trials for a problem.
    memory : int, optional
        Bytes for the working set, see `curve_fit_many`.
    workers : int, default 1
        Threads, NumPy only; `fun` must be safe to call from several threads.
    progress : bool, default False
        Show a progress bar (needs tqdm).

    Returns
    -------
    ManyFitsResult
        Solutions, costs, statuses and counts with one row for each problem, and the methods
        ``covariance()`` and ``stderr()``.

    Raises
    ------
    ValueError
        If shapes or options do not fit together, or `x0` is outside the bounds.
    TypeError
        If an argument is of the wrong kind.
    ImportError
        If `progress` is asked for and tqdm is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from lmsolve import least_squares_many
    >>> def rosenbrock(x, a):
    ...     return np.stack([10 * (x[:, 1] - x[:, 0] ** 2), a - x[:, 0]], axis=1)
    >>> a = np.array([1.0, 2.0])
    >>> least_squares_many(rosenbrock, np.array([[-1.2, 1.0], [-1.2, 1.0]]), args=(a,)).x.round(6)
    array([[1., 1.],
           [2., 4.]])
    """
    if not is_array(x0) or x0.ndim != 2 or x0.shape[1] == 0:
        raise ValueError(
            f"`x0` must be an array of shape (B, n), n >= 1, got {inputs.shape_of(x0)}."
        )
    xp = array_namespace(x0, *args)
    if not xp.isdtype(x0.dtype, "real floating"):
        x0 = xp.astype(x0, xp.float64)
    x0 = inputs.plain(x0)
    B, n = x0.shape
    for i, a in enumerate(args):
        if not is_array(a) or a.ndim == 0 or a.shape[0] != B:
            raise ValueError(
                f"`args[{i}]` must have shape (B, ...) = ({B}, ...), got {inputs.shape_of(a)}."
            )

    def call(function: Callable[..., Any]) -> Function:
        return lambda rows, here: function(xp.stack(list(rows), axis=1), *here)

    options = inputs.options(xp, x0, jac, ftol, xtol, gtol, max_nit, memory, workers, progress)
    start = inputs.fits_last(xp, x0)
    lower, upper = inputs.bounds(xp, bounds, start)
    with quiet(xp):
        probe = fun(x0[:1, :], *[a[:1, ...] for a in args]) if B else xp.zeros((0, 0))
    if not is_array(probe) or probe.ndim != 2:
        raise ValueError(
            f"`fun` must return residuals of shape (b, m), got {inputs.shape_of(probe)}."
        )
    m = probe.shape[1]
    model = Model(
        call(fun), m, "fun", args, lower=lower, upper=upper, loss=inputs.loss(loss, f_scale)
    )
    dof = xp.zeros_like(start[0, :]) + (m - n)
    derivative = supplied(call(jac)) if callable(jac) else None
    fits = run(xp, model, derivative, start, options)
    return as_result(xp, model, fits, dof, False)
