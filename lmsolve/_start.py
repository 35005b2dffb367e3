"""Where a run starts: the cost there, the first scale of the parameters, the first trust radius."""

from __future__ import annotations

import math

from ._xp import Array, Namespace

#: At the start no parameter weighs less than this share of the weightiest, where a column norm
#: times the size of its parameter is the weight. Otherwise the first steps throw a parameter that
#: happens to have no influence there (the rate of a term that has died out) to infinity. Solves 7
#: more of the 120 runs of More, Garbow and Hillstrom (109, from 102) with half the evaluations;
#: 0.05 to 0.3 do about as well.
WEIGHT = 0.1
#: Only up to this many parameters: with more, some of them start near zero by chance (weights of
#: a network, coordinates of points), and the rule would hold those where they are.
WEIGHTED_PARAMETERS = 32
#: The first trust radius is this share of the scaled length of x0. With the whole of it 108 of
#: those 120 end at the solution instead of 110, and NIST's sets take 1.7 times the evaluations;
#: 0.2 to 0.4 do about as well. A parameter that is alone keeps the whole.
SHARE = 0.3


def finite_cost(cost: float) -> float:
    """The cost at x0; ValueError if it is not finite."""
    if not math.isfinite(cost):
        raise ValueError(f"The cost must be finite at `x0`, got {cost}.")
    return cost


def first_radius(length: float, cost: float, n: int) -> float:
    """First trust radius: a share of the scaled length of x0, or |r| at a start at zero.

    Both are in the unit of D x, that of the residuals.
    """
    share = 1.0 if n == 1 else SHARE
    return share * length if 0.0 < length < math.inf else math.sqrt(2.0 * cost) or 1.0


def first_scale(xp: Namespace, norms: Array, x: Array) -> Array:
    """Column norms (n,) at the start x (n,), none of them below its share of WEIGHT."""
    if x.shape[0] > WEIGHTED_PARAMETERS:
        return norms
    size = xp.abs(x)
    one = xp.ones_like(size)
    # A parameter that starts at zero counts as the smallest of the others, or as 1.
    size = xp.where(size > 0, size, xp.min(xp.where(size > 0, size, one)) * one)
    size = size / xp.max(size)
    return xp.maximum(norms, WEIGHT * xp.max(norms * size) / size)
