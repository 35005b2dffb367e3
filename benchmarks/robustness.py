"""How often is the answer right? NIST's certified sets, and the More-Garbow-Hillstrom problems.

    python benchmarks/robustness.py             # two tables, and results/robustness.json
    python benchmarks/robustness.py --smoke     # a few problems, nothing written
    python benchmarks/robustness.py --only scipy

NIST: the smallest log relative error over the parameters, 27 sets from two starts each.
More-Garbow-Hillstrom: 40 problems from 1, 10 and 100 times the standard start; what counts as
solved is defined in tests/problems.py, and all solvers get the same residual and Jacobian.

Calls are counted by wrappers: `fun` residuals, less those for finite differences, which are `fd`;
`jac` Jacobians (by differences: what the solver states, or fd / n where it states nothing).

"ms" is the processor time of all runs of a solver, the median of five rounds in which the solvers
take turns at every problem, beside lmsolve's of the same round; "MiB" the peak of a fresh process
that does all these runs, beyond what it held before (Linux).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    RESULTS,
    Counter,
    footer,
    in_fresh_process,
    peak_beyond_now,
    quartiles,
    save,
    table,
)
from scipy.optimize import least_squares as scipy_least_squares

import lmsolve
from tests import nist, problems

SMOKE = {
    "nist": ("Misra1a", "BoxBOD", "MGH17"),
    "mgh": ("rosenbrock", "bard", "watson_6", "penalty_1_4"),
}
ROUNDS = 5
MAX_NFEV = 10_000  # for SciPy with tight tolerances: convergence is tested, not the budget
REFUSED = -99  # an exception instead of a result
MARKS = {"global": "*", "local": "+", "infinity": "~", "no": ".", "exception": "!"}


@dataclass(frozen=True)
class Solver:
    """A name, `least_squares` of some library, its options, and whether it is given `jac`."""

    name: str
    least_squares: Callable[..., Any]
    options: dict[str, Any]
    exact: bool = True


@dataclass(frozen=True)
class Run:
    """One fit: its counted calls and what became of it."""

    solver: str
    problem: str
    start: int
    fun: int
    fd: int
    jac: int
    seconds: float
    status: int
    success: bool
    message: str
    cost: float
    digits: float = 0.0
    outcome: str = ""


@dataclass(frozen=True)
class Price:
    """Processor seconds of all runs of a solver, one figure a round, and peak memory in MiB."""

    suite: str
    solver: str
    seconds: list[float]
    peak: float | None


def tight(tol: float, **options: Any) -> dict[str, Any]:
    return {"ftol": tol, "xtol": tol, "gtol": tol, "max_nfev": MAX_NFEV, **options}


def nist_solvers() -> list[Solver]:
    rows = []
    for exact in (False, True):
        jac = "exact" if exact else "2-point"
        for method in ("lm", "trf"):
            name = f"scipy {method}"
            options = {"method": method}
            rows.append(Solver(f"{name} {jac}", scipy_least_squares, options, exact))
            options = tight(1e-15, method=method)
            rows.append(Solver(f"{name} {jac} 1e-15", scipy_least_squares, options, exact))
        rows.append(Solver(f"lmsolve {jac}", lmsolve.least_squares, {}, exact))
    return rows


def mgh_solvers() -> list[Solver]:
    rows = []
    for method in ("lm", "trf", "dogbox"):
        for scale in (1.0, "jac"):
            options = tight(1e-12, method=method, x_scale=scale)
            rows.append(Solver(f"scipy {method} x_scale={scale}", scipy_least_squares, options))
    return [*rows, Solver("lmsolve", lmsolve.least_squares, {})]


def fit(solver: Solver, problem: Any, name: str, start: int, x0: Any) -> tuple[Run, Any]:
    """Run one solver on one problem; a refusal (an exception) is a run that failed."""
    fun, jac = Counter(problem.fun), Counter(problem.jac)
    options = dict(solver.options, jac=jac) if solver.exact else solver.options
    x, result, message = x0, None, ""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's own, on overflow
            result = solver.least_squares(fun, x0.copy(), **options)
        x, message = result.x, result.message
    except (ValueError, np.linalg.LinAlgError) as refusal:
        message = f"{type(refusal).__name__}: {refusal}"
    seconds = round(time.process_time() - began, 6)
    fd = 0 if solver.exact or result is None else fun.calls - result.nfev
    by_differences = getattr(result, "njev", None) or fd // x0.shape[0]
    run = Run(
        solver=solver.name,
        problem=name,
        start=start,
        fun=fun.calls - fd,
        fd=fd,
        jac=jac.calls if solver.exact else by_differences,
        seconds=seconds,
        status=int(result.status) if result is not None else REFUSED,
        success=bool(result.success) if result is not None else False,
        message=message,
        cost=_cost(problem.fun(x)) if result is not None else np.inf,
    )
    return run, x


def _cost(r: Any) -> float:
    with np.errstate(over="ignore"):
        return 0.5 * float(np.sum(r**2))


def run_nist(solvers: list[Solver], names: tuple[str, ...]) -> list[Run]:
    runs = []
    for name in names:
        problem = nist.load(name)
        for start in (0, 1):
            for solver in solvers:
                run, x = fit(solver, problem, name, start + 1, problem.starts[start])
                digits = nist.digits(x, problem.certified)
                runs.append(Run(**{**asdict(run), "digits": digits}))
    return runs


def run_mgh(solvers: list[Solver], names: tuple[str, ...]) -> list[Run]:
    runs = []
    for name in names:
        problem = problems.PROBLEMS[name]
        for factor in problems.FACTORS:
            for solver in solvers:
                run, _ = fit(solver, problem, name, factor, problem.start(factor))
                found = "exception" if run.status == REFUSED else outcome(problem, run.cost)
                runs.append(Run(**{**asdict(run), "outcome": found}))
    return runs


def outcome(problem: problems.Problem, cost: float) -> str:
    if problem.solved(cost, problem.cost_min[:1]):
        return "global"
    if problem.solved(cost):
        return "local"
    return "infinity" if problem.solved(cost, problem.cost_infinity) else "no"


SUITES: dict[str, tuple[list[Solver], Callable[..., list[Run]], tuple[str, ...]]] = {
    "nist": (nist_solvers(), run_nist, nist.NAMES),
    "mgh": (mgh_solvers(), run_mgh, tuple(problems.PROBLEMS)),
}


def prices(suite: str, rounds: list[list[Run]]) -> list[Price]:
    """What the runs of each solver took, those of a round in one sum."""
    found = []
    names = list(dict.fromkeys(r.problem for r in rounds[0]))
    for name in dict.fromkeys(r.solver for r in rounds[0]):
        seconds = [sum(r.seconds for r in runs if r.solver == name) for runs in rounds]
        peak = in_fresh_process(__file__, "--peak", suite, name, *names)
        found.append(Price(suite, name, seconds, peak))
    return found


def print_peak(suite: str, name: str, *names: str) -> None:
    """The child's side of `prices`."""
    solvers, run, _ = SUITES[suite]
    chosen = [s for s in solvers if s.name == name]
    print(peak_beyond_now(lambda: run(chosen, names)))


