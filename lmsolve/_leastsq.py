"""`leastsq`: SciPy's older front door, and its words for options and results."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import qr

from . import _validate
from ._least_squares import least_squares
from ._result import LeastSquaresResult
from ._xp import to_numpy


def translated(kwargs: dict[str, Any], n: int) -> dict[str, Any]:
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


def info(result: LeastSquaresResult) -> dict[str, Any]:
    """infodict of MINPACK's front doors: counts, residuals and a pivoted QR of the Jacobian."""
    info = {"nfev": result.nfev, "fvec": result.fun}
    J = to_numpy(result.jac)
    Q, R, info["ipvt"] = qr(J, mode="economic", pivoting=True)
    info["fjac"] = np.zeros((J.shape[1], J.shape[0]), dtype=R.dtype)
    info["fjac"][:, : R.shape[0]] = R.T
    info["qtf"] = Q.conj().T @ to_numpy(result.fun)
    return info


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
        Jacobian, with ``full_output``; ``njev`` where ``Dfun`` is given.
    mesg : str
        Why it stopped, with ``full_output``.
    ier : int
        1 to 4 for success, 5 if ``maxfev`` was reached.

    Raises
    ------
    ValueError
        If an argument breaks the rule that the message names.

    Warns
    -----
    RuntimeWarning
        If it did not converge and ``full_output``, which would tell, is not asked for.
    """
    jac: Any = "2-point"
    if Dfun is not None:
        derivative = Dfun
        jac = (lambda x, *a: np.asarray(derivative(x, *a)).T) if col_deriv else Dfun
    result = least_squares(
        func,
        _validate.flat_parameters(x0, "x0"),
        jac,
        ftol=ftol,
        xtol=xtol,
        gtol=gtol,
        args=args if isinstance(args, tuple) else (args,),
        **translated({"maxfev": maxfev, "epsfcn": epsfcn, "diag": diag}, 0),
    )
    # MINPACK's info: 1 and 2 for ftol and xtol, 3 for both, 4 for gtol, 5 for too many calls.
    ier = {1: 4, 2: 1, 3: 2, 4: 3}.get(result.status, 5)
    if not full_output:
        if ier == 5:
            warnings.warn(result.message, RuntimeWarning, stacklevel=2)
        return result.x, ier
    cov = result.covariance(absolute_sigma=True)
    cov_x = cov if np.isfinite(cov).all() else None
    infodict = info(result)
    if Dfun is not None:
        infodict["njev"] = result.njev
    return result.x, cov_x, infodict, result.message, ier
