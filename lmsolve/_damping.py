"""The trust radius and the damping: plain floats in, plain floats out.

Both follow the gain ratio of a trial,

    rho = (cost(x) - cost(x + p)) / (model decrease of p).

With few parameters the radius leads: a step q in scaled space is confined to ``|q| <= radius``,
and mu is the multiplier of that constraint. J. J. More (1978), "The Levenberg-Marquardt algorithm:
implementation and theory", section 4: a poor step shrinks the radius by interpolation, a good one
sets it to twice the step.

With many, of which the data leave some directions all but open (the gauge of a reconstruction, the
redundant weights of a network), mu leads and the radius is infinite: H. B. Nielsen (1999), "Damping
parameter in Marquardt's method". Those directions would fill up any radius, however good the last
step was; and one factorisation makes a trial.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: A step is accepted from this gain ratio on (More 1978, section 5).
ACCEPT = 1e-4
#: Below the one a step is poor, from the other on it is good.
POOR, GOOD = 0.25, 0.75
#: From this many parameters on mu leads, if a squared pivot of the scaled normal matrix falls short
#: of OPEN. A reconstruction of 15,450 parameters takes 6 evaluations then instead of 13; where all
#: is determined the radius is faster (5 evaluations instead of 14 on a discrete boundary value).
LARGE, OPEN = 64, 1e-8
#: Where it starts, in units of the squared column norms, and how fast it may fall.
FIRST, FALL = 1e-4, 1.0 / 3.0


class Damping(NamedTuple):
    """Trust radius in scaled space, mu, and the factor by which the next rejection raises mu.

    An infinite radius leaves the lead to mu.
    """

    radius: float
    mu: float = 0.0
    rise: float = 2.0

    def first(self, length: float) -> Damping:
        """After the first solve: a radius beyond the first step says nothing about the model."""
        return self._replace(radius=min(self.radius, length))


def updated(radius: float, mu: float, ratio: float, length: float, shrink: float) -> Damping:
    """After a trial of gain ``ratio`` and scaled ``length``; ``shrink`` from `interpolated`."""
    if ratio <= POOR:
        return Damping(shrink * min(radius, 10.0 * length), mu / shrink)
    if mu == 0.0 or ratio >= GOOD:
        return Damping(2.0 * length, 0.5 * mu)
    return Damping(radius, mu)


def eased(mu: float, rise: float, ratio: float) -> Damping:
    """After a trial of gain ``ratio`` where mu leads (Nielsen 1999, eq. 2.4)."""
    if ratio > ACCEPT:
        return Damping(math.inf, mu * max(FALL, 1.0 - (2.0 * min(ratio, 2.0) - 1.0) ** 3))
    return Damping(math.inf, mu * rise, 2.0 * rise)


def interpolated(actual: float, slope: float, cost: float, cost_new: float) -> float:
    """Factor in [0.1, 0.5] by which a poor step shrinks the radius.

    The minimiser of the parabola through the cost at both ends with the directional derivative
    ``slope = g'p < 0`` at the start (More 1978, section 4).
    """
    if not cost_new < 100.0 * cost:  # also NaN and inf
        return 0.1
    if actual >= 0.0:
        return 0.5
    # cost(t) ~ cost + slope t + (-actual - slope) t^2; its minimum lies at:
    return min(0.5, max(0.1, 0.5 * slope / (slope + actual)))