def price_report(found: list[Price]) -> str:
    by_name = {p.solver: p for p in found}
    rows = []
    for p in found:
        low, middle, high = (1e3 * s for s in quartiles(p.seconds))
        kind = " 2-point" if "2-point" in p.solver else " exact" if "exact" in p.solver else ""
        ours = by_name.get(f"lmsolve{kind}")
        ratio = "-" if ours is None else f"{np.median(np.divide(p.seconds, ours.seconds)):.2f}"
        rows.append([
            p.solver, f"{middle:,.0f}", f"{low:,.0f} .. {high:,.0f}", ratio,
            "-" if p.peak is None else p.peak,
        ])  # fmt: skip
    return table(["all runs", "ms", "quartiles", "to lmsolve", "MiB"], rows)


def nist_report(runs: list[Run], solvers: list[Solver]) -> str:
    """Digits of every run, then the counts, then the price beside SciPy's tight lm."""
    by_key = {(r.problem, r.start, r.solver): r for r in runs}
    cases = list(dict.fromkeys((r.problem, r.start) for r in runs))
    names = [s.name for s in solvers]
    grid = [
        [f"{problem} {start}", *(by_key[problem, start, name].digits for name in names)]
        for problem, start in cases
    ]
    lines = [
        "NIST StRD, digits of the worst parameter (11 are certified)",
        "\n".join(f"  [{k}] {name}" for k, name in enumerate(names)),
        table(["set, start", *(f"[{k}]" for k in range(len(names)))], grid),
        table(
            ["solver", "runs", ">=4", ">=6", ">=8", ">=9", ">=10", "mean", "worst", "false success",
             "fun", "fd", "jac"],
            [_nist_summary([r for r in runs if r.solver == name], name) for name in names],
        ),
    ]  # fmt: skip
    lines += [
        _price(by_key, cases, f"scipy lm {jac} 1e-15", f"lmsolve {jac}")
        for jac in ("2-point", "exact")
    ]
    return "\n\n".join(line for line in lines if line)


