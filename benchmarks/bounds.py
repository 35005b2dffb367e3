"""Which form of bounds? Ours beside Coleman-Li (SciPy's trf), dogbox, and simpler projections.

    python benchmarks/bounds.py             # the tables, and results/bounds.json
    python benchmarks/bounds.py --smoke     # a few problems, nothing written
    python benchmarks/bounds.py --all       # every run as well

The problems: NIST's 27 sets from both starts and More-Garbow-Hillstrom's from the standard start,
each inside four boxes made from its solution x* (by lmsolve, unbounded) and its start: `around`
holds both with room to spare, `through` has bounds exactly at x* for every second parameter,
`cut` keeps every third parameter 10 % of |x*| short of x*, and `corner` every parameter. Starts are
moved into the box. All solvers get the exact Jacobian.

What is compared is no solver's stopping rule: the residual function watches the cost, and a run has
reached the solution at the first call whose cost is within 1e-6 of the lowest that any solver finds
in that box (or 1e-12 of the cost at the start, where that is zero). `fun` and `jac` are the calls
made until then, over the runs where all solvers but those in brackets get there. A solver that goes
on to another local minimum has not reached the solution.

The forms:
  lmsolve           active set: parameters pressed against a bound are held; a step that leaves the
                    box stops there exactly and is solved for again in the others
  [clip]            the same without the second solve: the step is clipped
  [clip, no set]    and without the active set: nothing is held, every step is clipped
  scipy trf         Coleman-Li scaling with reflections, x_scale='jac'
  scipy dogbox      a rectangular trust region with dogleg steps, x_scale='jac'
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from _common import RESULTS, footer, save, table

import lmsolve
from lmsolve import _trust
from lmsolve._bounds import Box
from lmsolve._lm import LevenbergMarquardt, Point
from lmsolve._problem import Problem
from lmsolve._trust import Step
from tests import nist, problems

BOXES = ("around", "through", "cut", "corner")
SMOKE_NIST, SMOKE_MGH = ("Misra1a", "Chwirut2"), ("rosenbrock", "bard")
MAX_NFEV = 500
TIGHT = {"ftol": 1e-14, "xtol": 1e-14, "gtol": 1e-14, "max_nfev": MAX_NFEV}


class Outside(Exception):
    """An evaluation outside the box."""


@dataclass(frozen=True)
class Case:
    """A problem in a box."""

    name: str
    box: str
    fun: Callable[[np.ndarray], np.ndarray]
    jac: Callable[[np.ndarray], np.ndarray]
    x0: np.ndarray
    lb: np.ndarray
    ub: np.ndarray


@dataclass
class Run:
    """The costs of a run in the order of its residual calls, and the Jacobians made before each."""

    case: str
    box: str
    solver: str
    costs: list[float]
    jacobians: list[int]
    refused: str = ""

    def calls_to(self, cost: float) -> tuple[int, int] | None:
        """Residual and Jacobian calls until a cost this low; None if it was never reached."""
        for k, found in enumerate(self.costs):
            if found <= cost:
                return k + 1, self.jacobians[k]
        return None


class Clipped(LevenbergMarquardt):
    """The solver with steps that are clipped to the box, not solved for again."""

    def _damped(self, xp: Any, state: Any) -> Step:
        point, damping = state.point, state.damping
        epsilon = float(np.finfo(float).eps)
        s = _trust.step(xp, point.subproblem, point.d, point.D, damping.radius, damping.mu, epsilon)
        return self._clipped(state, s)

    def _undamped(self, xp: Any, state: Any) -> Step | None:
        s = _trust.gauss_newton(xp, state.point.subproblem, state.point.d, state.point.D)
        return None if s is None else self._clipped(state, s)

    def _clipped(self, state: Any, s: Step) -> Step:
        p = self.bounds.clip(np, state.x + s.p) - state.x
        return Step(p, _trust.scaled_norm(np, p, state.point.D), s.mu)


class Unheld(Clipped):
    """Clipped steps in which no parameter is held, wherever the gradient points."""

    def _linearized(self, problem: Any, state: Any) -> Any:
        state = super()._linearized(problem, state)
        if state.status is not None:
            return state
        p = state.point
        return state._replace(point=Point(p.residual, p.subproblem, p.D, 1.0 / p.D))


def stepwise(solver: type[LevenbergMarquardt]) -> Callable[..., None]:
    def fit(fun, x0, jac, lb, ub):
        problem = Problem(np, fun, jac)
        run = solver(ftol=1e-14, xtol=1e-14, gtol=1e-14, max_nfev=MAX_NFEV, bounds=Box(lb, ub))
        state = run.init(problem, x0)
        while state.status is None and state.damping.radius + (state.nfev == 1) > 0:
            state = run.step(problem, state)

    return fit


def ours(fun, x0, jac, lb, ub):
    lmsolve.least_squares(fun, x0, jac, (lb, ub), **TIGHT)


def scipys(method: str) -> Callable[..., None]:
    def fit(fun, x0, jac, lb, ub):
        # SciPy wants its start strictly inside.
        inside = np.clip(x0, np.nextafter(lb, np.inf), np.nextafter(ub, -np.inf))
        scipy.optimize.least_squares(
            fun, inside, jac, (lb, ub), method=method, x_scale="jac", **TIGHT
        )

    return fit


SOLVERS: dict[str, Callable[..., None]] = {
    "lmsolve": ours,
    "[clip]": stepwise(Clipped),
    "[clip, no set]": stepwise(Unheld),
    "scipy trf": scipys("trf"),
    "scipy dogbox": scipys("dogbox"),
}


def cases(smoke: bool) -> list[Case]:
    found = []
    for name in SMOKE_NIST if smoke else nist.NAMES:
        problem = nist.load(name)
        for start in (0, 1):
            found += boxed(f"{name} {start + 1}", problem, problem.starts[start])
    for name in SMOKE_MGH if smoke else problems.PROBLEMS:
        found += boxed(name, problems.PROBLEMS[name], problems.PROBLEMS[name].start(1))
    return found


def boxed(name: str, problem: Any, x0: np.ndarray) -> list[Case]:
    """The problem in its boxes; none where x* is not found or lies at the start."""
    solution = lmsolve.least_squares(problem.fun, x0, problem.jac)
    x = solution.x
    if not solution.success or problem.fun(x0) @ problem.fun(x0) <= 2.0 * solution.cost:
        return []
    size = np.where(x != 0, np.abs(x), 1.0)
    below, above = np.minimum(x, x0) - 2 * size, np.maximum(x, x0) + 2 * size
    upwards = x0 <= x  # the side from which the solver comes
    k = np.arange(x.size)
    made = []
    for box in BOXES:
        at = {"around": k < 0, "through": k % 2 == 0, "cut": k % 3 == 0, "corner": k >= 0}[box]
        short = 0.0 if box == "through" else 0.1 * size
        ub = np.where(at & upwards, x - short, above)
        lb = np.where(at & ~upwards, x + short, below)
        start = np.clip(x0, lb, ub)
        r = problem.fun(start)
        if np.all(np.isfinite(r)) and np.all(np.isfinite(problem.jac(start))):
            made.append(Case(name, box, problem.fun, problem.jac, start, lb, ub))
    return made


def run(case: Case, name: str) -> Run:
    made = Run(case.name, case.box, name, [], [])
    count = [0]

    def check(x):
        if np.any(x < case.lb) or np.any(x > case.ub):
            raise Outside(f"{name}, {case.name} {case.box}: {x}")

    def fun(x):
        check(x)
        r = case.fun(x)
        with np.errstate(all="ignore"):
            cost = 0.5 * float(r @ r)
        made.costs.append(cost if math.isfinite(cost) else math.inf)
        made.jacobians.append(count[0])
        return r

    def jac(x):
        check(x)
        count[0] += 1
        return case.jac(x)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            SOLVERS[name](fun, case.x0.copy(), jac, case.lb, case.ub)
    except (ValueError, np.linalg.LinAlgError) as refusal:
        made.refused = f"{type(refusal).__name__}: {refusal}"
    return made


def goal(runs: list[Run]) -> float:
    """The cost to reach in one box."""
    lowest = min(min(r.costs) for r in runs if r.costs)
    first = max(r.costs[0] for r in runs if r.costs)
    return max(lowest * (1 + 1e-6), 1e-12 * first)


def report(by_case: dict[tuple[str, str], list[Run]]) -> str:
    rows = []
    for box in BOXES:
        here = {key: runs for key, runs in by_case.items() if key[1] == box}
        calls = {
            key: {r.solver: r.calls_to(goal(runs)) for r in runs} for key, runs in here.items()
        }
        full = [name for name in SOLVERS if not name.startswith("[")]
        shared = [c for c in calls.values() if all(c[name] for name in full)]
        for name in SOLVERS:
            reached = [c[name] for c in calls.values() if c[name]]
            both = [c[name] for c in shared if c[name]]
            sums = [sum(c[k] for c in both) for k in (0, 1)]
            rows.append([box, name, len(calls), len(reached), len(both), *sums])
    return table(["box", "form", "problems", "reached", "shared", "fun", "jac"], rows)


def every_run(by_case: dict[tuple[str, str], list[Run]]) -> str:
    rows = []
    for (case, box), runs in by_case.items():
        cost = goal(runs)
        cells = ["/".join(map(str, r.calls_to(cost) or ("-",))) for r in runs]
        rows.append([f"{case} {box}", f"{cost:.6g}", *cells])
    return table(["fun/jac to reach", "cost", *SOLVERS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few problems, nothing written")
    parser.add_argument("--all", action="store_true", help="every run as well")
    parser.add_argument("--output", type=Path, default=RESULTS / "bounds.json")
    args = parser.parse_args()
    by_case = {}
    for case in cases(args.smoke):
        by_case[case.name, case.box] = [run(case, name) for name in SOLVERS]
    if args.all:
        print(every_run(by_case), end="\n\n")
    print(report(by_case))
    print("\n" + footer())
    if not args.smoke:
        raw = []
        for runs in by_case.values():
            cost = goal(runs)
            for r in runs:
                calls = r.calls_to(cost)
                entry = {k: v for k, v in asdict(r).items() if k not in ("costs", "jacobians")}
                raw.append({**entry, "goal": cost, "calls": calls, "lowest": min(r.costs)})
        save(args.output, {"runs": raw})


if __name__ == "__main__":
    main()
