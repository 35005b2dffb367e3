"""How far from the floor is an iteration on a large dense problem, and what memory does it take?

    python benchmarks/large_dense.py                # four shapes, and results/large_dense.json
    python benchmarks/large_dense.py --alone        # without the peers, which take 20 minutes
    python benchmarks/large_dense.py --shapes 1000000x20    # one of them; the others' figures stay
    python benchmarks/large_dense.py --smoke        # small shapes, nothing written
    python benchmarks/large_dense.py --clock cpu    # on a machine that does other work as well

The floor of an iteration is one Jacobian, one residual, J'J, J'r and one Cholesky factorisation,
in NumPy, on the same problem in the same run, floor and fits taking turns. "ms/iteration" is the
time of a whole fit over its Jacobians, everything included. The peers run once each: SciPy's lm and
trf with the same `fun` and `jac`, optimistix and nlsq (`make bench-env`) with JAX's derivatives,
compiled before the clock starts. On the two shapes of most parameters they are stopped after a few
evaluations, since a whole fit takes some of them minutes; elsewhere the costs must agree.

The problem, tanh(A x) = y with noise, has `fun` and `jac` that write into arrays made beforehand:
J exists once, and memory (Linux: the peak of a fresh process beyond what it holds when the fit
starts, in units of J) is what the solver takes on top. An n x n matrix is n / m of J.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from _common import (
    CLOCKS,
    RESULTS,
    Clock,
    environment,
    footer,
    in_fresh_process,
    peak_beyond_now,
    quartiles,
    save,
    seconds_of,
    table,
    take_turns,
)

import lmsolve

SHAPES = ((1_000_000, 20), (100_000, 200), (20_000, 1000), (5_000, 2000))
SMOKE = ((20_000, 10), (500, 100))
PEER_NFEV, STOPPED_FROM = 3, 500
EQUAL = 1e-6
TARGET = 1.25


class Tanh:
    """Residuals tanh(A x) - y (m,) and their Jacobian (m, n), each written into one array."""

    def __init__(self, m: int, n: int, order: str = "C") -> None:
        rng = np.random.default_rng(0)
        self.A = rng.standard_normal((m, n))
        self.y = np.tanh(self.A @ rng.normal(0, 1 / np.sqrt(n), n))
        self.y += 0.01 * rng.standard_normal(m)
        # Ones, not zeros: pages of zeros take no memory before they are written to.
        self.J = np.ones((m, n), order=order)
        self.r, self.slope = np.ones(m), np.ones(m)
        self.x0 = np.zeros(n)
        self.jax = self.optimistix = self.nlsq = None  # what is compiled once

    def fun(self, x: np.ndarray) -> np.ndarray:
        np.tanh(np.dot(self.A, x, out=self.r), out=self.r)
        self.r -= self.y
        return self.r

    def jac(self, x: np.ndarray) -> np.ndarray:
        s = np.tanh(np.dot(self.A, x, out=self.slope), out=self.slope)
        s *= s
        np.subtract(1, s, out=s)
        return np.multiply(self.A, s[:, None], out=self.J)


@dataclass(frozen=True)
class Timing:
    """Seconds per iteration of one solver; peak memory beyond J in units of J."""

    m: int
    n: int
    solver: str
    seconds: list[float]
    cost: float | None
    nfev: int | None
    njev: int | None
    message: str
    peak: float | None


def floor(p: Tanh) -> None:
    r, J = p.fun(p.x0), p.jac(p.x0)
    G = J.T @ J
    J.T @ r
    G.ravel()[:: G.shape[0] + 1] *= 1.001
    np.linalg.cholesky(G)


def ours(p: Tanh) -> Any:
    return lmsolve.least_squares(p.fun, p.x0, p.jac)


def scipys(method: str) -> Callable[[Tanh], Any]:
    def fit(p: Tanh) -> Any:
        return scipy.optimize.least_squares(
            p.fun, p.x0, p.jac, method=method, x_scale="jac", max_nfev=few(p)
        )

    return fit


def few(p: Tanh) -> int | None:
    """Evaluations that a peer is given; None for as many as it wants."""
    return PEER_NFEV if p.A.shape[1] >= STOPPED_FROM else None


def in_jax(p: Tanh) -> Callable[..., Any]:
    """The residuals as a function of JAX, their data made once."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if p.jax is None:
        A, y = jax.numpy.asarray(p.A), jax.numpy.asarray(p.y)
        p.jax = lambda x, _=None: jax.numpy.tanh(A @ x) - y
    return p.jax


def optimistixs(p: Tanh) -> Any:
    import jax
    import optimistix

    fun = in_jax(p)
    if p.optimistix is None:
        solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)

        @jax.jit
        def fit(x0):
            found = optimistix.least_squares(fun, solver, x0, max_steps=few(p) or 256, throw=False)
            r = fun(found.value)
            return 0.5 * r @ r, found.stats["num_steps"]

        p.optimistix = fit
    cost, steps = p.optimistix(p.x0)
    return scipy.optimize.OptimizeResult(
        cost=float(cost), nfev=int(steps), njev=int(steps), message=""
    )