def _nist_summary(runs: list[Run], name: str) -> list[Any]:
    digits = np.array([r.digits for r in runs])
    reached = [int(np.sum(digits >= d)) for d in (4, 6, 8, 9, 10)]
    false = sum(r.success and r.digits < 4 for r in runs)
    return [
        name,
        len(runs),
        *reached,
        float(digits.mean()),
        float(digits.min()),
        false,
        *_calls(runs),
    ]


def _calls(runs: list[Run]) -> list[int]:
    return [sum(r.fun for r in runs), sum(r.fd for r in runs), sum(r.jac for r in runs)]


def _price(by_key: dict[Any, Run], cases: list[Any], peer: str, ours: str) -> str:
    """Calls of both over the runs that the peer solves to 6 digits."""
    if not all((*cases[0], name) in by_key for name in (peer, ours)):
        return ""
    solved = [case for case in cases if by_key[(*case, peer)].digits >= 6]
    rows = [
        [name, len(solved), *_calls([by_key[(*case, name)] for case in solved])]
        for name in (peer, ours)
    ]
    ratios = [b / a if a else float("nan") for a, b in zip(rows[0][2:], rows[1][2:])]
    rows.append(["ratio", "", *(f"{ratio:.2f}" for ratio in ratios)])
    return table([f"where {peer} has 6 digits", "runs", "fun", "fd", "jac"], rows)


def mgh_report(runs: list[Run], solvers: list[Solver]) -> str:
    """Outcome of every run, one mark for each of the three starts, then the counts."""
    by_key = {(r.problem, r.start, r.solver): r for r in runs}
    names = [s.name for s in solvers]
    rows = [
        [
            problem,
            *(
                "".join(MARKS[by_key[problem, f, name].outcome] for f in problems.FACTORS)
                for name in names
            ),
        ]
        for problem in dict.fromkeys(r.problem for r in runs)
    ]
    legend = ", ".join(f"{mark} {word}" for word, mark in MARKS.items())
    return "\n\n".join(
        [
            "More-Garbow-Hillstrom, from 1, 10 and 100 times the standard start",
            f"  {legend}",
            "\n".join(f"  [{k}] {name}" for k, name in enumerate(names)),
            table(["problem", *(f"[{k}]" for k in range(len(names)))], rows),
            table(
                ["solver", "runs", "global", "solved", "+ infinity", "false success", "fun", "jac"],
                [_mgh_summary([r for r in runs if r.solver == name], name) for name in names],
            ),
            _together(by_key, names),
        ]
    )


def _mgh_summary(runs: list[Run], name: str) -> list[Any]:
    best, local, away = (
        sum(r.outcome == word for r in runs) for word in ("global", "local", "infinity")
    )
    false = sum(r.success and r.outcome == "no" for r in runs)
    fun, _, jac = _calls(runs)
    return [name, len(runs), best, best + local, best + local + away, false, fun, jac]


def _together(by_key: dict[Any, Run], names: list[str]) -> str:
    """What the solvers solve between them, and the calls where all of them do."""
    cases = list(dict.fromkeys(key[:2] for key in by_key))
    solved = {
        case: [name for name in names if by_key[(*case, name)].outcome in ("global", "local")]
        for case in cases
    }
    nobody = [f"{problem} x{factor}" for (problem, factor), who in solved.items() if not who]
    shared = [case for case, who in solved.items() if len(who) == len(names)]
    rows = []
    for name in names:
        fun, _, jac = _calls([by_key[(*case, name)] for case in shared])
        rows.append([name, len(shared), fun, jac])
    return (
        f"Solved by at least one: {len(cases) - len(nobody)} of {len(cases)}. "
        f"By none: {', '.join(nobody) or '-'}.\n\n"
        + table(["where all solve", "runs", "fun", "jac"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few problems, nothing written")
    parser.add_argument("--only", default="", help="only the solvers with this in their name")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "robustness.json", help="raw figures"
    )
    parser.add_argument("--peak", nargs="+", metavar="NAME", help="MiB of one solver's runs")
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak)
        return
    raw: dict[str, list[Any]] = {"prices": []}
    for suite, report in (("nist", nist_report), ("mgh", mgh_report)):
        solvers, run, names = SUITES[suite]
        chosen = [s for s in solvers if args.only in s.name]
        names = SMOKE[suite] if args.smoke else names
        rounds = [run(chosen, names) for _ in range(2 if args.smoke else ROUNDS)]
        priced = prices(suite, rounds)
        print(report(rounds[0], chosen), price_report(priced), sep="\n\n", end="\n\n\n")
        raw[suite] = [asdict(run) for run in rounds[0]]
        raw["prices"] += [asdict(price) for price in priced]
    print(footer())
    if not args.smoke:
        save(args.output, raw)


if __name__ == "__main__":
    main()
