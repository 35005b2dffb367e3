"""`check_jac`: a user's Jacobian against differences, with the worst entry named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _numdiff, _validate
from ._functions import UserFunction, as_jacobian, wrong_shape
from ._numdiff import Differences
from ._xp import to_numpy


@dataclass(frozen=True)
class JacobianCheck:
    """What `check_jac` found; true in a condition if the Jacobian agrees.

    Attributes
    ----------
    ok : bool
        Whether every entry agrees to the tolerance.
    error : float
        Largest disagreement, relative to the largest entry of its column.
    row, column : int
        Where it is.
    expected, got : float
        The entry by differences and by the user's function.
    message : str
        The same in words.
    """

    ok: bool
    error: float
    row: int
    column: int
    expected: float
    got: float
    message: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.message


def check_jac(
    fun: Callable[..., Any],
    x0: Any,
    jac: Callable[..., Any],
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    rtol: float = 1e-5,
) -> JacobianCheck:
    """Compare a Jacobian with central differences and name the worst entry.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args, **kwargs)`` returns residuals, shape (m,).
    x0 : array_like, shape (n,)
        Where to compare. A point without symmetry shows more errors than a start of ones.
    jac : callable
        ``jac(x, *args, **kwargs)`` returns the Jacobian, shape (m, n), dense, sparse or operator.
    args, kwargs : tuple and dict, optional
        Further arguments of both.
    rtol : float, optional
        Disagreement allowed, relative to the largest entry of the column.

    Returns
    -------
    JacobianCheck
        ``ok``, the worst entry, and a message.

    Raises
    ------
    ValueError
        If the Jacobian has the wrong shape.
    TypeError
        If ``jac`` is not callable.

    Examples
    --------
    >>> from lmsolve import check_jac
    >>> jac = lambda x: [[x[1], x[0]], [0, 1]]
    >>> print(check_jac(lambda x: [x[0] * x[1], x[0]], [2.0, 3.0], jac))
    `jac` is wrong by 0.5 of its column: at row 1, column 1 it gives 1, differences give 0.
    """
    if not callable(jac):
        raise TypeError(f"`jac` must be callable, got {type(jac).__name__}.")
    x = to_numpy(_validate.parameters(x0)).astype(float)
    function = UserFunction(fun, tuple(args), kwargs or {}, "fun")
    function.dtype = np.dtype(float)
    r = function(x)
    J = as_jacobian(jac(x.copy(), *args, **(kwargs or {})), float)
    if hasattr(J, "tocsr"):
        J = J.toarray()
    elif not isinstance(J, np.ndarray):
        J = J @ np.eye(x.shape[0])
    J = np.atleast_2d(J)
    if J.shape != (r.shape[0], x.shape[0]):
        raise wrong_shape(J.shape, (r.shape[0], x.shape[0]))
    differences = Differences("3-point", np.where(x != 0, np.abs(x), 1.0))
    expected = _numdiff.dense(differences, function, x, r, None)
    size = np.maximum(np.abs(expected).max(axis=0), np.abs(J).max(axis=0))
    difference = np.abs(J - expected) / np.where(size > 0, size, 1.0)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    i, j = np.unravel_index(int(np.argmax(difference)), J.shape)
    error = float(difference[i, j])
    ok = error <= rtol
    where = f"row {i}, column {j} it gives {J[i, j]:.6g}, differences give {expected[i, j]:.6g}."
    text = (
        f"`jac` agrees to {error:.1e} of each column; worst at {where}"
        if ok
        else f"`jac` is wrong by {error:.3g} of its column: at {where}"
    )
    return JacobianCheck(ok, error, int(i), int(j), float(expected[i, j]), float(J[i, j]), text)
