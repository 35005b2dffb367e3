"""The same iteration for a handful of parameters, in Python floats.

A NumPy call costs half a microsecond whatever its length, and one trial of `_lm` makes some forty
of them; with n = 3 parameters the arithmetic behind them is a few dozen multiplications. Here the
n-sized work of dense, plain least squares (no bounds, no loss) is done on lists of floats, which
takes 8 us a trial instead of 60 (n = 3, 100 residuals). Policies and constants are those of `_lm`.

`descend` goes on while nothing unusual happens, and hands the state to the general solver where
something does: an ill-conditioned or singular system, a NaN, a polish of more than one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg.blas import ddot
from scipy.linalg.lapack import dposv

from ._damping import ACCEPT, POOR, Damping, interpolated
from ._lm import (
    BOTH,
    DIFFERENCE_ERROR,
    FADE,
    FTOL,
    GTOL,
    POLISHED,
    VANISHING,
    WEIGHT,
    XTOL,
    LevenbergMarquardt,
    Point,
    difference_share,
    first_radius,
)
from ._problem import Problem
from ._state import LMState
from ._subproblem import ESCALATE, NormalEquations, Rows
from ._trust import ITERATIONS

#: Beyond this many parameters LAPACK is faster (measured: the curves cross at n = 7).
PARAMETERS = 6

Vector = list[float]
Factor = list[Vector]


def cholesky(A: list[Vector], b: Vector, mu: float) -> tuple[Factor, Vector] | None:
    """Lower factor L of A + mu I, rows of growing length, and y = L^-1 b.

    None if a pivot falls below ESCALATE. Only the lower triangle of A is read.
    """
    L: Factor = []
    y: Vector = []
    for row, s_b in zip(A, b):
        Li: Vector = []
        for Lj, s in zip(L, row):
            for u, v in zip(Li, Lj):
                s -= u * v
            s /= Lj[-1]
            Li.append(s)
        s = row[-1] + mu
        for u, v in zip(Li, y):
            s -= u * u
            s_b -= u * v
        if not s > ESCALATE:
            return None
        s = math.sqrt(s)
        Li.append(s)
        L.append(Li)
        y.append(s_b / s)
    return L, y


def back(L: Factor, y: Vector) -> Vector:
    """Solution of L' q = y."""
    q = y[:]
    for i in range(len(y) - 1, -1, -1):
        Li = L[i]
        qi = q[i] = q[i] / Li[-1]
        for j in range(i):
            q[j] -= Li[j] * qi
    return q


def forward(L: Factor, b: Vector) -> Vector:
    """Solution of L y = b."""
    y: Vector = []
    for Li, s in zip(L, b):
        for u, v in zip(Li, y):
            s -= u * v
        y.append(s / Li[-1])
    return y


def dot(a: Vector, b: Vector) -> float:
    """Inner product."""
    s = 0.0
    for u, v in zip(a, b):
        s += u * v
    return s


class Trial(NamedTuple):
    """A step q with its length, damping, slope b'q < 0 of the cost and predicted decrease."""

    q: Vector
    length: float
    mu: float
    slope: float
    predicted: float


def damped(A: list[Vector], b: Vector, radius: float) -> Trial | None:
    """The step within the radius (see `_trust`); None if the system is ill-conditioned.

    A is the scaled normal matrix, lower triangle, and b the negative scaled gradient.
    """
    found = cholesky(A, b, 0.0)
    if found is None:
        return None
    L, y = found
    q = back(L, y)
    length, decrease = math.sqrt(dot(q, q)), dot(y, y)
    if length <= 1.1 * radius:  # undamped: b'q = |y|^2, twice the decrease of the model
        return Trial(q, length, 0.0, -decrease, 0.5 * decrease)
    lo, hi, mu = 0.0, math.sqrt(dot(b, b)) / radius, 0.0
    for _ in range(ITERATIONS):
        v = forward(L, q)
        newton = mu + (length / radius - 1.0) * length * length / dot(v, v)
        if length > radius:
            lo = max(lo, mu)
        else:
            hi = min(hi, mu)
        mu = min(max(newton, lo), max(hi, lo))
        found = cholesky(A, b, mu)
        if found is None:
            return None
        L, y = found
        q = back(L, y)
        length = math.sqrt(dot(q, q))
        if abs(length - radius) <= 0.1 * radius:
            break
    if length > radius:
        q = [radius / length * v for v in q]
        length = radius
    slope = -dot(b, q)
    return Trial(q, length, mu, slope, -slope - 0.5 * product(A, q))


