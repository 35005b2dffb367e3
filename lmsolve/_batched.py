"""Many small fits at once: `curve_fit_many` and `least_squares_many`.

B independent problems of one shape, m residuals and n parameters each, advance side by side in
the arrays of any namespace. The loop is in `_batched_lm`, the model and its derivatives in
`_batched_model`; here are the front doors: validation, the width of the working set, threads,
and the result.

The fits that are worked on at one time, the working set, are few enough for their arrays to stay
in the processor's cache: 10,000 fits in sets of 1,000 take half the time of one set of 10,000.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult

from ._batched_lm import NOT_FINITE, RUNNING, STALLED, Fits, Limits, Loop, fresh, invert, join, take
from ._batched_model import (
    ByTorch,
    Derivative,
    Function,
    Model,
    central,
    device_of,
    forward,
    supplied,
)
from ._loss import LOSSES, Loss
from ._xp import Array, Namespace, array_namespace, eps, is_array, is_numpy, is_torch, to_floats

MESSAGES = {
    4: "`ftol` and `xtol` reached: cost and parameters no longer change.",
    3: "`xtol` reached: the parameters no longer change.",
    2: "`ftol` reached: the cost no longer changes.",
    1: "`gtol` reached: the gradient is zero to the tolerance.",
    0: "`max_nit` reached before convergence.",
    NOT_FINITE: "Residuals or derivatives are not finite.",
    STALLED: "No step lowers the cost, though the gradient is not zero: check the derivatives.",
}
# Measured with 2 MiB of level-2 cache: 4 to 16 MiB differ by 4 %, 2 MiB is 14 % and 1 MiB 30 %
# slower than 8 (more turns of the loop); two threads have 6 MiB each.
CACHE_BYTES = 6 * 2**20
DEVICE_BYTES = 2**30
# Forward differences serve to come this near; central ones take it to the tolerance asked for.
NEAR = 1e-8


class ManyFitsResult(OptimizeResult):  # type: ignore[misc]  # SciPy carries no types
    """Results of `curve_fit_many` and `least_squares_many`, fits along the first axis.

    Attributes
    ----------
    x : array, shape (B, n)
        Parameters.
    cost : array, shape (B,)
        Half the sum of squares of the weighted residuals, after the loss.
    grad : array, shape (B, n)
        Gradient of the cost at the last linearisation.
    gram : array, shape (B, n, n)
        ``J' J`` of the weighted residuals, after the loss, at the last linearisation, which is
        within the tolerances of `x`.
    active_mask : array of int, shape (B, n)
        -1 where a parameter is at its lower bound, 1 where at its upper one, else 0.
    status : array of int, shape (B,)
        Why each fit ended: 1 `gtol`, 2 `ftol`, 3 `xtol`, 4 `ftol` and `xtol`, 0 `max_nit`,
        -3 not finite, -4 no step lowers the cost.
    success : array of bool, shape (B,)
        Whether each fit converged (status > 0).
    nit, nfev, njev : array of int, shape (B,)
        Trials, evaluations of the model (those for differences left out) and linearisations.
    dof : array, shape (B,)
        Degrees of freedom: residuals that are not masked, less n.
    """

    @property
    def message(self) -> list[str]:
        """Why each fit ended, in words."""
        return [MESSAGES[int(code)] for code in self.status]

    def covariance(self) -> Array:
        """Covariance matrices of the parameters.

        Returns
        -------
        array, shape (B, n, n)
            ``inv(J' J)``, times ``2 cost / dof`` unless sigma is absolute; all infinite for a
            fit whose ``J' J`` is singular, or whose scale is not known because dof <= 0.
        """
        xp = array_namespace(self.x)
        with _quiet(xp):
            inverse, regular = invert(xp, xp.permute_dims(self.gram, (1, 2, 0)))
        if not self._absolute_sigma:
            inverse = inverse * (2 * self.cost / xp.where(self.dof > 0, self.dof, 1.0))
            regular = regular & (self.dof > 0)
        inverse = xp.where(regular, inverse, xp.inf)
        return xp.permute_dims(inverse, (2, 0, 1))

    def stderr(self) -> Array:
        """Standard errors of the parameters.

        Returns
        -------
        array, shape (B, n)
            Square roots of the diagonals of `covariance`.
        """
        xp = array_namespace(self.x)
        cov = self.covariance()
        return xp.sqrt(xp.stack([cov[:, j, j] for j in range(cov.shape[1])], axis=1))


class _Options(NamedTuple):
    """The options that both front doors take, checked."""

    limits: Limits
    jac: str | None  # None where the user supplies derivatives
    memory: int | None
    workers: int
    progress: bool


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
        True for data to use. Data and model may be NaN where it is False.
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
        ``ftol * cost``. 4 eps by default, with eps of the dtype.
    xtol : float, optional
        A fit ends when ``|p_j| <= xtol * (|x_j| + |r| / s_j)`` for its step p in every j, s_j
        being the largest norm of column j of J so far, or when the next step would be so by the
        rate of the last two. Default ``eps**(2/3)``: 3.7e-11 in float64.
    gtol : float, optional
        A fit ends when the cosine between the residuals and each column of J is at most `gtol`.
        Default ``eps**(2/3)``.
    max_nit : int, default 200
        Most trials for a fit.
    memory : int, optional
        Bytes for the working set. By default one that stays in the processor's cache (6 MiB), or
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
    xp, y, x0, start = _data_and_start(ydata, p0)
    B, m = y.shape
    predictors = xdata if isinstance(xdata, tuple) else (xdata,)
    xs = [_rows(xp, f"xdata[{i}]", a, x0, (B, m)) for i, a in enumerate(predictors)]
    per_fit = tuple(a for a in xs if a.shape[0] > 1)
    weight = None if sigma is None else 1 / _positive(xp, _rows(xp, "sigma", sigma, x0, (B, m)))
    keep = None if mask is None else _mask(xp, mask, (B, m))

    def call(function: Callable[..., Any]) -> Function:
        def evaluate(rows: Sequence[Array], args: tuple[Array, ...]) -> Any:
            waiting = iter(args)
            at = [next(waiting) if a.shape[0] > 1 else a[0, :] for a in xs]
            x = tuple(at) if isinstance(xdata, tuple) else at[0]
            return function(x, *[row if row.ndim == 2 else row[:, None] for row in rows])

        return evaluate

    options = _options(xp, y, jac, ftol, xtol, gtol, max_nit, memory, workers, progress)
    lower, upper = _bounds(xp, bounds, start)
    rho = _loss(loss, f_scale)
    model = Model(call(f), m, "f", per_fit, y, weight, keep, lower, upper, rho, elementwise=True)
    dof = (m if keep is None else xp.sum(xp.astype(keep, start.dtype), axis=1)) - start.shape[0]
    dof = dof + xp.zeros_like(start[0, :])
    derivative = supplied(call(jac)) if callable(jac) else None
    return _fit(xp, model, derivative, start, options, dof, absolute_sigma)


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
        raise ValueError(f"`x0` must be an array of shape (B, n), n >= 1, got {_shape(x0)}.")
    xp = array_namespace(x0, *args)
    if not xp.isdtype(x0.dtype, "real floating"):
        x0 = xp.astype(x0, xp.float64)
    x0 = _plain(x0)
    B, n = x0.shape
    for i, a in enumerate(args):
        if not is_array(a) or a.ndim == 0 or a.shape[0] != B:
            raise ValueError(f"`args[{i}]` must have shape (B, ...) = ({B}, ...), got {_shape(a)}.")

    def call(function: Callable[..., Any]) -> Function:
        return lambda rows, here: function(xp.stack(list(rows), axis=1), *here)

    options = _options(xp, x0, jac, ftol, xtol, gtol, max_nit, memory, workers, progress)
    start = _fits_last(xp, x0)
    lower, upper = _bounds(xp, bounds, start)
    with _quiet(xp):
        probe = fun(x0[:1, :], *[a[:1, ...] for a in args]) if B else xp.zeros((0, 0))
    if not is_array(probe) or probe.ndim != 2:
        raise ValueError(f"`fun` must return residuals of shape (b, m), got {_shape(probe)}.")
    m = probe.shape[1]
    model = Model(call(fun), m, "fun", args, lower=lower, upper=upper, loss=_loss(loss, f_scale))
    dof = xp.zeros_like(start[0, :]) + (m - n)
    derivative = supplied(call(jac)) if callable(jac) else None
    return _fit(xp, model, derivative, start, options, dof, False)


def _fit(
    xp: Namespace,
    model: Model,
    derivative: Derivative | None,
    start: Array,
    options: _Options,
    dof: Array,
    absolute_sigma: bool,
) -> ManyFitsResult:
    """All fits from the starting points (n, B), by shares if there are several workers."""
    total = start.shape[1]
    index = xp.arange(total, **device_of(start))
    width = max(1, min(total, _width(xp, start, model.m, options.memory)))
    stages = _stages(derivative, options, is_torch(start))
    bar = _bar(options.progress, total)

    def share(part: Array) -> Fits:
        fits = fresh(xp, xp.take(start, part, axis=1), part)
        with _quiet(xp):
            for i, (d, limits) in enumerate(stages):
                last = i == len(stages) - 1
                fits = Loop(xp, model, d, limits, width).run(fits, bar if last else _ignore)
                if not last:
                    status = xp.where(fits.status > 0, RUNNING, fits.status)
                    fits = replace(fits, status=status, last=xp.zeros_like(fits.last))
        return fits

    if is_numpy(xp):
        _keep_memory()
    try:
        if options.workers == 1:
            parts = [share(index)]
        else:
            cuts = [total * i // options.workers for i in range(options.workers + 1)]
            with ThreadPoolExecutor(options.workers) as pool:
                parts = list(pool.map(share, [index[a:b] for a, b in pairwise(cuts) if b > a]))
    finally:
        bar.close()
    fits = join(xp, parts)
    fits = take(xp, fits, xp.argsort(fits.index))
    return _result(xp, model, fits, dof, absolute_sigma)


def _stages(
    derivative: Derivative | None, options: _Options, torch_arrays: bool
) -> list[tuple[Derivative, Limits]]:
    """What to run one after the other: derivatives, and the limits to run them to."""
    limits = options.limits
    if derivative is not None:
        return [(derivative, limits)]
    if options.jac is not None:
        return [({"2-point": forward, "3-point": central}[options.jac], limits)]
    if torch_arrays:
        return [(ByTorch(), limits)]
    near = limits._replace(xtol=max(NEAR, limits.xtol), gtol=max(NEAR, limits.gtol))
    return [(forward, near), (central, limits)]


def _result(
    xp: Namespace, model: Model, fits: Fits, dof: Array, absolute_sigma: bool
) -> ManyFitsResult:
    """The result, with the fits on the first axis."""
    active = xp.zeros_like(fits.x)
    if model.lower is not None:
        active = xp.where(fits.x >= model.upper, 1.0, xp.where(fits.x <= model.lower, -1.0, active))
    finite = xp.isfinite(xp.sum(fits.gram, axis=(0, 1))) & xp.isfinite(fits.cost)
    status = xp.where((fits.status == STALLED) & ~finite, NOT_FINITE, fits.status)
    return ManyFitsResult(
        x=_fits_first(xp, fits.x),
        cost=fits.cost,
        grad=_fits_first(xp, fits.grad),
        gram=xp.permute_dims(fits.gram, (2, 0, 1)),
        active_mask=_fits_first(xp, xp.astype(active, fits.index.dtype)),
        status=status,
        success=status > 0,
        nit=fits.nit,
        nfev=fits.nfev,
        njev=fits.njev,
        dof=dof,
        _absolute_sigma=absolute_sigma,
    )


def _width(xp: Namespace, start: Array, m: int, memory: int | None) -> int:
    """Fits whose arrays fill `memory`: n columns and some temporaries of length m, 6 of n^2."""
    n = start.shape[0]
    item = int(xp.finfo(start.dtype).bits) // 8
    if memory is None:
        on_host = is_numpy(xp) or str(device_of(start).get("device")) == "cpu"
        memory = CACHE_BYTES if on_host else DEVICE_BYTES
    temporaries = 12 if is_torch(start) else 6  # torch keeps some for its backward pass
    return int(memory // (item * (m * (n + temporaries) + 6 * n * n)))


def _data_and_start(ydata: Array, p0: Any) -> tuple[Namespace, Array, Array, Array]:
    """Namespace, y (B, m), and the starting points as (B or 1, n) and as (n, B), of one dtype."""
    y = _plain(ydata) if is_array(ydata) else np.asarray(ydata)
    xp = array_namespace(y, p0) if is_array(p0) else array_namespace(y)
    if y.ndim != 2 or y.shape[1] == 0:
        raise ValueError(f"`ydata` must have shape (B, m), m >= 1, got {tuple(y.shape)}.")
    dtype = p0.dtype if is_array(p0) else y.dtype
    if not xp.isdtype(dtype, "real floating"):
        dtype = y.dtype if xp.isdtype(y.dtype, "real floating") else xp.float64
    if not xp.isdtype(y.dtype, ("real floating", "integral")):
        raise TypeError(f"`ydata` must hold real numbers, got {y.dtype}.")
    B = y.shape[0]
    x0 = xp.asarray(_plain(p0), dtype=dtype, **device_of(y))
    if x0.ndim not in (1, 2) or x0.shape[-1] == 0 or (x0.ndim == 2 and x0.shape[0] != B):
        raise ValueError(
            f"`p0` must have shape (n,) or (B, n) = ({B}, n), n >= 1, got {tuple(x0.shape)}."
        )
    x0 = x0 if x0.ndim == 2 else x0[None, :]
    start = _fits_last(xp, xp.broadcast_to(x0, (B, x0.shape[1])))
    return xp, xp.astype(y, dtype, copy=False), x0, start


def _rows(xp: Namespace, name: str, a: Any, like: Array, shape: tuple[int, int]) -> Array:
    """`a` of shape (m,) or (B, m) as (1, m) or (B, m), in dtype and device of `like`."""
    a = xp.asarray(_plain(a), dtype=like.dtype, **device_of(like))
    B, m = shape
    if tuple(a.shape) not in ((m,), (B, m)):
        raise ValueError(
            f"`{name}` must have shape (m,) = ({m},) or (B, m) = ({B}, {m}), got {tuple(a.shape)}."
        )
    return a if a.ndim == 2 else a[None, :]


def _positive(xp: Namespace, sigma: Array) -> Array:
    """sigma, which must be positive."""
    (worst,) = to_floats(xp.min(sigma))
    if not worst > 0:
        raise ValueError(f"`sigma` must be positive, got {worst}.")
    return sigma


def _mask(xp: Namespace, mask: Any, shape: tuple[int, int]) -> Array:
    """The mask as (1, m) or (B, m)."""
    mask = xp.asarray(mask)
    B, m = shape
    if mask.dtype != xp.bool:
        raise TypeError(f"`mask` must hold booleans, True for data to use, got {mask.dtype}.")
    if tuple(mask.shape) not in ((m,), (B, m)):
        raise ValueError(
            f"`mask` must have shape (m,) = ({m},) or (B, m) = ({B}, {m}), got {tuple(mask.shape)}."
        )
    return mask if mask.ndim == 2 else mask[None, :]


def _bounds(xp: Namespace, bounds: Any, start: Array) -> tuple[Array | None, Array | None]:
    """Lower and upper bounds (n, 1) or (n, B), or None twice where there are none."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError("`bounds` must be a pair (lower, upper).")
    n, B = start.shape
    sides = []
    for name, side in zip(("lower", "upper"), bounds):
        a = xp.asarray(_plain(side), dtype=start.dtype, **device_of(start))
        if tuple(a.shape) not in ((), (n,), (B, n)):
            raise ValueError(
                f"`bounds`: the {name} one must be a number or have shape (n,) = ({n},) or "
                f"(B, n) = ({B}, {n}), got {tuple(a.shape)}."
            )
        a = a if a.ndim == 2 else xp.broadcast_to(a, (n,))[None, :]
        sides.append(_fits_last(xp, a))
    lower, upper = sides
    free, crossed, outside = to_floats(
        *[
            xp.astype(test, start.dtype)
            for test in (
                xp.all(lower == -xp.inf) & xp.all(upper == xp.inf),
                xp.any(lower >= upper),
                xp.any((start < lower) | (start > upper)),
            )
        ]
    )
    if free:
        return None, None
    if crossed:
        raise ValueError("`bounds`: each lower bound must be less than its upper bound.")
    if outside:
        raise ValueError("The starting points must lie within `bounds`.")
    return lower, upper


def _loss(loss: str, f_scale: float) -> Loss | None:
    """The robust loss, None for 'linear'."""
    if loss not in LOSSES:
        raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, got {loss!r}.")
    if not f_scale > 0:
        raise ValueError(f"`f_scale` must be positive, got {f_scale}.")
    rho = LOSSES[loss]
    return None if rho is None else Loss(rho, float(f_scale))


def _options(
    xp: Namespace,
    like: Array,
    jac: Any,
    ftol: float | None,
    xtol: float | None,
    gtol: float | None,
    max_nit: int,
    memory: int | None,
    workers: int,
    progress: bool,
) -> _Options:
    """The options both front doors take, checked, defaults filled in."""
    if not (jac is None or callable(jac) or jac in ("2-point", "3-point")):
        raise ValueError(f"`jac` must be callable, '2-point', '3-point' or None, got {jac!r}.")
    small = eps(xp, like.dtype) if xp.isdtype(like.dtype, "real floating") else eps(xp, xp.float64)
    tolerances = {}
    for name, value, default in (
        ("ftol", ftol, 4 * small),
        ("xtol", xtol, small ** (2 / 3)),
        ("gtol", gtol, small ** (2 / 3)),
    ):
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
        tolerances[name] = default if value is None else float(value)
    for name, count in (("max_nit", max_nit), ("workers", workers), ("memory", memory)):
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if workers > 1 and not is_numpy(xp):
        raise ValueError("`workers` > 1 needs NumPy arrays; other libraries run their own threads.")
    limits = Limits(**tolerances, max_nit=max_nit)
    return _Options(limits, jac if isinstance(jac, str) else None, memory, workers, progress)


class _Bar:
    """A progress bar that several threads may move, or none at all."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.lock = bar, threading.Lock()

    def __call__(self, k: int) -> None:
        if self.bar is not None:
            with self.lock:
                self.bar.update(k)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar(progress: bool, total: int) -> _Bar:
    """A tqdm bar over the fits, if asked for."""
    if not progress:
        return _Bar(None)
    try:
        from tqdm.auto import tqdm
    except ImportError as missing:
        raise ImportError("`progress` needs tqdm: pip install tqdm") from missing
    return _Bar(tqdm(total=total, unit="fit"))


def _ignore(k: int) -> None:
    """The bar of a stage that is not the last."""


@contextlib.contextmanager
def _quiet(xp: Namespace) -> Iterator[None]:
    """No warnings of trial points that overflow, and no graph kept by torch."""
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(np.errstate(all="ignore"))
        if "torch" in xp.__name__:
            quiet.enter_context(xp.no_grad())
        yield


def _keep_memory() -> None:
    """Have the C library keep freed arrays of up to 16 MiB instead of handing each back.

    Freeing one large block raises glibc's own threshold; elsewhere this does nothing. Without it
    every temporary of a model is paged in anew, which doubled the time of a model of 500 x 50.
    """
    np.empty(2**24, dtype=np.uint8)


def _fits_last(xp: Namespace, a: Array) -> Array:
    """(B, n) as (n, B), contiguous."""
    a = _plain(a)
    return xp.stack([a[:, j] for j in range(a.shape[1])])


def _fits_first(xp: Namespace, a: Array) -> Array:
    """(n, B) as (B, n), contiguous."""
    return xp.stack([a[j, :] for j in range(a.shape[0])], axis=1)


def _plain(a: Any) -> Any:
    """`a` off torch's graph."""
    return a.detach() if is_torch(a) else a


def _shape(a: Any) -> str:
    """Shape of an array, or the type of anything else."""
    return str(tuple(a.shape)) if is_array(a) else type(a).__name__
