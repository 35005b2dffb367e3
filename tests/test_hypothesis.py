"""Random problems, bounds, losses and faults: what holds for every call.

No evaluation outside the bounds, no result above the start or above the best point seen, an end
within the limit on evaluations, the same answer for the same call, and exceptions of user code that
pass through untouched. The examples are drawn in the same order in every run.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from lmsolve import least_squares

LIMIT = 150


def examples(number):
    """Settings for a number of examples, the same ones in every run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Fault(Exception):
    """Raised by a user's function in these tests."""


@dataclass
class Problem:
    """A random problem: residuals ``s * (A v(x) - b)`` with v smooth, and faults at some calls."""

    A: np.ndarray
    b: np.ndarray
    x0: np.ndarray
    kind: str
    units: np.ndarray
    scale: float
    lb: np.ndarray
    ub: np.ndarray
    fault: str
    every: int
    dtype: type = float
    points: list = field(default_factory=list)

    def values(self, x):
        """Residuals without faults."""
        z = x / self.units
        if self.kind == "exponential":
            v = np.exp(-z) + 0.1 * z
        elif self.kind == "trigonometric":
            v = np.sin(z) + 0.2 * z
        elif self.kind == "rational":
            v = z / (1.0 + z * z) + 0.05 * z
        else:
            v = z + 0.1 * z**3 if self.kind == "cubic" else z
        return (self.scale * (self.A @ v - self.b)).astype(self.dtype)

    def fun(self, x):
        """Residuals, spoiled at every so many-th call after the first."""
        self.points.append(np.array(x))
        r = self.values(x)
        if self.every and len(self.points) % self.every == 0:
            if self.fault == "raise":
                raise Fault
            value = {"nan": np.nan, "inf": np.inf, "huge": 1e200}[self.fault]
            r[:: 1 + len(self.points) % 3] = value
        return r

    def jac(self, x):
        """Central differences of the residuals, one column at a time."""
        self.points.append(np.array(x))
        h = 1e-6 * (np.abs(x) + self.units)
        return np.stack(
            [(self.values(x + h[j] * e) - self.values(x - h[j] * e)) / (2 * h[j])
             for j, e in enumerate(np.eye(x.size))], axis=1,
        ).astype(self.dtype)  # fmt: skip


