"""The trust radius: plain floats in, plain floats out.

A step q in scaled space is confined to ``|q| <= radius``; the damping mu of the step is the
multiplier of that constraint. The radius follows the gain ratio

    rho = (cost(x) - cost(x + p)) / (model decrease of p),

by the rules of J. J. More (1978), "The Levenberg-Marquardt algorithm: implementation and theory",
section 4: a poor step shrinks it by interpolation, a good one sets it to twice the step.
"""

from __future__ import annotations

from typing import NamedTuple

#: A step is accepted from this gain ratio on (More 1978, section 5).
ACCEPT = 1e-4
POOR, GOOD = 0.25, 0.75


class Damping(NamedTuple):
    """Trust radius in scaled space and the multiplier mu of the last step."""

    radius: float
    mu: float = 0.0

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
