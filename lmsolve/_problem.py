"""The residual function as the solver sees it: the only caller of user code.

A problem answers three questions: the residuals at x, their cost, and the linearisation at an
accepted x. The last is asked only there, so that a rejected trial costs one residual evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from . import _numdiff
from ._loss import Loss
from ._numdiff import Differences
from ._subproblem import Rows, Subproblem, dense_subproblem
from ._xp import Array, Namespace, eps, sum_squares, to_numpy


class LeastSquaresProblem(Protocol):
    """The seam: what the solver needs. ``r`` may be any handle that the problem understands."""

    xp: Namespace
    nfev: int
    njev: int

    def residual(self, x: Array) -> Any:
        """Residuals at x (n,), or a handle on them."""
        ...

    def cost(self, r: Any) -> Array:
        """0-d cost of residuals."""
        ...

    def linearize(self, x: Array, r: Any) -> Subproblem:
        """Subproblem at an accepted x, whose residuals are r."""
        ...


@dataclass
class Problem:
    """A user's residual function and Jacobian over arrays of one namespace.

    Parameters
    ----------
    xp : namespace
        Namespace of x and of the residuals.
    fun : callable
        ``fun(x)`` returns residuals, array, shape (m,).
    jac : callable or None
        ``jac(x)`` returns the Jacobian, array, shape (m, n). None differences ``fun``.
    differences : Differences or None
        How to difference where ``jac`` is None.
    loss : Loss or None
        A robust loss; None is the plain sum of squares.
    shape : tuple of int
        Shape of the residuals, known from the first evaluation.
    """

    xp: Namespace
    fun: Callable[[Array], Array]
    jac: Callable[[Array], Any] | None
    differences: Differences | None = None
    loss: Loss | None = None
    shape: tuple[int, ...] | None = None
    sparsity: _numdiff.Sparsity | None = None
    nfev: int = 0
    njev: int = 0
    diff_nfev: int = 0
    J: Any = None
    _central: bool = False

    def residual(self, x: Array) -> Array:
        """Residuals r (m,) at x (n,); one evaluation."""
        self.nfev += 1
        return self._evaluate(x)

    def cost(self, r: Array) -> Array:
        """0-d cost, summed in float64."""
        if self.loss is not None:
            return self.loss.cost(self.xp, r)
        return 0.5 * sum_squares(self.xp, r)

    def linearize(self, x: Array, r: Array) -> Subproblem:
        """Subproblem at x (n,) with residuals r (m,)."""
        self.njev += 1
        J = self._jacobian(x, r)
        self.J = J
        if self.loss is None:
            return dense_subproblem(self.xp, J, r)
        w, r_w = self.loss.weights(self.xp, r)
        return dense_subproblem(self.xp, J, r_w, w)

    def derivative_error(self) -> float:
        """Relative error of the Jacobian's entries to expect from the way it is made."""
        if self.jac is not None or self.differences is None or self.differences.kind == "cs":
            return 0.0
        e = eps(np, np.float64)
        return float(e**0.5 if self.differences.kind == "2-point" else e ** (2.0 / 3.0))

    def refine_derivatives(self) -> bool:
        """Go over from one-sided to central differences; False where that is not possible."""
        diff = self.differences
        if self.jac is not None or diff is None or diff.kind != "2-point" or diff.rel_step is not None:
            return False
        self.differences = replace(diff, kind="3-point")
        return True

    def _evaluate(self, x: Array) -> Array:
        r = self.fun(x)
        if self.shape is not None and r.shape != self.shape:
            raise ValueError(
                f"`fun` must return the same shape at every call: {self.shape} at `x0`, "
                f"now {r.shape}."
            )
        return r

    def _difference_evaluate(self, x: Array) -> Array:
        self.diff_nfev += 1
        return self._evaluate(x)

    def _jacobian(self, x: Array, r: Array) -> Any:
        if self.jac is not None:
            return self.jac(x)
        assert self.differences is not None
        if self.xp is np:
            return _numdiff.dense(self.differences, self._difference_evaluate, x, r, None)
        return _numdiff.dense_xp(
            self.differences, self._difference_evaluate, x, to_numpy(x), r, self.xp
        )


__all__ = ["LeastSquaresProblem", "Problem", "Rows"]
