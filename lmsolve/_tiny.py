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
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg.blas import ddot
from scipy.linalg.lapack import dposv, dpotrs

from ._damping import ACCEPT, POOR, Damping, interpolated, updated
from ._history import Iteration
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
from ._problem import Problem, UserFunction
from ._state import LMState
from ._subproblem import ESCALATE, NormalEquations, Rows
from ._trust import CUT, ITERATIONS, SLACK
from ._xp import dot_itself

#: Beyond this many parameters LAPACK is faster (measured: the curves cross at n = 7).
PARAMETERS = 6

#: A Jacobian by differences is right to about one of their steps: it is not taken anew for the
#: last look at a converged fit if no parameter has moved by more than this many steps.
NEAR = 10.0

FLOAT = np.dtype(float)

Vector = list[float]


class Trial(NamedTuple):
    """A negative step -p (n,), |D p|, the damping, the slope g'p < 0 and the predicted decrease.

    ``factor`` (n, n) is Cholesky's, of the damped matrix.
    """

    back: np.ndarray
    length: float
    mu: float
    slope: float
    predicted: float
    factor: np.ndarray


def first_scale(norms: Vector, x: Vector) -> Vector:
    """Column norms at the start, none below its share of WEIGHT; the twin of the one in `_lm`."""
    size = [abs(v) for v in x]
    fill = min([1.0, *(v for v in size if v > 0.0)])
    size = [v or fill for v in size]
    heaviest = WEIGHT * max(v * s for v, s in zip(norms, size))
    return [max(v, heaviest / s) for v, s in zip(norms, size)]


class Linearisation:
    """J'J and J'r at one point, and the steps that they give."""

    __slots__ = ("D", "G", "g", "gradient", "newton", "norms", "pivots", "steepest")

    def __init__(self, J: np.ndarray, r: np.ndarray, scale: Vector | None, x: np.ndarray) -> None:
        T = J.T
        self.G = G = T.dot(J)
        self.gradient = T.dot(r)
        self.g: Vector = self.gradient.tolist()
        self.norms = norms = [math.sqrt(v) for v in G.diagonal().tolist()]
        #: The largest |g_j| / |J_j|; NaN, which no test lets through, if a column is zero or bad.
        self.steepest = math.nan
        if min(norms) > 0.0 and sum(norms) < math.inf:  # a sum keeps a NaN
            self.steepest = max([abs(gj) / v for gj, v in zip(self.g, norms)])
        if scale is None:
            self.D = first_scale(norms, x.tolist())
        else:
            self.D = [v if v > FADE * s else FADE * s for s, v in zip(scale, norms)]
        self.newton: Trial | None = None

    def gauss_newton(self) -> Trial | None:
        """The undamped step; None if the system is ill-conditioned."""
        self.newton = self._solve(self.G, 0.0)
        return self.newton

    def _solve(self, A: np.ndarray, mu: float) -> Trial | None:
        """The step of damping mu from the damped matrix A (n, n).

        Cholesky's factor is as accurate without the scaling as with it (van der Sluis 1969), so
        one call of LAPACK does; its pivots are judged by the scaled ones.
        """
        L, back, info = dposv(A, self.gradient, lower=1)
        if info != 0:
            return None
        self.pivots = pivots = L.diagonal().tolist()
        square = slope = 0.0
        for v, norm, pj, gj, Dj in zip(pivots, self.norms, back.tolist(), self.g, self.D):
            if not v * v >= ESCALATE * norm * norm:  # also NaN
                return None
            slope -= pj * gj
            pj *= Dj
            square += pj * pj
        # By (G + mu D^2) p = -g, the model p'G p / 2 needs no product with G.
        return Trial(back, math.sqrt(square), mu, slope, 0.5 * (mu * square - slope), L)

    def within(self, radius: float) -> Trial | None:
        """The step within the radius (see `_trust`); None if the system is ill-conditioned."""
        last = self.newton
        if last is None or last.length <= (1.0 + SLACK) * radius:
            return last
        squares = np.array(self.D) ** 2
        lo, hi, mu = (
            0.0,
            math.sqrt(sum((gj / v) ** 2 for gj, v in zip(self.g, self.D))) / radius,
            0.0,
        )
        for _ in range(ITERATIONS):
            w = squares * last.back
            secular = ddot(w, dpotrs(last.factor, w, lower=1)[0])
            newton = mu + (last.length / radius - 1.0) * last.length**2 / secular
            if last.length > radius:
                lo = max(lo, mu)
            else:
                hi = min(hi, mu)
            mu = min(max(newton, lo), max(hi, lo))
            A = self.G.copy()
            A.ravel()[:: len(self.g) + 1] += mu * squares
            last = self._solve(A, mu)
            if last is None or -SLACK * radius <= last.length - radius <= CUT * radius:
                break
        if last is None or last.length <= radius:
            return last
        c = radius / last.length
        curvature = -last.slope - mu * last.length**2
        predicted = -c * last.slope - 0.5 * c * c * curvature
        return Trial(c * last.back, radius, mu, c * last.slope, predicted, last.factor)


