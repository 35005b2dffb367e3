"""Bounds as projections and zeros in the column scales.

A parameter on a bound whose gradient points outwards is held: its column scale d_j becomes zero,
which takes it out of every subproblem. A step that would leave the box is cut where it leaves: the
parameters that hit a bound move exactly onto it, and the others are solved for again with that
move given. This is a projected Levenberg-Marquardt method with an active set (C. Kanzow,
N. Yamashita, M. Fukushima 2004, "Levenberg-Marquardt methods with strong local convergence
properties for solving nonlinear equations with convex constraints"); at a solution with strict
complementarity the active set settles and the steps become those of the free problem.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._xp import Array, Namespace


class Box(NamedTuple):
    """Bounds lb <= x <= ub, arrays (n,) in the namespace of x; lb == ub fixes a parameter."""

    lb: Array
    ub: Array

    def clip(self, xp: Namespace, x: Array) -> Array:
        """x (n,) moved into the box."""
        return xp.minimum(xp.maximum(x, self.lb), self.ub)

    def enter(self, xp: Namespace, x: Array, epsilon: float) -> Array:
        """x (n,) moved into the box, and onto a bound that it differs from by rounding."""
        near = 4.0 * epsilon * xp.abs(x)
        lower = xp.where(xp.abs(x - self.lb) <= near, self.lb, x)
        return self.clip(xp, xp.where(xp.abs(x - self.ub) <= near, self.ub, lower))

    def outside(self, x: Array) -> Array:
        """Mask (n,) of the entries that leave the box."""
        return (x < self.lb) | (x > self.ub)

    def held(self, x: Array, grad: Array) -> Array:
        """Mask (n,) of parameters on a bound that the gradient (n,) presses against."""
        at_lower = (x <= self.lb) & (grad >= 0)
        at_upper = (x >= self.ub) & (grad <= 0)
        return at_lower | at_upper | (self.lb == self.ub)


def active_mask(
    x: np.ndarray, lb: np.ndarray, ub: np.ndarray, grad: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """-1 at a lower bound, 1 at an upper bound, 0 elsewhere; (n,) of int.

    A parameter that the gradient presses is at its bound from ``reach`` (n,) on: a run may end
    when what is left of the way to the bound is less than its tolerance for steps.
    """
    at_lower = (x <= lb) | ((x <= lb + reach) & (grad > 0))
    at_upper = (x >= ub) | ((x >= ub - reach) & (grad < 0))
    return np.where(at_lower, -1, np.where(at_upper, 1, 0))


def optimality(x: np.ndarray, grad: np.ndarray, lb: np.ndarray, ub: np.ndarray) -> float:
    """Max-norm of the gradient, each entry scaled by its way to the bound it points to.

    Coleman and Li (1996), "An interior trust region approach for nonlinear minimization subject
    to bounds", eq. 2.2: zero exactly at a point that satisfies the first-order conditions.
    """
    towards = np.where(grad < 0, ub - x, x - lb)
    way = np.where(np.isfinite(towards), towards, 1.0)
    return float(np.max(np.abs(grad * way), initial=0.0))
