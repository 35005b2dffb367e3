"""The result of many fits, and what it says of each."""

from __future__ import annotations

import numpy as np
from scipy.optimize import OptimizeResult

from ._batched_lm import NOT_FINITE, STUCK, Ended, invert
from ._batched_model import Model
from ._xp import Array, Namespace, array_namespace

MESSAGES = {
    4: "`ftol` and `xtol` reached: cost and parameters no longer change.",
    3: "`xtol` reached: the parameters no longer change.",
    2: "`ftol` reached: the cost no longer changes.",
    1: "`gtol` reached: the gradient is zero to the tolerance.",
    0: "`max_nit` reached before convergence.",
    NOT_FINITE: "Residuals or derivatives are not finite.",
    STUCK: "No step lowers the cost, though the gradient is not zero: check the derivatives.",
}


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
        -3 not finite, -5 no step lowers the cost.
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
            fit whose ``J' J`` is singular, or whose scale is not known because dof <= 0. With a
            robust loss the sandwich ``inv(H) (J' diag(rho' r)**2 J) inv(H)``, times
            ``m / dof``, H being the curvature of the cost (Huber 1981, section 6.3), as in
            single fits.
        """
        xp = array_namespace(self.x)
        robust = self._scatter is not None
        gram = self._scatter[0] if robust else self.gram
        with np.errstate(all="ignore"):
            inverse, regular = invert(xp, xp.permute_dims(gram, (1, 2, 0)))
        inverse = xp.permute_dims(inverse, (2, 0, 1))
        dof = xp.where(self.dof > 0, self.dof, 1.0)
        if robust:
            inverse = inverse @ self._scatter[1] @ inverse
            scale = (self.dof + self.x.shape[1]) / dof
        else:
            scale = 2 * self.cost / dof
        if robust or not self._absolute_sigma:
            inverse = inverse * scale[:, None, None]
            regular = regular & (self.dof > 0)
        return xp.where(regular[:, None, None], inverse, xp.inf)

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


def as_result(
    xp: Namespace, model: Model, fits: Ended, dof: Array, absolute_sigma: bool
) -> ManyFitsResult:
    """The result, with the fits on the first axis."""
    active = xp.zeros_like(fits.x)
    if model.lower is not None:
        active = xp.where(fits.x >= model.upper, 1.0, xp.where(fits.x <= model.lower, -1.0, active))
    finite = xp.isfinite(xp.sum(fits.gram, axis=(0, 1))) & xp.isfinite(fits.cost)
    status = xp.where((fits.status == STUCK) & ~finite, NOT_FINITE, fits.status)
    scatter = tuple(xp.permute_dims(a, (2, 0, 1)) for a in (fits.curvature, fits.squares))
    return ManyFitsResult(
        x=_fits_first(xp, fits.x),
        cost=fits.cost,
        grad=_fits_first(xp, fits.grad),
        gram=xp.permute_dims(fits.gram, (2, 0, 1)),
        active_mask=_fits_first(xp, xp.astype(active, fits.nit.dtype)),
        status=status,
        success=status > 0,
        nit=fits.nit,
        nfev=fits.nfev,
        njev=fits.njev,
        dof=dof,
        _absolute_sigma=absolute_sigma,
        _scatter=None if model.loss is None else scatter,
    )


def _fits_first(xp: Namespace, a: Array) -> Array:
    """(n, B) as (B, n), contiguous."""
    return xp.stack([a[j, :] for j in range(a.shape[0])], axis=1)
