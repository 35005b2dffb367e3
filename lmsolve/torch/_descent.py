"""The damped iteration for networks: uniform damping, geodesic acceleration.

At x a step minimises `1/2 |r + J p|^2 + 1/2 mu s |p|^2` with s the mean square of J's columns, and
is then bent along the residuals' own curvature (M. Transtrum, J. Sethna 2012, "Improvements to the
Levenberg-Marquardt algorithm for nonlinear least-squares minimization", section 4):

    a = -1/2 (J'J + mu s)^-1 J' r_pp,      r_pp = d^2/dt^2 r(x + t p) at 0,

provided it is the smaller part, 2 |a| <= BENT |p|; otherwise the damping is raised. The damping
follows the gain ratio (H. B. Nielsen 1999, "Damping parameter in Marquardt's method", eq. 3.4).

It is not the iteration of `least_squares`, whose scales are the norms of J's columns: the valleys
of networks are narrow, long and curved in all parameters at once. On the sinc problem (61
parameters, 2,000 points, 1,200 trials, five seeds) mean squared errors end between 5e-9 and 1e-5
there, between 5e-9 and 2e-8 with uniform damping and at a median of 6e-12 with both.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

#: A step is accepted from this gain ratio on.
ACCEPT = 1e-4
#: Largest acceleration, relative to the step; better than 0.75 and 1.5 on the sinc problem.
BENT = 0.5
#: First damping of residuals and of losses (whose curvature is not constant: a dozen trials less on
#: small images), and where no damping helps any more.
START, START_LOSS, HOPELESS = 1e-3, 1.0, 1e15

CALLBACK, LIMIT, GTOL, FTOL, XTOL = -2, 0, 1, 2, 3
STALLED = -3


class Linearisation(Protocol):
    """What the iteration asks of a network at one point.

    Vectors (n,) are the linearisation's own affair: the iteration hands them back as it got them,
    so that they may stay where the linear algebra is. Scalars are floats or 0-d.
    """

    size: float  # mean square of the columns of J

    def steepest(self) -> float:
        """Largest magnitude of the gradient's components."""
        ...

    def solve(self, damping: float) -> Any:
        """Step p of absolute damping; LinAlgError where the system is not positive definite."""
        ...

    def length(self, v: Any) -> float:
        """Norm of a vector."""
        ...

    def moved(self, p: Any, a: Any | None) -> Any:
        """The trial point: a step and its acceleration from here."""
        ...

    def reduction(self, p: Any) -> Any:
        """Decrease of the model by the step of the last `solve`."""
        ...

    def acceleration(self, p: Any) -> Any | None:
        """Geodesic acceleration of the step of the last `solve`, None where there is none."""
        ...


class FitProblem(Protocol):
    """What the iteration asks of a network on a batch."""

    def residual(self, x: Any) -> Any:
        """Evaluate at x (n,); a handle."""
        ...

    def cost(self, r: Any) -> Tensor:
        """0-d cost of a handle."""
        ...

    def linearize(self, x: Any, r: Any, damping: float) -> Any:
        """A `Linearisation` at an accepted x, good for relative dampings like this one."""
        ...


class FitState(NamedTuple):
    """State of a fit after a trial; immutable. `point` is recomputed by `resume`, never saved."""

    x: Any  # (n,), a Tensor or where the problem has its vectors
    cost: float
    mu: float = START
    nu: float = 2.0
    nfev: int = 1
    njev: int = 0
    nit: int = 0
    accepted: bool = True
    ratio: float = 1.0
    length: float = math.inf
    status: int | None = None
    point: tuple[Any, Linearisation | None] | None = None


class Descent:
    """The step-wise solver: tolerances, and no state of its own.

    A tolerance of zero turns its test off.
    """

    def __init__(self, ftol: float = 0.0, xtol: float = 0.0, gtol: float = 0.0) -> None:
        self.ftol, self.xtol, self.gtol = ftol, xtol, gtol

    def init(self, problem: FitProblem, x0: Any, mu: float = START) -> FitState:
        """State at the start; ValueError if the cost is not finite there."""
        r = problem.residual(x0)
        cost = float(problem.cost(r))
        if not math.isfinite(cost):
            raise ValueError(f"The cost must be finite at the start, got {cost}.")
        return FitState(x=x0, cost=cost, mu=mu, point=(r, None))

    def resume(self, problem: FitProblem, state: FitState) -> FitState:
        """The state on new data, or from a checkpoint: damping carries over, the cost does not."""
        r = problem.residual(state.x)
        return state._replace(cost=float(problem.cost(r)), point=(r, None), status=None)

    def step(self, problem: FitProblem, state: FitState) -> FitState:
        """The state after one trial."""
        assert state.point is not None
        r, sub = state.point
        if sub is None:
            sub = problem.linearize(state.x, r, state.mu)
            state = state._replace(njev=state.njev + 1, point=(None, sub))
            steepest = sub.steepest()
            if not math.isfinite(steepest):
                return state._replace(status=STALLED, accepted=False)
            if steepest <= self.gtol * math.sqrt(2 * abs(state.cost) * sub.size):
                return state._replace(status=GTOL, accepted=False)
        return self._trial(problem, state, sub)

    def _trial(self, problem: FitProblem, state: FitState, sub: Linearisation) -> FitState:
        try:
            p = sub.solve(state.mu * sub.size)
        except np.linalg.LinAlgError:
            return self._rejected(state, -math.inf, math.inf)
        length = sub.length(p)  # a host read, as all floats here: they steer
        a = sub.acceleration(p)
        evaluated = 1
        if a is not None:
            evaluated = 2
            if not 2.0 * sub.length(a) <= BENT * length:
                return self._rejected(state._replace(nfev=state.nfev + 1), -math.inf, length)
        x_new = sub.moved(p, a)
        r_new = problem.residual(x_new)
        cost_new, predicted = float(problem.cost(r_new)), float(sub.reduction(p))
        actual = state.cost - cost_new if math.isfinite(cost_new) else -math.inf
        ratio = actual / predicted if predicted > 0 else -math.inf
        state = state._replace(nfev=state.nfev + evaluated)
        status = None
        if max(abs(actual), predicted) < self.ftol * state.cost and ratio <= 2.0:
            status = FTOL
        elif length < self.xtol * sub.length(state.x):
            status = XTOL
        if not ratio > ACCEPT:
            return self._rejected(state, ratio, length)._replace(status=status)
        return state._replace(
            x=x_new,
            cost=cost_new,
            mu=max(state.mu * max(1 / 3, 1 - (2 * ratio - 1) ** 3), least_damping(p.numel())),
            nu=2.0,
            nit=state.nit + 1,
            accepted=True,
            ratio=ratio,
            length=length,
            status=status,
            point=(r_new, None),
        )

    def _rejected(self, state: FitState, ratio: float, length: float) -> FitState:
        """The state with more damping."""
        hopeless = state.mu > HOPELESS
        return state._replace(
            mu=state.mu if hopeless else state.mu * state.nu,
            nu=2.0 * state.nu,
            accepted=False,
            ratio=ratio,
            length=length,
            status=STALLED if hopeless else None,
        )


def least_damping(n: int) -> float:
    """Damping that rounding in the sums of J'J, in float64, still leaves visible."""
    return n * torch.finfo(torch.float64).eps