def nlsqs(p: Tanh) -> Any:
    import nlsq

    logging.disable(logging.CRITICAL)  # it reports each iteration
    if p.nlsq is None:
        p.nlsq = nlsq.LeastSquares()  # keeps what it compiled from one fit to the next
    return p.nlsq.least_squares(in_jax(p), p.x0, max_nfev=few(p))


PEERS = {"scipy trf": scipys("trf"), "scipy lm": scipys("lm")}
JAX = {"optimistix": optimistixs, "nlsq": nlsqs}
PEERS |= {name: solve for name, solve in JAX.items() if importlib.util.find_spec(name)}
RUNS: dict[str, Callable[[Tanh], Any]] = {"floor": floor, "lmsolve": ours, **PEERS}


def measure(m: int, n: int, budget: float, clock: Clock, peers: bool) -> list[Timing]:
    p = Tanh(m, n)
    fit = ours(p)
    steady = {"floor": lambda: floor(p), "lmsolve": lambda: ours(p)}
    seconds = take_turns(steady, budget, least=3, most=15, clock=clock)
    per_iteration = [s / fit.njev for s in seconds["lmsolve"]]
    found = [
        Timing(m, n, "floor", seconds["floor"], None, 1, 1, "", _peak("floor", m, n)),
        Timing(m, n, "lmsolve", per_iteration, fit.cost, fit.nfev, fit.njev, fit.message,
               _peak("lmsolve", m, n)),
    ]  # fmt: skip
    for name, solve in PEERS.items() if peers else ():
        kept: list[Any] = []
        if name in JAX:
            solve(p)  # compiles
        took = seconds_of(lambda: kept.append(solve(p)), clock)  # noqa: B023  (called at once)
        result = kept[0]
        njev = result.njev or result.nfev
        found.append(Timing(m, n, name, [took / njev], result.cost, result.nfev, njev,
                            result.message, _peak(name, m, n)))  # fmt: skip
        assert few(p) or abs(result.cost / fit.cost - 1) <= EQUAL, (name, result.cost, fit.cost)
    return found


def _peak(name: str, m: int, n: int) -> float | None:
    """Peak memory of a run in a fresh process, in units of J."""
    mib = in_fresh_process(__file__, "--peak", name, str(m), str(n))
    return None if mib is None else mib * 2**20 / (8 * m * n)


def print_peak(name: str, m: int, n: int) -> None:
    """The child's side of `_peak`. A small fit comes first: libraries make their buffers."""
    run = RUNS[name]
    run(Tanh(1000, 300))
    p = Tanh(m, n)
    if name in JAX:
        in_jax(p)  # a copy of the data
    print(peak_beyond_now(lambda: run(p)))


def rows_of(timings: list[Timing]) -> list[list[Any]]:
    base = timings[0]
    rows = []
    for t in timings:
        low, middle, high = (1e3 * s for s in quartiles(t.seconds))
        together = len(t.seconds) == len(base.seconds)
        ratios = np.divide(t.seconds, base.seconds if together else np.median(base.seconds))
        rows.append([
            f"{t.m} x {t.n}", t.solver, f"{middle:,.1f}", f"{low:,.1f} .. {high:,.1f}",
            f"{np.median(ratios):.2f}", "-" if t.peak is None else f"{t.peak:.2f}",
            t.nfev, t.njev, "" if t.cost is None else f"{t.cost:.8g}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="some of the four, or others")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS / "large_dense.json")
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "M", "N"), help="MiB of one run")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
        return
    shapes = SMOKE if args.smoke else SHAPES
    if args.shapes:
        shapes = tuple((int(m), int(n)) for m, n in (s.split("x") for s in args.shapes))
    timings: list[dict[str, Any]] = []
    head = ["m x n", "solver", "ms/iteration", "quartiles", "to floor", "peak/J", "nfev", "njev",
            "cost"]  # fmt: skip
    for m, n in shapes:
        budget = 0.2 if args.smoke else args.seconds
        found = measure(m, n, budget, CLOCKS[args.clock], not args.alone)
        print(table(head, rows_of(found)), end="\n\n", flush=True)
        timings += [{**asdict(t), "date": environment()["date"]} for t in found]
    print(f"clock: {args.clock}; target: {TARGET} to the floor\n{footer()}")
    if not args.smoke:
        before = json.loads(args.output.read_text())["timings"] if args.output.exists() else []
        others = [t for t in before if (t["m"], t["n"]) not in shapes]
        save(args.output, {"clock": args.clock, "timings": others + timings})


if __name__ == "__main__":
    main()