@st.composite
def problems(draw, faults=("nan", "inf", "huge")):
    """Problems of 1 to 5 parameters and 1 to 12 residuals, of any rank and scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    A = rng.standard_normal((m, n))
    shape = draw(st.sampled_from(["full", "twins", "dead", "tiny column", "equal rows"]))
    if shape == "twins":
        A[:, -1] = A[:, 0]
    elif shape == "dead":
        A[:, -1] = 0.0
    elif shape == "tiny column":
        A[:, -1] *= 1e-9
    elif shape == "equal rows":
        A[:] = A[0]
    units = 10.0 ** rng.uniform(-1, 1, n) ** draw(st.sampled_from([1, 1, 9, 25]))
    z0 = rng.standard_normal(n) * draw(st.sampled_from([0.0, 1.0, 1.0, 30.0]))
    truth = rng.standard_normal(n)
    b = A @ truth + draw(st.sampled_from([0.0, 0.0, 1e-3, 1.0])) * rng.standard_normal(m)
    lb, ub = np.full(n, -np.inf), np.full(n, np.inf)
    box = draw(st.sampled_from(["none", "lower", "both", "narrow", "at start", "fixed"]))
    if box != "none":
        width = {"narrow": 1e-3, "at start": 0.0}.get(box, 1.0) * rng.uniform(0, 3, n)
        lb = (z0 - width) * units
        ub = (z0 + (1e-3 if box == "narrow" else 1.0) * rng.uniform(0.1, 3, n)) * units
        if box == "lower":
            ub = np.full(n, np.inf)
        if box == "fixed":
            held = rng.integers(n)
            lb[held] = ub[held] = z0[held] * units[held]
    x0 = np.clip(z0 * units, lb, ub)
    return Problem(
        A, b, x0,
        draw(st.sampled_from(["linear", "cubic", "exponential", "trigonometric", "rational"])),
        units, 10.0 ** draw(st.sampled_from([0, 0, 0, -100, -12, 12, 100])), lb, ub,
        draw(st.sampled_from(faults)), draw(st.sampled_from([0, 0, 2, 3, 5])),
    )  # fmt: skip


@st.composite
def options(draw):
    """Options of a call, but for its bounds."""
    loss = draw(st.sampled_from(["linear", "linear", "huber", "soft_l1", "cauchy", "arctan"]))
    out = {"loss": loss, "jac": draw(st.sampled_from(["2-point", "3-point", "exact"]))}
    if loss != "linear":
        out["f_scale"] = draw(st.sampled_from([0.1, 1.0, 1e6]))
    if draw(st.booleans()):
        out["x_scale"] = draw(st.sampled_from(["jac", 1.0, 1e-3]))
    if draw(st.integers(0, 3)) == 0:
        out["tr_solver"] = "lsmr"
    out["max_nfev"] = draw(st.sampled_from([1, 2, 7, LIMIT, LIMIT, LIMIT]))
    return out


def run(problem, options):
    """One call, with every point and every cost of a trial recorded."""
    problem.points.clear()
    call = dict(options)
    if call["jac"] == "exact":
        call["jac"] = problem.jac
    bounded = np.isfinite(problem.lb).any() or np.isfinite(problem.ub).any()
    bounds = (problem.lb, problem.ub) if bounded else (-np.inf, np.inf)
    try:
        with np.errstate(all="ignore"):
            return least_squares(problem.fun, problem.x0, bounds=bounds, **call)
    except ValueError as error:
        # A fault in the very first differences is refused, like one in the residuals at x0.
        differences = 0 if options["jac"] == "exact" else 4 * problem.x0.size
        early = problem.every and len(problem.points) <= 1 + differences
        if str(error).startswith("The cost must be finite") and problem.dtype is np.float32:
            reject()  # the start is beyond single precision
        if not early or "must be finite at `x0`" not in str(error):
            raise
        reject()


def total_cost(problem, options, x):
    """Cost of the unspoiled residuals at x, by its definition."""
    r = problem.values(x).astype(float)
    C = options.get("f_scale", 1.0)
    if options["loss"] == "linear":
        return 0.5 * float(np.vdot(r, r))
    z = (r / C) ** 2
    rho = {
        "huber": lambda: np.where(z <= 1, z, 2 * np.sqrt(z) - 1),
        "soft_l1": lambda: 2 * z / (np.sqrt(1 + z) + 1),
        "cauchy": lambda: np.log1p(z),
        "arctan": lambda: np.arctan(z),
    }[options["loss"]]()
    return 0.5 * C**2 * float(np.sum(rho))


def highest_allowed(result, start):
    """How high the cost of a result may be, from the cost of its start and from its history.

    A damped step is accepted if the cost falls, a polishing one if the cost does not rise by more
    than ``8 eps (cost + |r| |D x|)``, D the norms of J's columns, which a loss can only shorten.
    """
    costs = [start * (1 + 1e-12), *(i.cost for i in result.history)]  # the start as summed here
    lowest = min(costs)
    later = result.history[costs.index(lowest) :]
    steps = sum(i.polishing and i.accepted for i in later)
    if not steps:
        return lowest
    size = np.linalg.norm(np.linalg.norm(result.jac, axis=0) * result.x)
    noise = 8 * np.finfo(float).eps * (result.cost + math.sqrt(2 * result.cost) * size)
    return lowest + steps * noise


@examples(1500)
@given(problems(), options())
def test_what_holds_for_every_call(problem, options):
    result = run(problem, options)
    points = np.array(problem.points)
    # No evaluation outside the bounds; an exact Jacobian is asked for inside them too.
    assert np.all(points >= problem.lb)
    assert np.all(points <= problem.ub)
    # An end within the limit, and counts that are true.
    assert result.nfev <= options["max_nfev"]
    assert len(result.history) <= LIMIT + 1
    if options["jac"] == "exact":
        assert len(points) == result.nfev + result.njev
    # A finite result that is what it says, and not worse than the start.
    assert np.isfinite(result.x).all()
    assert math.isfinite(result.cost)
    with np.errstate(all="ignore"):
        start = total_cost(problem, options, problem.x0)
        here = total_cost(problem, options, result.x)
    assert result.cost == pytest.approx(here, rel=1e-12)
    assert result.cost <= highest_allowed(result, start)
    if problem.fault != "huge" or options["loss"] != "arctan":  # bounded: may not see it
        np.testing.assert_array_equal(result.fun, problem.values(result.x))
    held = problem.lb == problem.ub
    np.testing.assert_array_equal(result.x[held], problem.x0[held])
    # The same answer for the same call.
    again = run(problem, options)
    assert again.x.tobytes() == result.x.tobytes()
    assert (again.cost, again.nfev, again.njev) == (result.cost, result.nfev, result.njev)
    assert again.message == result.message


@examples(300)
@given(problems(faults=("raise",)), options())
def test_exceptions_pass_through(problem, options):
    problem.every = problem.every or 4
    try:
        result = run(problem, options)
    except Fault:
        assert len(problem.points) % problem.every == 0
        return
    assert result.nfev <= options["max_nfev"]


@examples(300)
@given(problems(), options())
def test_single_precision(problem, options):
    problem.dtype = np.float32
    problem.scale = 1.0
    problem.units = problem.units.clip(1e-6, 1e6)
    problem.x0 = problem.x0.astype(np.float32)
    problem.lb = np.nextafter(problem.lb.astype(np.float32), np.float32(-np.inf))
    problem.ub = np.nextafter(problem.ub.astype(np.float32), np.float32(np.inf))
    result = run(problem, options)
    assert result.x.dtype == result.fun.dtype == result.jac.dtype == np.float32
    points = np.array(problem.points)
    assert np.all(points >= problem.lb)
    assert np.all(points <= problem.ub)
    assert result.nfev <= options["max_nfev"]
    assert np.isfinite(result.x).all()
    with np.errstate(all="ignore"):
        start = total_cost(problem, options, problem.x0)
        here = total_cost(problem, options, result.x)
    assert here <= start * (1 + 1e-6)
