"""The same iteration for a handful of parameters, in Python floats and single calls of LAPACK.

A NumPy call costs half a microsecond whatever its length, and one trial of `_lm` makes some forty
of them; with n = 3 parameters the arithmetic behind them is a few dozen multiplications. Here the
n-sized work of dense, plain least squares (no bounds, no loss) is done on lists of floats, which
takes 8 us a trial instead of 60 (n = 3, 100 residuals). Policies and constants are those of `_lm`.

`Descent` goes on while nothing unusual happens, and hands the state to the general solver where
something does: an ill-conditioned or singular system, a NaN, a polish of more than one step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg.blas import ddot
from scipy.linalg.lapack import dposv, dpotrs

from ._damping import ACCEPT, POOR, Damping, interpolated, updated
from ._factored import ESCALATE, Rows
from ._functions import ModelResidual, UserFunction
from ._history import Iteration, settled_reach
from ._lm import (
    DIFFERENCE_ERROR,
    FADE,
    POLISHED,
    VANISHING,
    LevenbergMarquardt,
    Point,
    difference_share,
)
from ._numdiff import plain_steps
from ._problem import Problem
from ._start import WEIGHT, finite_cost, first_radius
from ._state import LMState
from ._status import BOTH, FTOL, GTOL, XTOL
from ._subproblem import NormalEquations
from ._trust import CUT, ITERATIONS, SLACK
from ._xp import FLOAT, dot_itself, shares_memory

#: Beyond this many parameters LAPACK is faster (measured: the curves cross at n = 7).
PARAMETERS = 6

#: A Jacobian by differences is right to about one of their steps: it is not taken anew for the
#: last look at a converged fit if no parameter has moved by more than ten steps, this share of it.
REACH = 10.0 * 2.0**-26

FADE_SQUARED = FADE * FADE

Vector = list[float]


class Trial(NamedTuple):
    """A negative step -p (n,), |D p|, the damping, the slope g'p < 0 and the predicted decrease."""

    back: np.ndarray
    length: float
    mu: float
    slope: float
    predicted: float


def first_scale(weights: Vector, x: Vector) -> Vector:
    """Squared scale at the start, from squared column norms; the twin of the one in `_lm`."""
    sizes = [v * v for v in x]
    if 0.0 in sizes:
        fill = min([1.0, *[v for v in sizes if v > 0.0]])
        sizes = [v or fill for v in sizes]
    heaviest = WEIGHT * WEIGHT * max([w * s for w, s in zip(weights, sizes)])
    return [max(w, heaviest / s) for w, s in zip(weights, sizes)]


@lru_cache
def identity(n: int) -> np.ndarray:
    """The unit matrix (n, n), read-only."""
    made = np.eye(n)
    made.flags.writeable = False
    return made