def scaled_norm(x: np.ndarray, D: Vector) -> float:
    """|D x|."""
    square = 0.0
    for v, Dj in zip(x.tolist(), D):
        v *= Dj
        square += v * v
    return math.sqrt(square)


def _as_it_is(r: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Residuals that were checked already."""
    return r


class Descent:
    """A run in floats, from an unlinearised state to an ended one or to an unusual one."""

    def __init__(
        self,
        solver: LevenbergMarquardt,
        problem: Problem,
        state: LMState,
        history: list[Iteration],
    ) -> None:
        self.solver, self.problem, self.history = solver, problem, history
        self.x, self.r, self.cost = state.x, state.point.residual, state.cost
        self.damping = state.damping
        self.nfev, self.njev, self.nit = state.nfev, state.njev, state.nit
        self.fired, self.value, self.limit = state.fired, 0.0, 0.0
        self.scale = None if state.scale is None else state.scale.tolist()
        self.size, self.length, self.polished, self.rate = 0.0, math.inf, 0, 1.0
        self.trail: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
        fun = problem.fun
        self.function, self.checked = fun, _as_it_is
        if isinstance(fun, UserFunction):
            self.function, self.checked = fun.bare(), fun.residuals
        self.shape = self.r.shape
        diff = problem.differences
        self.differences = diff if diff is not None and diff.is_plain() else None
        made_by = getattr(problem.jac, "__self__", None)
        self.derivative = made_by.bare() if isinstance(made_by, UserFunction) else None
        self.error = problem.derivative_error()
        self.columns: list[np.ndarray] = []
        self.before = self.x

    def run(self) -> LMState:
        """The state at which the run ended, or at which the general solver is to go on."""
        problem, gtol = self.problem, self.solver.gtol
        while True:
            J = self._jacobian()
            if type(J) is not np.ndarray or J.shape[0] < J.shape[1]:
                problem.reuse(J)
                return self._state()
            self.njev += 1
            lin = Linearisation(J, self.r, self.scale, self.x)
            if lin.steepest <= gtol * (rnorm := math.sqrt(2.0 * self.cost)) and not self.fired:
                self.fired, self.limit = GTOL, gtol
                self.value = lin.steepest / rnorm if rnorm else 0.0
            elif not lin.steepest < math.inf:
                return self._general(J, lin)
            self.scale = lin.D
            if self.damping.radius == 0.0:
                self.size = scaled_norm(self.x, lin.D)
                self.damping = Damping(first_radius(self.size, self.cost, len(lin.D)))
            if lin.steepest == 0.0:
                return self._ended(J, lin, GTOL)
            moved = self._polish(lin) if self.fired else self._trials(lin)
            if moved is None:
                return self._general(J, lin)
            if not moved:
                return self._ended(J, lin, self.fired)
            if self.fired and not self.polished and self._stayed_near():
                lin = Linearisation(J, self.r, self.scale, self.x)
                if lin.steepest < math.inf and self._polish(lin) is False:
                    return self._ended(J, lin, self.fired)

    def _trials(self, lin: Linearisation) -> bool | None:
        """Trials at one x until one is accepted: True; None leaves it to the general solver."""
        if lin.gauss_newton() is None:
            return None
        solver, x, cost = self.solver, self.x, self.cost
        while self.nfev < solver.max_nfev:
            radius = self.damping.radius
            trial = lin.within(radius)
            if trial is None:
                return None
            back, length, mu, slope, predicted, _ = trial
            x_new = x - back
            if self.nfev == 1:
                radius = min(radius, length)  # as `Damping.first`
            r_new, cost_new = self._evaluate(x_new)
            actual = cost - cost_new if cost_new < math.inf else -math.inf
            ratio = actual / predicted if predicted > 0.0 else 0.0
            shrink = interpolated(actual, slope, cost, cost_new) if ratio <= POOR else 1.0
            self.damping = damping = updated(radius, mu, ratio, length, shrink)
            accepted = ratio > ACCEPT
            if accepted:
                self.before = x
                self.x, self.r, self.cost = x_new, r_new, cost_new
                self.nit += 1
            self.history.append(
                Iteration(
                    self.nfev,
                    self.nit,
                    self.cost,
                    accepted,
                    ratio,
                    *damping[:2],
                    length,
                    False,
                    False,
                )
            )
            # The convergence tests; |D x| is worked out only where it could matter.
            decrease = abs(actual) if abs(actual) > predicted else predicted
            flat = decrease <= solver.ftol * cost and ratio <= 2.0
            short = min(length, damping.radius)
            if flat or short <= 100.0 * solver.xtol * self.size:
                self._tests(lin.D, short, decrease, flat, cost)
            if accepted:
                return True
            if self.fired:
                break
        return None

    def _tests(self, D: Vector, short: float, decrease: float, flat: bool, cost: float) -> None:
        """The convergence tests of `_lm`, for a trial that is ``flat`` or may be too short."""
        solver = self.solver
        size = self.size = scaled_norm(self.x, D)
        if short <= solver.xtol * size and solver.xtol:
            self.fired = BOTH if flat else XTOL
            self.value, self.limit = (short / size if size else 0.0), solver.xtol
        elif flat:
            self.fired, self.value, self.limit = FTOL, decrease / cost, solver.ftol

    def _evaluate(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        r = self.function(x.copy())  # the user may write into its argument
        if type(r) is not np.ndarray or r.dtype is not FLOAT or r.shape != self.shape:
            r = self.checked(r, x)
        if r is self.problem.first:
            r = r.copy()  # and fill the same array at every call
        self.nfev += 1
        return r, 0.5 * dot_itself(r)

    def _jacobian(self) -> Any:
        """J at x, whatever it is; by one-sided differences in one buffer where these are plain."""
        x, r, function, shape = self.x, self.r, self.function, self.shape
        if self.differences is None:
            return self._given(x, r)
        if not self.columns:
            rows = np.empty((x.shape[0], r.shape[0]))
            self.columns = list(rows)
            self.problem.J = rows.T
        for j, (h, column) in enumerate(zip(self.differences.plain_steps(x), self.columns)):
            point = x.copy()
            point[j] += h
            values = function(point)
            if type(values) is not np.ndarray or values.dtype is not FLOAT or values.shape != shape:
                values = self.checked(values, x)
            np.subtract(values, r, column)
            column /= h
        return self.problem.J

    def _given(self, x: np.ndarray, r: np.ndarray) -> Any:
        """The user's J at x, unless it is made otherwise; the first one is looked at closely."""
        problem = self.problem
        if self.derivative is None or problem.J is None:
            return problem.jacobian(x, r)
        J = self.derivative(x.copy())
        if type(J) is np.ndarray and J.dtype is FLOAT and J.shape == (r.shape[0], x.shape[0]):
            problem.J = J
            return J
        return problem.taken(J, x, r)

    def _stayed_near(self) -> bool:
        """Whether the last step was so short that its Jacobian by differences serves here too."""
        if self.differences is None:
            return False
        moves = (self.x - self.before).tolist()
        reach = NEAR * 2.0**-26
        return all(abs(v) <= reach * abs(xj) for v, xj in zip(moves, self.x.tolist()))

    def _polish(self, lin: Linearisation) -> bool | None:
        """One undamped step: True if taken, False if there is no need, None if unusual."""
        if not self.solver.polish:
            return False
        if self.polished and self.length * self.rate <= 0.1 * POLISHED and not self.error:
            return False  # what the next step would change, at the rate of the last two
        undamped = lin.gauss_newton()
        if undamped is None:
            return None
        back, length, _, _, predicted, _ = undamped
        D, x = lin.D, self.x.tolist()
        rnorm = math.sqrt(2.0 * self.cost)
        floor = 1e-4 * rnorm
        change = max([abs(pj) / (abs(xj) + floor / Dj) for pj, xj, Dj in zip(back.tolist(), x, D)])
        error = self.error
        if error and self._differences_show(lin, x, error * rnorm):
            return None
        converged = predicted <= self.solver.ftol * self.cost
        if change <= max(POLISHED if converged else VANISHING, error, 8.0 * 2.0**-52):
            return False
        if self.polished or self.nfev >= self.solver.max_nfev or not converged:
            return None
        step = -back
        r_new, cost_new = self._evaluate(self.x + step)
        noise = 8.0 * 2.0**-52 * (self.cost + rnorm * scaled_norm(self.x, lin.norms))
        accepted = cost_new <= self.cost + noise
        ratio = (self.cost - cost_new) / predicted if predicted > 0.0 else 1.0
        if accepted:
            self.trail = ((self.x, step),)
            self.x, self.r, self.cost = self.x + step, r_new, cost_new
            self.nit += 1
            self.polished, self.rate = 1, length / self.history[-1].length
        self.length = change
        self.history.append(
            Iteration(
                self.nfev,
                self.nit,
                self.cost,
                accepted,
                ratio,
                *self.damping[:2],
                change,
                True,
                False,
            )
        )
        return accepted

    def _differences_show(self, lin: Linearisation, x: Vector, error: float) -> bool:
        """Whether the general solver may want central differences; see `_lm`."""
        pivot = min([v / Dj for v, Dj in zip(lin.pivots, lin.D)]) ** 2
        smallest = min([abs(xj) * Dj for xj, Dj in zip(x, lin.D)])
        noise = error * difference_share(self.r.shape[0])
        return noise > DIFFERENCE_ERROR * pivot * smallest

    def _state(self, point: Point | None = None, status: int | None = None) -> LMState:
        """The state in the solver's terms, with the linearisation if there is one."""
        return LMState(
            self.x,
            self.cost,
            None if self.scale is None else np.array(self.scale),
            self.damping,
            self.nfev,
            self.njev,
            self.nit,
            length=self.length,
            fired=self.fired,
            value=self.value,
            limit=self.limit,
            polished=self.polished,
            linearized=point is not None,
            trail=self.trail,
            status=status,
            point=point or Point(self.r),
        )

    def _general(self, J: np.ndarray, lin: Linearisation) -> LMState:
        """The state for the general solver, linearised."""
        if not lin.steepest < math.inf:
            self.problem.reuse(J)
            self.njev -= 1  # the general solver counts it again
            return self._state()
        return self._state(self._point(J, lin))

    def _ended(self, J: np.ndarray, lin: Linearisation, status: int) -> LMState:
        self.limit = self.limit or self.solver.gtol
        return self._state(self._point(J, lin), status)

    def _point(self, J: np.ndarray, lin: Linearisation) -> Point:
        """The linearisation in the solver's terms."""
        D = np.array(lin.D)
        sub = NormalEquations(np, lin.G, lin.gradient, Rows(np, J, self.r), np.array(lin.norms))
        return Point(self.r, sub, D, 1.0 / D, None)