def product(A: list[Vector], q: Vector) -> float:
    """q'A q from the lower triangle of A."""
    s = 0.0
    for row, qi in zip(A, q):
        t = -0.5 * row[-1] * qi
        for u, v in zip(row, q):
            t += u * v
        s += qi * t
    return 2.0 * s


def first_scale(norms: Vector, x: Vector) -> Vector:
    """Column norms at the start, none below its share of WEIGHT; the twin of the one in `_lm`."""
    size = [abs(v) for v in x]
    fill = min([1.0, *(v for v in size if v > 0.0)])
    size = [v or fill for v in size]
    heaviest = WEIGHT * max(v * s for v, s in zip(norms, size))
    return [max(v, heaviest / s) for v, s in zip(norms, size)]


class Linearisation:
    """J'J and J'r at one point; the scaled lists of `damped` are made when they are asked for."""

    __slots__ = ("D", "G", "_scaled", "g", "gradient", "norms", "usable")

    def __init__(self, J: np.ndarray, r: np.ndarray, scale: Vector | None, x: np.ndarray) -> None:
        self.G = J.T.dot(J)
        self.gradient = J.T.dot(r)
        self.g: Vector = self.gradient.tolist()
        self.norms = norms = [math.sqrt(v) for v in self.G.diagonal().tolist()]
        if scale is None:
            self.D = first_scale(norms, x.tolist())
        else:
            self.D = [v if v > FADE * s else FADE * s for s, v in zip(scale, norms)]
        self.usable = min(norms) > 0.0 and math.isfinite(sum(norms))  # a sum keeps a NaN
        self._scaled: tuple[list[Vector], Vector] | None = None

    def scaled(self) -> tuple[list[Vector], Vector]:
        """The scaled normal matrix, lower triangle, and the negative scaled gradient."""
        if self._scaled is None:
            D = self.D
            A = [
                [v / (Di * Dj) for v, Dj in zip(row[: i + 1], D)]
                for i, (row, Di) in enumerate(zip(self.G.tolist(), D))
            ]
            self._scaled = A, [-gi / Di for gi, Di in zip(self.g, D)]
        return self._scaled

    def is_flat(self, threshold: float) -> bool:
        """Whether |g_j| <= threshold |J_j| for every column j."""
        return all(abs(gi) <= threshold * v for gi, v in zip(self.g, self.norms))

    def gauss_newton(self, radius: float) -> tuple[np.ndarray, float, float] | None:
        """Step p (n,), |D p| and the model decrease, if it ends in the radius; else None.

        Cholesky's factor is as accurate without the scaling as with it (van der Sluis 1969), so
        one call of LAPACK on J'J does; its pivots are judged by the scaled ones.
        """
        L, p, info = dposv(self.G, self.gradient, lower=1)
        if info != 0:
            return None
        for v, norm in zip(L.diagonal().tolist(), self.norms):
            if v * v < ESCALATE * norm * norm:
                return None
        length = decrease = 0.0
        for pi, gi, Di in zip(p.tolist(), self.g, self.D):
            decrease += pi * gi
            length += (pi * Di) * (pi * Di)
        length = math.sqrt(length)
        if not length <= 1.1 * radius:
            return None
        return -p, length, 0.5 * decrease