class Linearisation:
    """J'J and J'r at one point, and the steps that they give.

    ``weights`` are the squared column norms and ``squares`` those of the scale D; ``steepest`` is
    the largest g_j^2 / |J_j|^2. The undamped step is -``back``, with ``square`` = |D p|^2 and
    ``slope`` = g'p. It is ``sound`` unless the system is ill-conditioned, singular or not finite.
    """

    __slots__ = (
        "G",
        "back",
        "factor",
        "g",
        "gradient",
        "pivots",
        "slope",
        "sound",
        "square",
        "squares",
        "steepest",
        "weights",
    )

    def __init__(self, J: np.ndarray, r: np.ndarray, scale: Vector | None, x: np.ndarray) -> None:
        T = J.T
        self.G = G = T.dot(J)
        self.gradient = gradient = T.dot(r)
        # Cholesky's factor is as accurate without the scaling as with it (van der Sluis 1969), so
        # one call of LAPACK does; its pivots are judged by the scaled ones.
        self.factor, self.back, info = dposv(G.copy().T, gradient.copy(), 1, 1, 1)  # in place
        self.g = g = gradient.tolist()
        self.weights = weights = G.diagonal().tolist()
        self.pivots = pivots = self.factor.diagonal().tolist()
        self.squares: Vector = []
        self.sound = info == 0
        if not self.sound:
            return
        if scale is None:
            scale = [s / FADE_SQUARED for s in first_scale(weights, x.tolist())]
        steepest = square = slope = 0.0
        for w, s, v, gj, pj in zip(weights, scale, pivots, g, self.back.tolist()):
            if not v * v >= ESCALATE * w:  # also NaN, which LAPACK takes for positive
                self.sound = False
                return
            s *= FADE_SQUARED
            if w > s:
                s = w
            self.squares.append(s)
            c = gj / w * gj
            if c > steepest:
                steepest = c
            slope -= pj * gj
            square += pj * pj * s
        self.steepest, self.slope, self.square = steepest, slope, square
        self.sound = square < math.inf

    def inverse(self) -> tuple[np.ndarray, float]:
        """(J'J)^-1 (n, n), and the smallest squared pivot of the scaled J'J."""
        pivot = min([v * v / w for v, w in zip(self.pivots, self.weights)])
        return dpotrs(self.factor, identity(len(self.g)), 1)[0], pivot

    def damped(self, radius: float) -> Trial | None:
        """The step of about the radius (see `_trust`); None if the system is ill-conditioned."""
        length, slope, factor, back = math.sqrt(self.square), self.slope, self.factor, self.back
        g, squares = self.g, np.array(self.squares)
        lo = mu = 0.0
        hi = math.sqrt(sum([gj * gj / s for gj, s in zip(g, self.squares)])) / radius
        for _ in range(ITERATIONS):
            w = squares * back
            secular = ddot(w, dpotrs(factor, w, 1)[0])
            if not secular:  # the step is so short that its square has underflowed
                return None
            newton = mu + (length / radius - 1.0) * length * length / secular
            if length > radius:
                lo = max(lo, mu)
            else:
                hi = min(hi, mu)
            mu = min(max(newton, lo), max(hi, lo))
            A = self.G.copy()
            for j, s in enumerate(self.squares):
                A[j, j] += mu * s
            factor, back, info = dposv(A.T, self.gradient.copy(), 1, 1, 1)
            if info:
                return None
            square = slope = 0.0
            for s, gj, pj in zip(self.squares, g, back.tolist()):
                slope -= pj * gj
                square += pj * pj * s
            length = math.sqrt(square)
            if -SLACK * radius <= length - radius <= CUT * radius:
                break
        # By (G + mu D^2) p = -g, the model p'G p / 2 needs no product with G.
        curvature = -slope - mu * square
        if length <= radius:
            return Trial(back, length, mu, slope, -slope - 0.5 * curvature)
        c = radius / length
        return Trial(c * back, radius, mu, c * slope, -c * slope - 0.5 * c * c * curvature)


def scaled_norm(x: np.ndarray, squares: Vector) -> float:
    """|D x|."""
    square = 0.0
    for v, s in zip(x.tolist(), squares):
        square += v * v * s
    return math.sqrt(square)


