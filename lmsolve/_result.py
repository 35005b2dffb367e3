"""The result of a fit: SciPy's OptimizeResult with uncertainty and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

from . import _uncertainty
from ._loss import UserLoss
from ._uncertainty import Columns, Curvature, Uncertainty
from ._xp import array_namespace, is_numpy, to_numpy


@dataclass(slots=True)
class Context:
    """What a result remembers of its fit for later questions; not pickled with it."""

    m: int
    loss: Any
    xp: Any
    held: np.ndarray
    lb: np.ndarray
    ub: np.ndarray
    gram: Any
    refit: Callable[[np.ndarray, np.ndarray], Any] | None
    names: Sequence[str] | None = None
    absolute_sigma: bool = False
    rank: int | None = None
    #: Jacobian and residuals of the real problem where those of the result are complex.
    real: tuple[Any, Any] | None = None
    #: See LocalSums.curvature_rows; what it gave is kept.
    reduced: Callable[[], tuple[np.ndarray, np.ndarray | None] | None] | None = None
    curvature: Curvature | None = None
    #: See LocalSums.columns.
    columns: Callable[[], tuple[Columns, np.ndarray | None] | None] | None = None


class LeastSquaresResult(OptimizeResult):  # type: ignore[misc]  # SciPy has no types
    """Result of a least-squares fit.

    Attributes
    ----------
    x : array, shape (n,)
        Solution.
    cost : float
        Cost at the solution, ``0.5 * sum(rho(r**2))``.
    fun : array, shape (m,)
        Residuals at the solution, as ``fun`` returned them.
    jac : array, sparse array or LinearOperator, shape (m, n)
        Jacobian at the solution, as ``jac`` returned it: a robust loss does not change it.
    grad : array, shape (n,)
        Gradient of the cost.
    optimality : float
        Largest gradient entry in absolute value; with bounds, each entry scaled by its way to the
        bound that it points to.
    active_mask : ndarray of int, shape (n,)
        -1 at a lower bound, 1 at an upper bound, 0 elsewhere.
    nfev, njev, nit : int
        Residual evaluations (differences not counted), Jacobians and accepted steps.
    status : int
        Why it ended: 1 `gtol`, 2 `ftol`, 3 `xtol`, 4 both, 0 `max_nfev`, -2 the callback,
        -3 a Jacobian that is not finite, -4 a singular system, -5 no step with a lower cost.
    message : str
        The same in words, with the figures.
    success : bool
        Whether a convergence test was met.
    history : list of Iteration
        One entry for each trial.
    state : LMState
        The last state: pass it as ``resume=`` to go on.
    rank : int
        Numerical rank of the Jacobian of the free parameters; computed when it is asked for.
    """

    _context: Any = None  # a Context

    @property
    def rank(self) -> int:
        """Numerical rank of the Jacobian of the free parameters at ``x``."""
        known = self._known().rank  # by the last solve, if that had to look
        if known is not None:
            return known
        columns = self._of_columns(False)
        return self.uncertainty().rank if columns is None else columns[1]

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {k: v for k, v in self.items() if k != "state"}
        return (type(self), (kept,))

    def __copy__(self) -> LeastSquaresResult:
        return self._of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LeastSquaresResult:
        # The state is never written to, and may lie in Legate's memory.
        return self._of({k: v if k == "state" else deepcopy(v, memo) for k, v in self.items()})

    def _of(self, values: dict[str, Any]) -> LeastSquaresResult:
        """A result of these values that knows the fit of this one."""
        made = type(self)(values)
        object.__setattr__(made, "_context", self._context and replace(self._context))
        return made

    def uncertainty(
        self, *, absolute_sigma: bool | None = None, sandwich: bool | None = None
    ) -> Uncertainty:
        """Covariance, standard errors, correlations, rank and null directions in one object.

        Parameters
        ----------
        absolute_sigma : bool, optional
            Whether the residuals are in units of their known standard deviations; otherwise the
            residual variance is estimated from the fit. The default is what the fit was told,
            False for `least_squares`.
        sandwich : bool, optional
            Whether to use the sandwich form, which stays valid where the scatter does not match
            the loss. The default is True for a robust loss and False otherwise.

        Returns
        -------
        Uncertainty
            With ``covariance``, ``stderr``, ``correlation``, ``rank``, ``null_space``, ``dof``,
            ``variance`` and ``held``.

        Raises
        ------
        ValueError
            If the result has no Jacobian to work with, or too many parameters for a matrix.
        """
        context = self._known()
        robust = context.loss is not None
        absolute = context.absolute_sigma if absolute_sigma is None else absolute_sigma
        use_sandwich = robust if sandwich is None else sandwich
        return _uncertainty.uncertainty(self._curvature(), absolute, use_sandwich)

    def covariance(
        self, *, absolute_sigma: bool | None = None, sandwich: bool | None = None
    ) -> np.ndarray:
        """Covariance matrix of the parameters.

        Parameters
        ----------
        absolute_sigma : bool, optional
            See `uncertainty`.
        sandwich : bool, optional
            See `uncertainty`.

        Returns
        -------
        ndarray, shape (n, n)
            Covariance; zero for held parameters, infinite for undetermined ones. Of complex
            parameters (2 n, 2 n): their real parts, then the imaginary ones.
        """
        return self.uncertainty(absolute_sigma=absolute_sigma, sandwich=sandwich).covariance

    def standard_errors(self, *, absolute_sigma: bool | None = None) -> np.ndarray:
        """Standard errors of the parameters, for large sparse problems too.

        Parameters
        ----------
        absolute_sigma : bool, optional
            See `uncertainty`.

        Returns
        -------
        ndarray, shape (n,)
            Standard errors; zero for held parameters, infinite for undetermined ones.
        """
        absolute = self._known().absolute_sigma if absolute_sigma is None else absolute_sigma
        columns = self._of_columns(absolute)
        if columns is not None:
            return columns[0]
        c = self._curvature()
        if hasattr(c.rows, "tocsr") and c.rows.shape[1] > _uncertainty.DENSE_PARAMETERS:
            free = int((~c.held).sum())
            variance = 1.0 if absolute else 2.0 * c.cost / (c.m - free)
            return _uncertainty.sparse_standard_errors(c.rows, c.held, variance)
        return self.uncertainty(absolute_sigma=absolute_sigma).stderr

    def confidence_intervals(self, level: float = 0.95, *, method: str = "profile") -> np.ndarray:
        """Confidence intervals of the parameters.

        Parameters
        ----------
        level : float, optional
            Coverage, between 0 and 1.
        method : {'profile', 'linear'}, optional
            'profile' refits the other parameters along each one and follows the cost itself;
            'linear' is the symmetric interval of the standard error, with Student's t.

        Returns
        -------
        ndarray, shape (n, 2)
            Lower and upper ends; infinite where the data set no end.

        Raises
        ------
        ValueError
            If ``level`` or ``method`` is not one of the above.
        """
        from scipy.special import stdtrit

        if not 0.0 < level < 1.0:
            raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
        if method not in ("profile", "linear"):
            raise ValueError(f"`method` must be 'profile' or 'linear', got {method!r}.")
        context = self._known()
        u = self.uncertainty(sandwich=None if method == "linear" else False)
        dof = 1e15 if context.absolute_sigma else u.dof
        quantile = float(stdtrit(dof, 0.5 + 0.5 * level)) if dof > 0 else math.inf
        x = to_numpy(self.x)
        x = np.concatenate([x.real, x.imag]) if np.iscomplexobj(x) else x.astype(float)
        if method == "linear" or not math.isfinite(quantile):
            half = quantile * u.stderr
            return np.stack([x - half, x + half], axis=1)
        if hasattr(self["jac"], "copy"):
            self["jac"] = self["jac"].copy()  # the refits may fill the same matrix
        return np.array(
            [
                _uncertainty.profile_interval(
                    self._cost_at, x, self.cost, u, j, quantile, context.lb[j], context.ub[j]
                )
                for j in range(x.shape[0])
            ]
        )

    def summary(self, *, correlation: float = 0.9) -> str:
        """A report: parameters with standard errors, fit quality, correlations, why it stopped.

        Parameters
        ----------
        correlation : float, optional
            Correlations at least this large in absolute value are listed.

        Returns
        -------
        str
            Lines of text; ``print(result)`` shows the same.
        """
        from ._report import report

        return report(self, correlation)

    def __str__(self) -> str:
        if self.get("x") is None or self._context is None:
            return str(super().__repr__())
        return self.summary()

    def _known(self) -> Context:
        context: Context | None = self._context
        if context is None:
            raise ValueError("This result does not know its fit any more: it was unpickled.")
        return context

    def _cost_at(self, j: int, value: float, start: np.ndarray) -> tuple[float, np.ndarray]:
        """Cost and parameters of the fit with parameter j held at a value."""
        context = self._known()
        if context.refit is None:
            raise ValueError("Profile intervals need the residual function, which is not known.")
        fixed = context.held.copy()
        fixed[j] = True
        x = np.clip(start, context.lb, context.ub)
        x[j] = value
        return context.refit(x, fixed)

    def _of_columns(self, absolute: bool) -> tuple[np.ndarray, int] | None:
        """Standard errors and rank of a wide problem that stays in Legate's memory, else None."""
        context = self._known()
        found = None if context.columns is None else context.columns()
        if found is None:
            return None
        columns, scores = found
        c = Curvature(None, None, context.m, self.cost, context.held, scores)
        return _uncertainty.of_columns(columns, c, absolute)

    def _curvature(self) -> Curvature:
        """Rows, weights and counts at the solution, on the host."""
        context = self._known()
        if context.curvature is not None:
            return context.curvature
        found = None if context.reduced is None else context.reduced()
        if found is not None:
            rows, raw = found
            ones = None if raw is None else np.ones(raw.shape[0])
            context.curvature = Curvature(rows, None, context.m, self.cost, context.held, ones, raw)
            return context.curvature
        J, fun = (self.jac, self.fun) if context.real is None else context.real
        gram = context.gram
        if J is None and gram is None:
            raise ValueError("The result has no Jacobian: the covariance is not known.")
        if J is not None and hasattr(J, "rmatvec") and not hasattr(J, "tocsr"):
            J = J @ np.eye(J.shape[1])
        if J is not None and not hasattr(J, "tocsr"):
            J = to_numpy(J)
        scores = raw = None
        if context.loss is not None and fun is not None and J is not None:
            own = isinstance(context.loss.rho, UserLoss)  # it may compute with cuPyNumeric
            r = to_numpy(fun) if is_numpy(context.xp) and not own else fun
            xp = array_namespace(r)
            raw, scores = J, to_numpy(context.loss.scores(xp, r))
            w = to_numpy(context.loss.curvature_weights(xp, r))
            J = J.multiply(w[:, None]) if hasattr(J, "tocsr") else J * w[:, None]
        return Curvature(
            rows=J.tocsr() if hasattr(J, "tocsr") else J,
            gram=None if gram is None else to_numpy(gram),
            m=context.m,
            cost=self.cost,
            held=context.held,
            scores=scores,
            raw_rows=raw,
        )