class Descent:
    """A run in floats, from an unlinearised state to an ended one or to an unusual one."""

    def __init__(
        self,
        solver: LevenbergMarquardt,
        problem: Problem,
        state: LMState,
        record: Callable[..., None],
    ) -> None:
        self.solver, self.problem, self.record = solver, problem, record
        self.state = state
        self.x, self.r, self.cost = state.x, state.point.residual, state.cost
        self.damping = state.damping
        self.nfev, self.njev, self.nit = state.nfev, state.njev, state.nit
        self.fired, self.value, self.limit = state.fired, 0.0, 0.0
        self.scale = None if state.scale is None else state.scale.tolist()
        self.polished = 0
        self.size = 0.0
        self.trail: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    def run(self) -> LMState:
        """The state at which the run ended, or at which the general solver is to go on."""
        problem, solver = self.problem, self.solver
        while True:
            J = problem.jacobian(self.x, self.r)
            if type(J) is not np.ndarray or J.shape[0] < J.shape[1]:
                problem.reuse(J)
                return self._state()
            self.njev += 1
            lin = Linearisation(J, self.r, self.scale, self.x)
            if not lin.usable:
                return self._general(J, lin)
            self.scale = lin.D
            if self.damping.radius == 0.0:
                self._first_radius(lin.D)
            if self.cost == 0.0 or lin.is_flat(solver.gtol * math.sqrt(2.0 * self.cost)):
                if self.cost == 0.0 or lin.is_flat(0.0):
                    return self._ended(J, lin, GTOL)
                if not self.fired:
                    self._gradient_fired(lin)
            moved = self._polish(lin) if self.fired else self._trials(lin)
            if moved is None:
                return self._general(J, lin)
            if not moved:
                return self._ended(J, lin, self.fired)

    def _gradient_fired(self, lin: Linearisation) -> None:
        rnorm = math.sqrt(2.0 * self.cost)
        cosine = max(abs(gi) / v for gi, v in zip(lin.g, lin.norms)) / rnorm
        self.fired, self.value, self.limit = GTOL, cosine, self.solver.gtol

    def _first_radius(self, D: Vector) -> None:
        self.size = math.sqrt(sum((v * Di) ** 2 for v, Di in zip(self.x.tolist(), D)))
        self.damping = Damping(first_radius(self.size, self.cost))

    def _trials(self, lin: Linearisation) -> bool | None:
        """Trials at one x until one is accepted: True; None leaves it to the general solver."""
        while True:
            if self.nfev >= self.solver.max_nfev:
                return None
            undamped = lin.gauss_newton(self.damping.radius)
            if undamped is not None:
                step, length, predicted = undamped
                mu, slope = 0.0, -2.0 * predicted
            else:
                trial = damped(*lin.scaled(), self.damping.radius)
                if trial is None:
                    return None
                q, length, mu, slope, predicted = trial
                step = np.array([v / Di for v, Di in zip(q, lin.D)])
            damping = self.damping.first(length) if self.nfev == 1 else self.damping
            x_new = self.x + step
            r_new, cost_new = self._evaluate(x_new)
            actual = self.cost - cost_new if math.isfinite(cost_new) else -math.inf
            ratio = actual / predicted if predicted > 0 else 0.0
            shrink = interpolated(actual, slope, self.cost, cost_new) if ratio <= POOR else 1.0
            self.damping = Damping(damping.radius, mu).updated(ratio, length, shrink)
            accepted = ratio > ACCEPT
            old_cost = self.cost
            if accepted:
                self.x, self.r, self.cost = x_new, r_new, cost_new
                self.nit += 1
            self.record(self.nfev, self.nit, self.cost, accepted, ratio, *self.damping, length)
            self._tests(lin.D, length, ratio, actual, predicted, old_cost)
            if accepted:
                return True
            if self.fired:
                return None

    def _evaluate(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        r = self.problem.residual(x)
        self.nfev += 1
        return r, 0.5 * ddot(r, r)  # BLAS itself: NumPy would warn of a trial that overflows

    def _tests(
        self,
        D: Vector,
        length: float,
        ratio: float,
        actual: float,
        predicted: float,
        old_cost: float,
    ) -> None:

        solver = self.solver
        decrease = max(abs(actual), predicted)
        flat = decrease <= solver.ftol * old_cost and ratio <= 2.0
        short = min(length, self.damping.radius)
        if not flat and short > 100.0 * solver.xtol * self.size:
            return  # far from both
        size = self.size = math.sqrt(sum((v * Di) ** 2 for v, Di in zip(self.x.tolist(), D)))
        reach = solver.xtol * size
        if short <= reach and solver.xtol:
            self.fired = BOTH if flat else XTOL
            self.value, self.limit = (short / size if size else 0.0), solver.xtol
        elif flat:
            self.fired, self.value, self.limit = FTOL, decrease / old_cost, solver.ftol

    def _polish(self, lin: Linearisation) -> bool | None:
        """One undamped step: True if taken, False if there is no need, None if unusual."""

        if not self.solver.polish:
            return False
        undamped = lin.gauss_newton(math.inf)
        if undamped is None:
            return None
        step, _, predicted = undamped
        p, D, x = step.tolist(), lin.D, self.x.tolist()
        rnorm = math.sqrt(2.0 * self.cost)
        change = max(abs(pj) / (abs(xj) + 1e-4 * rnorm / Dj) for pj, xj, Dj in zip(p, x, D))
        error = self.problem.derivative_error()
        if error:
            found = cholesky(*lin.scaled(), 0.0)
            if found is None:
                return None
            pivot = min(row[-1] for row in found[0]) ** 2
            smallest = min(abs(xj) * Dj for xj, Dj in zip(x, D))
            noise = rnorm * difference_share(self.r.shape[0])
            if error * noise > DIFFERENCE_ERROR * pivot * smallest:
                return None
        target = POLISHED if predicted <= self.solver.ftol * self.cost else VANISHING
        if change <= max(target, error, 8.0 * 2.0**-52):
            return False
        if (
            self.polished
            or self.nfev >= self.solver.max_nfev
            or predicted > self.solver.ftol * self.cost
        ):
            return None
        x_new = self.x + step
        r_new, cost_new = self._evaluate(x_new)
        size = math.sqrt(sum((xj * Dj) ** 2 for xj, Dj in zip(x, lin.norms)))
        noise = 8.0 * 2.0**-52 * (self.cost + rnorm * size)
        accepted = cost_new <= self.cost + noise
        ratio = (self.cost - cost_new) / predicted if predicted > 0 else 1.0
        if accepted:
            self.trail = ((self.x, step),)
            self.x, self.r, self.cost = x_new, r_new, cost_new
            self.nit += 1
            self.polished = 1
        self.record(self.nfev, self.nit, self.cost, accepted, ratio, *self.damping, change, True)
        self.length = change
        return accepted

    def _state(self) -> LMState:
        """The state in the solver's terms, without its linearisation."""

        last = getattr(self, "length", math.inf)
        return LMState(
            self.x,
            self.cost,
            None if self.scale is None else np.array(self.scale),
            self.damping,
            self.nfev,
            self.njev,
            self.nit,
            length=last,
            fired=self.fired,
            value=self.value,
            limit=self.limit,
            polished=self.polished,
            trail=self.trail,
            point=Point(self.r),
        )

    def _general(self, J: np.ndarray, lin: Linearisation) -> LMState:
        """The state for the general solver, linearised."""

        state = self._state()
        if not lin.usable:
            self.problem.reuse(J)
            return state._replace(njev=self.njev - 1)  # the general solver counts it again
        D = np.array(lin.D)
        sub = NormalEquations(np, lin.G, lin.gradient, Rows(np, J, self.r))
        return state._replace(
            linearized=True,
            point=Point(self.r, sub, D, 1.0 / D, None),
        )

    def _ended(self, J: np.ndarray, lin: Linearisation, status: int) -> LMState:
        state = self._general(J, lin)
        return state._replace(status=status, limit=self.limit or self.solver.gtol)