def _as_it_is(r: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Residuals that were checked already."""
    return r


class Descent:
    """A run in floats, from x0 and its residuals to an ended state or to an unusual one.

    If it ``defers``, the ended state is not ``linearized``: its point has a `Linearisation`, at x
    or close by, which is all that `curve_fit` needs.
    """

    __slots__ = (
        "before",
        "by_model",
        "checked",
        "cost",
        "defers",
        "derivative",
        "earlier",
        "error",
        "fired",
        "function",
        "history",
        "length",
        "limit",
        "mu",
        "nfev",
        "nit",
        "njev",
        "polished",
        "problem",
        "r",
        "radius",
        "rate",
        "reused",
        "rows",
        "scale",
        "shape",
        "shortest",
        "size",
        "solver",
        "trail",
        "value",
        "x",
    )

    def __init__(
        self,
        solver: LevenbergMarquardt,
        problem: Problem,
        x: np.ndarray,
        r: np.ndarray,
        history: list[Iteration],
        defers: bool = False,
    ) -> None:
        self.solver, self.problem, self.history, self.defers = solver, problem, history, defers
        self.x, self.r, self.cost = x, r, finite_cost(0.5 * dot_itself(r))
        self.radius, self.mu = 0.0, 0.0
        self.nfev, self.njev, self.nit = 1, 0, 0
        self.fired, self.value, self.limit = 0, 0.0, 0.0
        #: The squared scale of the last linearisation, and of the one before.
        self.scale: Vector | None = None
        self.earlier: Vector | None = None
        self.size, self.length, self.polished, self.rate = 0.0, math.inf, 0, 1.0
        self.trail: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
        fun = problem.fun
        self.function, self.checked = fun, _as_it_is
        self.by_model: Any = None
        if isinstance(fun, UserFunction):
            self.function, self.checked = fun.bare(), fun.residuals
            if isinstance(fun.function, ModelResidual):
                self.by_model = fun.function.differences
        self.shape = self.r.shape
        #: Whether the user fills the same array at every call; None until the second one.
        self.reused: bool | None = None
        diff = problem.differences
        self.shortest = diff.shortest() if diff is not None and diff.is_plain() else None
        made_by = getattr(problem.jac, "__self__", None)
        self.derivative = made_by.bare() if isinstance(made_by, UserFunction) else None
        self.error = problem.derivative_error()
        self.rows: np.ndarray | None = None
        self.before = self.x

    def run(self) -> LMState:
        """The state at which the run ended, or at which the general solver is to go on."""
        gtol, settled = self.solver.gtol, False
        while True:
            J = self._jacobian()
            if type(J) is not np.ndarray or J.shape[0] < J.shape[1]:
                return self._general(J)
            lin = Linearisation(J, self.r, self.scale, self.x)
            self.earlier = self.scale
            if not lin.sound:
                return self._general(J)
            self.scale = lin.squares
            self.problem.J = J
            self.njev += 1
            steepest = lin.steepest
            if steepest <= 2.0 * gtol * gtol * self.cost and not self.fired:
                self.fired, self.limit = GTOL, gtol
                self.value = math.sqrt(0.5 * steepest / self.cost) if self.cost else 0.0
            if steepest == 0.0:
                return self._ended(J, lin, GTOL)
            if settled:
                return self._ended(J, lin, self.fired)
            moved = self._polish(lin) if self.fired else self._trials(lin)
            if moved is None:
                self.njev -= 1  # the general solver counts it again
                self.scale = self.earlier
                return self._general(J)
            if not moved:
                return self._ended(J, lin, self.fired)
            settled = self.fired > 0 and self._settled(lin)
            if settled and self.defers and self.error:
                return self._near(lin)
            if self.fired and self._stayed_near():
                lin = Linearisation(J, self.r, self.scale, self.x)
                if lin.sound and self._polish(lin) is False:
                    return self._ended(J, lin, self.fired)

    def _trials(self, lin: Linearisation) -> bool | None:
        """Trials at one x until one is accepted: True; None leaves it to the general solver."""
        solver, x, cost = self.solver, self.x, self.cost
        radius = self.radius
        if radius == 0.0:
            self.size = scaled_norm(x, lin.squares)
            radius = first_radius(self.size, cost, len(lin.g))
        while self.nfev < solver.max_nfev:
            length, slope, back = math.sqrt(lin.square), lin.slope, lin.back
            if length <= (1.0 + SLACK) * radius:
                mu, predicted = 0.0, -0.5 * slope
            else:
                trial = lin.damped(radius)
                if trial is None:
                    return None
                back, length, mu, slope, predicted = trial
            if self.nfev == 1:
                radius = min(radius, length)  # as `Damping.first`
            x_new = x - back
            r_new, cost_new = self._evaluate(x_new)
            actual = cost - cost_new if cost_new < math.inf else -math.inf
            ratio = actual / predicted if predicted > 0.0 else 0.0
            if mu or ratio <= POOR:
                shrink = interpolated(actual, slope, cost, cost_new) if ratio <= POOR else 1.0
                radius, mu, _ = updated(radius, mu, ratio, length, shrink)
            else:
                radius = 2.0 * length  # as `updated`
            self.radius, self.mu = radius, mu
            accepted = ratio > ACCEPT
            if accepted:
                self.before = x
                self.x, self.r, self.cost = x_new, r_new, cost_new
                self.nit += 1
            self._record(accepted, ratio, length, False)
            # The convergence tests; |D x| is worked out only where it could matter.
            decrease = abs(actual) if abs(actual) > predicted else predicted
            flat = decrease <= solver.ftol * cost and ratio <= 2.0
            short = length if length < radius else radius
            if flat or short <= 100.0 * solver.xtol * self.size:
                self._tests(lin.squares, short, decrease, flat, cost)
            if accepted:
                return True
            if self.fired:
                break
        return None

    def _tests(
        self, squares: Vector, short: float, decrease: float, flat: bool, cost: float
    ) -> None:
        """The convergence tests of `_lm`, for a trial that is ``flat`` or may be too short."""
        solver = self.solver
        size = self.size = scaled_norm(self.x, squares)
        if short <= solver.xtol * size and solver.xtol:
            self.fired = BOTH if flat else XTOL
            self.value, self.limit = (short / size if size else 0.0), solver.xtol
        elif flat:
            self.fired, self.value, self.limit = FTOL, decrease / cost, solver.ftol

    def _record(self, accepted: bool, ratio: float, length: float, polishing: bool) -> None:
        radius, mu = self.radius, self.mu
        entry = (
            self.nfev,
            self.nit,
            self.cost,
            accepted,
            ratio,
            radius,
            mu,
            length,
            polishing,
            False,
        )
        self.history.append(tuple.__new__(Iteration, entry))  # takes half the time of its own

    def _evaluate(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        r = self.function(x.copy())  # the user may write into its argument
        if type(r) is not np.ndarray or r.dtype is not FLOAT or r.shape != self.shape:
            r = self.checked(r, x)
        if self.reused is None:
            self.reused = shares_memory(r, self.problem.first)
        if self.reused:
            r = r.copy()
        self.nfev += 1
        return r, 0.5 * dot_itself(r)

    def _jacobian(self) -> Any:
        """J at x, whatever it is; by one-sided differences in one buffer where these are plain."""
        x, r = self.x, self.r
        if self.derivative is not None:
            J = self.derivative(x.copy())
            if type(J) is np.ndarray and J.dtype is FLOAT and J.shape == (r.shape[0], x.shape[0]):
                return J
            return self.problem.taken(J, x, r)
        if self.shortest is None:
            return self.problem.jacobian(x, r)
        if self.rows is None:
            self.rows = np.empty((x.shape[0], r.shape[0]))
            self.problem.J = self.rows.T
        steps = plain_steps(x, self.shortest)
        if self.by_model is None or not self.by_model(x, steps, r, self.rows):
            self._by_residuals(steps, self.rows)
        return self.problem.J

    def _by_residuals(self, steps: Vector, rows: np.ndarray) -> None:
        """Rows (n, m) of J' by one-sided differences."""
        x, r, function, shape = self.x, self.r, self.function, self.shape
        for j, (h, row) in enumerate(zip(steps, rows)):
            point = x.copy()
            point[j] += h
            values = function(point)
            if type(values) is not np.ndarray or values.dtype is not FLOAT or values.shape != shape:
                values = self.checked(values, x)
            np.subtract(values, r, row)
            row *= 1.0 / h

    def _stayed_near(self) -> bool:
        """Whether the last step was so short that its Jacobian by differences serves here too."""
        if self.shortest is None:
            return False
        moves = (self.x - self.before).tolist()
        return all(abs(v) <= REACH * abs(xj) for v, xj in zip(moves, self.x.tolist()))

    def _settled(self, lin: Linearisation) -> bool:
        """Whether one more step would change nothing, at the rate of the last two.

        ``lin`` is that of the point before.
        """
        if not self.error:
            return self.polished > 0 and self.length * self.rate <= 0.1 * POLISHED
        if self.shortest is None or not self.solver.polish or self.nit < 2:
            return False
        reach = settled_reach(self.history[-2], self.history[-1], self.error)
        x = self.x.tolist()
        for v, u in zip(x, self.before.tolist()):
            if not abs(v - u) <= reach * abs(v):
                return False
        return not self._differences_show(lin, x, self.error * math.sqrt(2.0 * self.cost))

    def _polish(self, lin: Linearisation) -> bool | None:
        """One undamped step: True if taken, False if there is no need, None if unusual."""
        if not self.solver.polish:
            return False
        x, rnorm = self.x.tolist(), math.sqrt(2.0 * self.cost)
        change, floor, error = 0.0, 1e-4 * rnorm, self.error
        for pj, xj, s in zip(lin.back.tolist(), x, lin.squares):
            c = abs(pj) / (abs(xj) + floor / math.sqrt(s))
            if c > change:
                change = c
        if error and self._differences_show(lin, x, error * rnorm):
            return None
        predicted = -0.5 * lin.slope
        converged = predicted <= self.solver.ftol * self.cost
        if change <= max(POLISHED if converged else VANISHING, error, 8.0 * 2.0**-52):
            return False
        if self.polished or self.nfev >= self.solver.max_nfev or not converged:
            return None
        step = -lin.back
        r_new, cost_new = self._evaluate(self.x + step)
        noise = 8.0 * 2.0**-52 * (self.cost + rnorm * scaled_norm(self.x, lin.weights))
        accepted = cost_new <= self.cost + noise
        ratio = (self.cost - cost_new) / predicted if predicted > 0.0 else 1.0
        if accepted:
            self.trail, self.before = ((self.x, step),), self.x
            self.x, self.r, self.cost = self.x + step, r_new, cost_new
            self.nit += 1
            self.polished, self.rate = 1, math.sqrt(lin.square) / self.history[-1].length
        self.length = change
        self._record(accepted, ratio, change, True)
        return accepted

    def _differences_show(self, lin: Linearisation, x: Vector, noise: float) -> bool:
        """Whether the general solver may want central differences; see `_lm`."""
        pivot = smallest = math.inf
        for v, s, xj in zip(lin.pivots, lin.squares, x):
            pivot = min(pivot, v * v / s)
            smallest = min(smallest, xj * xj * s)
        share = noise * difference_share(self.r.shape[0])
        return share > DIFFERENCE_ERROR * pivot * math.sqrt(smallest)

    def _general(self, J: Any) -> LMState:
        """The state for the general solver, which is to take this J for its own."""
        problem = self.problem
        if problem.J is None and self.derivative is not None:
            J = problem.taken(J, self.x, self.r)  # looks closely at the first one
        problem.reuse(J)
        return self._state(self.scale)

    def _near(self, lin: Linearisation) -> LMState:
        """The final state, with the linearisation of the point before."""
        return self._state(lin.squares, self.fired, Point(self.r, lin))

    def _ended(self, J: np.ndarray, lin: Linearisation, status: int) -> LMState:
        """The final state, with the linearisation in the solver's terms where that is needed."""
        self.limit = self.limit or self.solver.gtol
        if self.defers:
            self.problem.reuse(J)
            self.njev -= 1  # the general solver counts it again
            return self._state(self.earlier, status, Point(self.r, lin))
        D, norms = np.sqrt(lin.squares), np.sqrt(lin.weights)
        sub = NormalEquations(np, lin.G, lin.gradient, Rows(np, J, self.r), norms)
        point = Point(self.r, sub, D, 1.0 / D, None)
        return self._state(lin.squares, status, point, linearized=True)

    def _state(
        self,
        squares: Vector | None,
        status: int | None = None,
        point: Point | None = None,
        linearized: bool = False,
    ) -> LMState:
        """The state in the solver's terms."""
        return LMState(
            self.x,
            self.cost,
            None if squares is None else np.sqrt(squares),
            Damping(self.radius, self.mu),
            self.nfev,
            self.njev,
            self.nit,
            length=self.length,
            fired=self.fired,
            value=self.value,
            limit=self.limit,
            polished=self.polished,
            linearized=linearized,
            trail=self.trail,
            status=status,
            point=point or Point(self.r),
        )
