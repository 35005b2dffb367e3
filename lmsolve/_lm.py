"""Levenberg-Marquardt with a trust radius, and a polish: `init`, `step`, `resume`.

At x the residuals r are linearised, r(x + p) ~ r + J p, and the step minimises the model on a
ball, ``|D p| <= radius``, or with the damping ``mu |D p|^2 / 2`` if the parameters are many. D is
the running maximum of the column norms of J (J. J. More 1978, section 6), so that neither the units
of a parameter nor a bad start set its scale for good. The gain ratio of the trial decides on
acceptance, radius and damping (`_damping`).

Convergence tests, after a trial (with ``cost = F``, ``g`` the gradient):

    ftol:   actual and predicted decrease of F both at most ftol F, and in a ratio below 2,
    xtol:   |D p| or the radius at most xtol |D x|,
    gtol:   the largest cosine |g_j| / (|J_j| |r|) between r and a column of J at most gtol.

Each of them can fire far from a minimum: in a flat valley, or behind a small radius. So one that
fires starts a polish instead of ending the run: undamped Gauss-Newton steps, accelerated by
Anderson mixing (D. G. Anderson 1965; H. Walker, P. Ni 2011), which go on until a step changes no
parameter by more than POLISHED of itself, or until the steps stop shrinking. Where the undamped
step predicts more than ftol, the run was not converged, and the damped iteration takes over again.
One-sided differences are replaced by central ones for the polish where their error would show.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _trust
from ._anderson import mixed
from ._bounds import Box
from ._damping import ACCEPT, FIRST, GOOD, LARGE, OPEN, Damping, eased, interpolated, updated
from ._linalg import LinAlgError
from ._problem import LeastSquaresProblem
from ._start import finite_cost, first_radius, first_scale
from ._state import LMState
from ._status import BOTH, FTOL, GTOL, MAX_NFEV, NOT_FINITE, SINGULAR, STUCK, XTOL
from ._trust import Step
from ._xp import Array, Namespace, eps, on_host, to_floats

#: The running maximum of the column norms fades by this at every accepted step: a scale taken far
#: from the solution is forgotten after some fifty steps, which solves 4 more of the 120 runs of
#: More, Garbow and Hillstrom (from 101 to 105) with a quarter of the evaluations.
FADE = 0.95
#: The rows of a robust loss are weighed by rho' alone, and rho'' < 0 would take curvature away.
#: Where the last undamped step met less than LACKING of its model's curvature, the next one is
#: stretched as that suggests, at most so far: 92 robust fits of NIST's sets (all but Lanczos' and
#: Bennett5) take 2,003 evaluations instead of 3,456.
LACKING, STRETCH = 0.75, 4.0
#: The polish ends when no parameter changes by more than this share of itself.
POLISHED = 3e-10
#: The same where the step still promises a decrease: residuals that vanish at the solution, where
#: convergence is quadratic and one more step is worth its cost.
VANISHING = 1e-12
#: Where a polishing step promises less than this share of the cost's rounding, and is not half as
#: long as the one before, rounding is what moves it: ill-conditioned fits took all the steps there
#: are to no avail.
SPENT = 0.001
#: Steps of a polish, at most.
POLISH_STEPS = 20
#: A Gauss-Newton step that fails casts doubt on the convergence if it is larger than this.
SETTLED = 1e-6
#: A radius that had become too short for its good steps grows by this, and a scale is stale where
#: every column is shorter than this share of it.
LET_OUT, STALE = 1e3, 1e-3
#: How often a run that a test declared converged may find out that it was not.
DOUBTS = 10
#: Central differences replace one-sided ones where these would move a parameter by this share.
DIFFERENCE_ERROR = 2e-8

#: A trust radius below this has no square to compare with.
NO_RADIUS = 1e-140


class Point(NamedTuple):
    """What is known at the current x beyond the state: recomputed by `resume`, never saved."""

    residual: Any
    subproblem: Any = None
    D: Any = None
    d: Any = None
    held: Any = None


class LevenbergMarquardt:
    """The step-wise solver: tolerances and policy, without a state of its own.

    Parameters
    ----------
    ftol, xtol, gtol : float
        Tolerances of the three convergence tests; 0 disables a test.
    max_nfev : int or None
        Residual evaluations at most; None for no limit.
    x_scale : array, shape (n,), or None
        Fixed characteristic sizes of the parameters; None scales by the running maximum of the
        column norms of the Jacobian.
    bounds : Box or None
        Bounds on the parameters.
    polish : bool
        Whether a run that a test declares converged is polished.
    """

    def __init__(
        self,
        *,
        ftol: float = 1e-8,
        xtol: float = 1e-8,
        gtol: float = 1e-8,
        max_nfev: int | None = None,
        x_scale: Array | None = None,
        bounds: Box | None = None,
        polish: bool = True,
    ) -> None:
        self.ftol, self.xtol, self.gtol = ftol, xtol, gtol
        self.max_nfev = math.inf if max_nfev is None else max_nfev
        self.x_scale = x_scale
        self.bounds = bounds
        self.polish = polish

    def init(self, problem: LeastSquaresProblem, x0: Array, residual: Any = None) -> LMState:
        """State at the start; evaluates the residuals there unless they are given.

        Parameters
        ----------
        problem : LeastSquaresProblem
            What is to be minimised.
        x0 : array, shape (n,)
            The start, strictly between the bounds if there are any.
        residual : array, shape (m,), optional
            The residuals at ``x0``, where the caller has them already.

        Returns
        -------
        LMState
            The state before the first step.

        Raises
        ------
        ValueError
            If the cost at ``x0`` is not finite.
        """
        r = problem.residual(x0) if residual is None else residual
        cost = finite_cost(*to_floats(problem.cost(r)))
        return LMState(x=x0, cost=cost, scale=None, damping=Damping(0.0), point=Point(r))

    def resume(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """The state, ready to step on ``problem``: a checkpoint that was loaded, or new data.

        Parameters
        ----------
        problem : LeastSquaresProblem
            The problem of the state, or one with other data and the same parameters.
        state : LMState
            Where to go on from.

        Returns
        -------
        LMState
            The state with its residuals, cost and status renewed.

        Notes
        -----
        Residuals and cost are evaluated anew and not counted: the counters of a resumed run equal
        those of one that was never interrupted. Scale and damping carry over, the cost never does.
        """
        if state.central:
            getattr(problem, "refine_derivatives", bool)()
        if state.escalated:
            getattr(problem, "escalate", bool)()
        if state.coarse:
            getattr(problem, "form_gram", bool)()
        r = problem.residual(state.x)
        (cost,) = to_floats(problem.cost(r))
        known = state.linearized and cost == state.cost  # to the last bit: no other data
        return state._replace(cost=cost, point=Point(r), status=None, linearized=known)

    def copy(self, *, bounds: Box | None) -> LevenbergMarquardt:
        """The same solver with other bounds.

        Parameters
        ----------
        bounds : Box or None
            Bounds on the parameters.

        Returns
        -------
        LevenbergMarquardt
            A new solver; this one is unchanged.
        """
        other = LevenbergMarquardt(bounds=bounds)
        other.ftol, other.xtol, other.gtol = self.ftol, self.xtol, self.gtol
        other.max_nfev, other.x_scale, other.polish = self.max_nfev, self.x_scale, self.polish
        return other

    def linearize(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """The state with the linearisation at its x, whatever its status.

        Parameters
        ----------
        problem : LeastSquaresProblem
            What is to be minimised.
        state : LMState
            A state of that problem.

        Returns
        -------
        LMState
            The state with ``point`` complete.
        """
        status = state.status
        return self._linearized(problem, state)._replace(status=status)

    def step(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """The state after one trial, which costs one residual evaluation.

        Parameters
        ----------
        problem : LeastSquaresProblem
            What is to be minimised.
        state : LMState
            A state of that problem.

        Returns
        -------
        LMState
            The next state.

        Notes
        -----
        The problem is linearised first if ``x`` is new. A state whose ``status`` is not None has
        ended; it is then final, with its linearisation in ``point``.
        """
        if state.point.subproblem is None:
            state = self._linearized(problem, state)
            if state.status is not None:
                return state
        if state.nfev >= self.max_nfev:
            return state._replace(status=MAX_NFEV, value=state.nfev, limit=self.max_nfev)
        if state.fired:
            return self._polish(problem, state)
        return self._trial(problem, state)

    def _linearized(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """The state with the linearisation at x, scale and gradient test brought up to date."""
        xp = problem.xp
        sub = problem.linearize(state.x, state.point.residual)
        scale = self._scale(xp, sub, state)
        D = scale if xp is np and scale.all() else _where(xp, scale > 0, scale, 1.0)
        d = 1.0 / D
        held = None
        if self.bounds is not None:
            held = self.bounds.held(state.x, sub.grad)
            d = _where(xp, held, 0.0 * d, d)
        damping = state.damping
        if damping.radius == 0.0:
            damping = self._first_damping(xp, state, sub, D, d)
        again = state.linearized
        state = state._replace(
            scale=scale,
            damping=damping,
            njev=state.njev + (not again),
            linearized=True,
            point=Point(state.point.residual, sub, D, d, held),
        )
        if again:
            return state
        return self._gradient_test(xp, state)

    def _first_damping(
        self, xp: Namespace, state: LMState, sub: Any, D: Array, d: Array
    ) -> Damping:
        """A trust radius, or a damping where that leads (see `_damping`)."""
        large = state.x.shape[0] >= LARGE and hasattr(sub, "smallest_pivot")
        if large and sub.smallest_pivot(d) < OPEN:
            return Damping(math.inf, FIRST)
        length = _trust.scaled_norm(xp, state.x, D)
        return Damping(first_radius(length, state.cost, state.x.shape[0]))

    def _scale(self, xp: Namespace, sub: Any, state: LMState) -> Array:
        """Running maximum of the column norms (n,), or the user's fixed scale."""
        if self.x_scale is not None:
            return 1.0 / self.x_scale
        if sub.norms is None:
            return xp.ones_like(state.x)
        if state.scale is None:
            return first_scale(xp, sub.norms, state.x)
        if state.linearized:
            return state.scale
        return xp.maximum(FADE * state.scale, sub.norms)

    def _gradient_test(self, xp: Namespace, state: LMState) -> LMState:
        """The state, ended or polishing if the gradient vanishes."""
        sub, rnorm = state.point.subproblem, math.sqrt(2.0 * state.cost)
        g, d = sub.grad, state.point.d
        g = g if state.point.held is None else _where(xp, d > 0, g, 0.0 * d)
        norms = state.point.D if sub.norms is None else sub.norms
        steepest, longest = to_floats(_largest_ratio(xp, g, norms), xp.max(norms))
        if not math.isfinite(steepest + longest):
            return state._replace(status=NOT_FINITE, value=steepest, limit=self.gtol)
        cosine = steepest / rnorm if rnorm > 0 else 0.0
        if cosine == 0.0:
            return state._replace(status=GTOL, value=0.0, limit=self.gtol)
        if cosine <= self.gtol and not state.fired:
            return state._replace(fired=GTOL, value=cosine, limit=self.gtol)
        return state

    def _trial(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """One damped trial."""
        xp, point = problem.xp, state.point
        sub, damping = point.subproblem, state.damping
        if damping.radius < NO_RADIUS or damping.mu > 1.0 / NO_RADIUS:
            return state._replace(status=STUCK)
        try:
            step = self._damped(xp, state)
        except LinAlgError:
            return state._replace(status=SINGULAR, value=damping.mu)
        leads = damping.radius == math.inf
        if state.nfev == 1 and not leads:
            damping = damping.first(step.length)
        stretch = _stretch(state, step) if step.mu == 0.0 else 1.0
        length = stretch * step.length
        x_new = state.x + (step.p if stretch == 1.0 else stretch * step.p)
        if self.bounds is not None:
            x_new = self.bounds.enter(xp, x_new, eps(xp, state.x.dtype))
        r_new = problem.residual(x_new)
        cost_new, predicted, slope = to_floats(
            problem.cost(r_new), sub.reduction(step.p), sub.grad @ step.p
        )
        actual = state.cost - cost_new if math.isfinite(cost_new) else -math.inf
        curved = -2.0 * (slope + predicted)  # p'J'J p
        if stretch != 1.0:
            predicted = -stretch * (slope + 0.5 * stretch * state.curvature * curved)
        ratio = actual / predicted if predicted > 0 else 0.0
        if leads:
            damping = eased(step.mu, damping.rise, ratio)
        else:
            shrink = interpolated(actual, stretch * slope, state.cost, cost_new)
            damping = updated(damping.radius, step.mu, ratio, length, shrink)
        accepted = ratio > ACCEPT
        curvature = 1.0
        if accepted and step.mu == 0.0 and curved > 0.0 and _is_robust(problem):
            curvature = -2.0 * (stretch * slope + actual) / (stretch * stretch * curved)
        new = state._replace(
            nfev=state.nfev + 1,
            damping=damping,
            ratio=ratio,
            length=length,
            accepted=accepted,
            escalated=sub.escalated,
            coarse=getattr(problem, "is_coarse", bool)(),
            curvature=curvature,
        )
        if accepted:
            new = new._replace(
                x=on_host(xp, x_new),
                cost=cost_new,
                nit=state.nit + 1,
                linearized=False,
                point=Point(r_new),
            )
        return self._convergence_tests(xp, state, new, actual, predicted, point.D)

    def _damped(self, xp: Namespace, state: LMState) -> Step:
        """The step on the trust region, inside the bounds."""
        point, damping = state.point, state.damping
        epsilon = eps(xp, state.x.dtype)
        if self.bounds is None:
            return _trust.step(
                xp, point.subproblem, point.d, point.D, damping.radius, damping.mu, epsilon
            )
        return _trust.bounded_step(xp, point, self.bounds, state.x, damping, epsilon)

    def _convergence_tests(
        self, xp: Namespace, old: LMState, new: LMState, actual: float, predicted: float, D: Array
    ) -> LMState:
        """``new`` with the test that fired, if one did."""
        decrease = max(abs(actual), predicted)
        flat = decrease <= self.ftol * old.cost and new.ratio <= 2.0
        reach = 0.0
        if self.xtol:
            reach = _trust.scaled_norm(xp, new.x, D)
            if self.x_scale is None and old.point.subproblem.norms is not None:
                # Where x vanishes: what changes the residuals by no more than their rounding.
                reach = max(reach, eps(xp, new.x.dtype) * math.sqrt(2.0 * new.cost))
            reach *= self.xtol
        short = min(new.length, new.damping.radius) <= reach
        if flat and not short:
            return new._replace(fired=FTOL, value=decrease / old.cost, limit=self.ftol)
        if short:
            value = min(new.length, new.damping.radius) * self.xtol / reach if reach else 0.0
            return new._replace(fired=BOTH if flat else XTOL, value=value, limit=self.xtol)
        return new

    def _polish(self, problem: LeastSquaresProblem, state: LMState) -> LMState:
        """One undamped trial after a convergence test has fired, or the end."""
        xp, point = problem.xp, state.point
        sub = point.subproblem
        ended = state._replace(status=state.fired)
        step = self._undamped(xp, state) if self.polish else None
        if step is None:
            return ended
        rnorm = math.sqrt(2.0 * state.cost)
        size = xp.abs(state.x) + 1e-4 * rnorm * point.d
        change, predicted = to_floats(_largest_ratio(xp, step.p, size), sub.reduction(step.p))
        error = getattr(problem, "derivative_error", float)()
        if error and self._differences_show(problem, state, error, rnorm):
            return self._with_central_differences(problem, state, ended)
        precision = eps(xp, state.x.dtype)
        target = POLISHED if predicted <= self.ftol * state.cost else VANISHING
        if not math.isfinite(change) or change <= max(target, error, 8.0 * precision):
            return ended
        # Slow convergence is not monotonic; in single precision what follows is rounding errors.
        patience = 4.0 if precision < 1e-10 else 1.0
        stagnant = state.polished > 1 and change > patience * state.length
        if state.polished > 1 and predicted <= SPENT * precision * state.cost:
            stagnant = change > 0.5 * state.length
        if stagnant or state.polished >= POLISH_STEPS:
            return ended
        return self._polishing_trial(problem, state, step, change, predicted)

    def _polishing_trial(
        self,
        problem: LeastSquaresProblem,
        state: LMState,
        step: Step,
        change: float,
        predicted: float,
    ) -> LMState:
        """One undamped trial: a state to polish on or to go back to damped steps, or the end."""
        xp, point, precision = problem.xp, state.point, eps(problem.xp, state.x.dtype)
        sub, rnorm = point.subproblem, math.sqrt(2.0 * state.cost)
        p, trail = mixed(xp, state, step, point.D)
        x_new = state.x + p
        if self.bounds is not None:
            x_new = self.bounds.enter(xp, x_new, precision)
        r_new = problem.residual(x_new)
        (cost_new,) = to_floats(problem.cost(r_new))
        # Rounding in the model values, about |J x|, blurs the cost by a few eps |r| |J x|.
        terms = 0.0 if sub.norms is None else _trust.scaled_norm(xp, state.x, sub.norms)
        noise = 8.0 * precision * (state.cost + rnorm * terms)
        converged = predicted <= self.ftol * state.cost
        settled = converged and change <= SETTLED
        state = state._replace(
            nfev=state.nfev + 1,
            escalated=sub.escalated,
            coarse=getattr(problem, "is_coarse", bool)(),
        )
        if cost_new <= state.cost + noise:
            new = state._replace(
                x=x_new,
                cost=cost_new,
                nit=state.nit + 1,
                accepted=True,
                length=change,
                ratio=(state.cost - cost_new) / predicted if predicted > 0 else 1.0,
                polished=state.polished + 1,
                trail=trail,
                linearized=False,
                point=Point(r_new),
            )
            if converged:
                return new
            radius = max(state.damping.radius, 2.0 * step.length)
            damping = state.damping if radius == math.inf else Damping(radius)
            return new._replace(fired=0, polished=0, trail=(), damping=damping)
        state = state._replace(accepted=False, polished=0, trail=())
        if not settled and state.doubts < DOUBTS and self._can_move(xp, state, precision):
            return self._doubted(xp, state)
        never = state.nit == 0 and state.ratio == -math.inf  # no trial had a finite cost
        return state._replace(status=STUCK if never else state.fired)

    def _doubted(self, xp: Namespace, state: LMState) -> LMState:
        """The state of a run that is not converged after all, on its way again.

        Where short good steps had fired, the radius was short, not the way: it is let out. A scale
        that is stale as a whole (the columns were far longer where the run began) is brought back
        to them with the radius, which leaves the trust region as it is and the damping its unit.
        """
        radius, mu, _ = state.damping
        scale, point = state.scale, state.point
        if state.fired in (XTOL, BOTH) and state.ratio >= GOOD:
            radius, mu = radius * LET_OUT, mu / LET_OUT
        norms = point.subproblem.norms
        if self.x_scale is None and norms is not None and scale is not None:
            (share,) = to_floats(_largest_ratio(xp, norms, point.D))
            if 0.0 < share < STALE:
                radius, mu, scale = radius * share, mu / share**2, scale * share
                point = point._replace(D=point.D * share, d=point.d / share)
        return state._replace(
            fired=0,
            doubts=state.doubts + 1,
            scale=scale,
            damping=Damping(radius, mu),
            point=point,
        )

    def _can_move(self, xp: Namespace, state: LMState, precision: float) -> bool:
        """Whether a step within the trust radius would change x at all."""
        return state.damping.radius > precision * _trust.scaled_norm(xp, state.x, state.point.D)

    def _undamped(self, xp: Namespace, state: LMState) -> Step | None:
        """The Gauss-Newton step inside the bounds, or None where it does not exist."""
        point = state.point
        if self.bounds is None:
            return _trust.gauss_newton(xp, point.subproblem, point.d, point.D)
        try:
            return _trust.bounded_step(
                xp, point, self.bounds, state.x, Damping(math.inf), eps(xp, state.x.dtype)
            )
        except LinAlgError:
            return None

    def _differences_show(
        self, problem: LeastSquaresProblem, state: LMState, error: float, rnorm: float
    ) -> bool:
        """Whether an error in J may move a parameter by more than DIFFERENCE_ERROR of itself.

        To first order x moves by ``(J'J)^-1 dJ'r``, at most ``error |r| / pivot`` in scaled space;
        dJ and r of many rows are nearly uncorrelated, which `difference_share` allows for.
        """
        if state.central:
            return False
        xp = problem.xp
        pivot = getattr(state.point.subproblem, "pivot", 0.0)
        size = xp.abs(state.x) * state.point.D
        (smallest,) = to_floats(xp.min(size))
        m = getattr(problem, "m", None) or 1
        return error * rnorm * difference_share(m) > DIFFERENCE_ERROR * pivot * smallest

    def _with_central_differences(
        self, problem: LeastSquaresProblem, state: LMState, ended: LMState
    ) -> LMState:
        """The state at the same x, to be linearised by central differences; or the end."""
        if not getattr(problem, "refine_derivatives", bool)():
            return ended
        anew = state._replace(
            central=True,
            linearized=False,
            polished=0,
            trail=(),
            point=Point(state.point.residual),
        )
        return self.step(problem, anew)


def _stretch(state: LMState, step: Step) -> float:
    """The factor by which to stretch an undamped step, inside the radius."""
    if state.curvature >= LACKING:
        return 1.0
    room = state.damping.radius / step.length if step.length else 1.0
    return max(1.0, min(1.0 / max(state.curvature, 1.0 / STRETCH), room))


def _is_robust(problem: LeastSquaresProblem) -> bool:
    """Whether a loss weighs the rows."""
    return getattr(problem, "loss", None) is not None


def difference_share(m: int) -> float:
    """Share of ``|dJ| |r|`` that ``dJ'r`` is taken to reach for m residuals: 4 sqrt(1 / m).

    Random signs give sqrt(1 / m); the NIST sets, whose residuals are partly systematic, stay
    below 4 times that.
    """
    return min(1.0, 4.0 / math.sqrt(m))


def _where(xp: Namespace, mask: Array, a: Array, b: Array | float) -> Array:
    """``xp.where`` that takes a number for ``b`` in every namespace."""
    return xp.where(mask, a, b * xp.ones_like(a) if isinstance(b, float) else b)


def _largest_ratio(xp: Namespace, a: Array, b: Array) -> Array:
    """0-d maximum of |a_j| / b_j over the entries with a nonzero b_j; NaN if one is NaN."""
    a = xp.abs(a)
    nonzero = b != 0
    if xp is np and nonzero.all():
        with np.errstate(invalid="ignore"):  # infinities, which the caller looks for
            return np.max(a / b)
    one, zero = xp.ones_like(b), xp.zeros_like(a)
    return xp.max(xp.where(nonzero, a / xp.where(nonzero, b, one), zero))
