"""How long does a small fit take? Four curve fits of 3 to 10 parameters, beside SciPy and lmfit.

    python benchmarks/small_fits.py             # the table, and results/small_fits.json
    python benchmarks/small_fits.py --smoke     # one problem, few repeats, nothing written
    python benchmarks/small_fits.py --seconds 20

All solvers fit the same data from the same start with their own default tolerances, and take
turns; 10 ms of fits in a row make one sample. Times are medians in one process, in processor time,
so that what else the machine does stays out (--clock wall for wall time). "to lm" is the ratio to
`scipy.optimize.least_squares(method='lm')`, "to curve_fit" that to SciPy's `curve_fit`, as the
median over the rounds of the ratio within a round. Calls are counted by wrappers, those for finite
differences included. "excess" is the relative distance of the cost from the lowest one found; a
solver that ends more than 1e-6 above it gets no ratio. optimistix and nlsq, where they are
installed (`make bench-env`), differentiate by JAX and stand in the exact rows; they compiled before
the clock starts, and their calls are not counted. "MiB" is the peak of one fit in a fresh process
beyond imports and data, compilation included (Linux).
"""

from __future__ import annotations

import argparse
import importlib.util
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
    Counter,
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

EQUAL = 1e-6
SAMPLE = 0.01  # seconds of fits, one after the other, that one timing is made of
REFERENCE, CURVE_FIT = "scipy least_squares lm", "scipy curve_fit"


@dataclass(frozen=True)
class Curve:
    """A model f(t, *p) with its Jacobian (m, n), data t and y (m,), and a start p0 (n,).

    ``model_in(xp)`` is the model in another array library.
    """

    name: str
    model_in: Callable[[Any], Callable[..., Any]]
    model: Callable[..., np.ndarray]
    jac: Callable[..., np.ndarray]
    t: Any
    y: np.ndarray
    p0: np.ndarray


@dataclass(frozen=True)
class Timing:
    """One solver on one problem."""

    problem: str
    jac: str
    solver: str
    seconds: list[float]
    cost: float
    fun_calls: int
    jac_calls: int
    peak: float | None


def decay() -> Curve:
    t = np.linspace(0, 4, 100)

    def model_in(xp):
        def model(t, a, k, c):
            return a * xp.exp(-k * t) + c

        return model

    def jac(t, a, k, c):
        J = np.empty((t.size, 3))
        J[:, 0] = np.exp(-k * t)
        J[:, 1] = -a * t * J[:, 0]
        J[:, 2] = 1
        return J

    return _with_noise("decay 3 x 100", model_in, jac, t, [2.5, 1.3, 0.5], 0.02, [1, 1, 1])


def peak() -> Curve:
    t = np.linspace(-5, 5, 1000)

    def model_in(xp):
        def model(t, a, c, s, b):
            return a * xp.exp(-0.5 * ((t - c) / s) ** 2) + b

        return model

    def jac(t, a, c, s, b):
        J = np.empty((t.size, 4))
        u = (t - c) / s
        J[:, 0] = e = np.exp(-0.5 * u * u)
        J[:, 1] = d = a / s * e * u
        J[:, 2] = d * u
        J[:, 3] = 1
        return J

    return _with_noise("peak 4 x 1000", model_in, jac, t, [3, 0.7, 1.2, 0.3], 0.05, [1, 0, 2, 0])


def three_peaks() -> Curve:
    t = np.linspace(0, 10, 10_000)

    def model_in(xp):
        def model(t, *p):
            y = xp.full(t.size, p[9])
            for a, c, s in (p[0:3], p[3:6], p[6:9]):
                y += a * xp.exp(-0.5 * ((t - c) / s) ** 2)
            return y

        return model

    def jac(t, *p):
        J = np.empty((t.size, 10), order="F")
        for k in (0, 3, 6):
            a, c, s = p[k : k + 3]
            u = (t - c) / s
            J[:, k] = e = np.exp(-0.5 * u * u)
            J[:, k + 1] = d = a / s * e * u
            J[:, k + 2] = d * u
        J[:, 9] = 1
        return J

    true = [3, 2, 0.5, 2, 5, 0.7, 4, 7.5, 0.4, 0.2]
    start = [2.5, 2.2, 0.6, 1.5, 5.3, 0.6, 3, 7.3, 0.5, 0]
    return _with_noise("3 peaks 10 x 10000", model_in, jac, t, true, 0.05, start)


def spot() -> Curve:
    side = np.linspace(-3, 3, 200)
    uv = np.stack([g.ravel() for g in np.meshgrid(side, side)])

    def turned(xp, uv, cu, cv, angle):
        c, s = xp.cos(angle), xp.sin(angle)
        u, v = uv[0] - cu, uv[1] - cv
        return u * c + v * s, v * c - u * s, c, s

    def model_in(xp):
        def model(uv, h, cu, cv, su, sv, angle, b):
            u, v, _, _ = turned(xp, uv, cu, cv, angle)
            return h * xp.exp(-0.5 * ((u / su) ** 2 + (v / sv) ** 2)) + b

        return model

    def jac(uv, h, cu, cv, su, sv, angle, b):
        u, v, c, s = turned(np, uv, cu, cv, angle)
        e = np.exp(-0.5 * ((u / su) ** 2 + (v / sv) ** 2))
        J = np.empty((e.size, 7), order="F")
        J[:, 0] = e
        e *= h
        du, dv = e * u / su**2, e * v / sv**2
        J[:, 1] = du * c - dv * s
        J[:, 2] = du * s + dv * c
        J[:, 3] = du * u / su
        J[:, 4] = dv * v / sv
        J[:, 5] = dv * u - du * v
        J[:, 6] = 1
        return J

    true = [2, 0.3, -0.4, 0.8, 1.3, 0.4, 0.1]
    start = [1.5, 0, 0, 1, 1.1, 0.2, 0]
    return _with_noise("2-D peak 7 x 40000", model_in, jac, uv, true, 0.05, start)


def _with_noise(name, model_in, jac, t, true, sigma, p0) -> Curve:
    model = model_in(np)
    y = model(t, *true)
    y = y + sigma * np.random.default_rng(0).standard_normal(y.shape)
    return Curve(name, model_in, model, jac, t, y, np.array(p0, dtype=float))


CURVES = (decay, peak, three_peaks, spot)
Solve = Callable[[Callable[..., Any], Callable[..., Any] | None], Any]


def solvers(curve: Curve) -> dict[str, Solve]:
    """Each takes the model and its Jacobian, or None for forward differences, and returns x."""
    t, y, p0 = curve.t, curve.y, curve.p0

    def residuals(model, jac):
        return (
            lambda p: model(t, *p) - y,
            "2-point" if jac is None else lambda p: jac(t, *p),
        )

    def ours(model, jac):
        return lmsolve.least_squares(*_in_order(residuals(model, jac), p0)).x

    def scipy_method(method):
        def solve(model, jac):
            arguments = _in_order(residuals(model, jac), p0)
            return scipy.optimize.least_squares(*arguments, method=method).x

        return solve

    def leastsq(model, jac):
        fun, Dfun = residuals(model, jac)
        return scipy.optimize.leastsq(fun, p0, Dfun=None if jac is None else Dfun)[0]

    return {
        "lmsolve least_squares": ours,
        REFERENCE: scipy_method("lm"),
        "scipy least_squares trf": scipy_method("trf"),
        "scipy leastsq": leastsq,
        "lmsolve curve_fit": lambda model, jac: lmsolve.curve_fit(model, t, y, p0, jac=jac)[0],
        CURVE_FIT: lambda model, jac: scipy.optimize.curve_fit(model, t, y, p0, jac=jac)[0],
    }


def _in_order(pair: tuple[Any, Any], p0: np.ndarray) -> tuple[Any, Any, Any]:
    return pair[0], p0, pair[1]


def _lmfit(curve: Curve) -> Solve:
    import lmfit

    start = lmfit.Parameters()
    for k, value in enumerate(curve.p0):
        start.add(f"p{k}", value)

    def values(params):
        return [p.value for p in params.values()]

    def solve(model, jac):
        options = {} if jac is None else {"Dfun": lambda q: jac(curve.t, *values(q))}

        def residual(q):
            return model(curve.t, *values(q)) - curve.y

        return np.array(values(lmfit.minimize(residual, start, **options).params))

    return solve


def _optimistix(curve: Curve) -> Solve:
    """A compiled fit with JAX's derivatives; it does not call the model or the Jacobian given."""
    import jax
    import optimistix

    jax.config.update("jax_enable_x64", True)
    model = curve.model_in(jax.numpy)
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    t, y = jax.numpy.asarray(curve.t), jax.numpy.asarray(curve.y)

    @jax.jit
    def fit(p0):
        def residuals(p, _):
            return model(t, *p) - y

        return optimistix.least_squares(residuals, solver, p0, max_steps=None, throw=False).value

    return lambda *_: np.asarray(fit(curve.p0))


def _nlsq(curve: Curve) -> Solve:
    """The same of nlsq, whose object keeps what it compiled from one fit to the next."""
    import jax
    import nlsq

    logging.disable(logging.CRITICAL)  # it reports each iteration
    model, fitter = curve.model_in(jax.numpy), nlsq.CurveFit()

    def solve(*_):
        popt, _ = fitter.curve_fit(model, curve.t, curve.y, p0=curve.p0)
        return np.asarray(popt)

    return solve


PEERS: dict[str, Callable[[Curve], Solve]] = {"lmfit minimize leastsq": _lmfit}
JAX: dict[str, Callable[[Curve], Solve]] = {
    "optimistix LM, jit": _optimistix,
    "nlsq curve_fit, jit": _nlsq,
}


def installed(exact: bool) -> dict[str, Callable[[Curve], Solve]]:
    """The peers beside SciPy that make a solver of a curve."""
    wanted = PEERS | JAX if exact else PEERS
    return {k: make for k, make in wanted.items() if importlib.util.find_spec(k.split()[0])}


def print_peak(problem: str, jac: str, name: str) -> None:
    """Peak memory in MiB of one fit, in this process; only this solver's library is loaded."""
    curve, exact = next(make for make in CURVES if make.__name__ == problem)(), jac == "exact"
    make = installed(exact).get(name)
    solve = make(curve) if make else solvers(curve)[name]
    print(peak_beyond_now(lambda: solve(curve.model, curve.jac if exact else None)))


def measure(
    make_curve: Callable[[], Curve], exact: bool, budget: float, least: int, clock: Clock
) -> list[Timing]:
    curve = make_curve()
    jac, kind = (curve.jac, "exact") if exact else (None, "2-point")
    peers = {name: make(curve) for name, make in installed(exact).items()}
    runs, counted, fits = {}, {}, {}
    for name, solve in (solvers(curve) | peers).items():
        model, counted_jac = Counter(curve.model), Counter(curve.jac)
        p = solve(model, counted_jac if exact else None)
        cost = 0.5 * float(np.sum((curve.model(curve.t, *p) - curve.y) ** 2))
        peak = in_fresh_process(__file__, "--peak", make_curve.__name__, kind, name)
        counted[name] = (cost, model.calls, counted_jac.calls, peak)
        once = seconds_of(lambda solve=solve: solve(curve.model, jac))
        fits[name] = k = max(1, round(SAMPLE / once))
        runs[name] = lambda solve=solve, k=k: [solve(curve.model, jac) for _ in range(k)]
    seconds = take_turns(runs, budget, least, clock=clock)
    seconds = {name: [s / fits[name] for s in of] for name, of in seconds.items()}
    return [Timing(curve.name, kind, name, seconds[name], *counted[name]) for name in runs]


def rows_of(timings: list[Timing]) -> list[list[Any]]:
    """Table rows of one problem with one kind of Jacobian."""
    by_name = {t.solver: t for t in timings}
    best = min(t.cost for t in timings)
    rows = []
    for t in timings:
        low, middle, high = (1e6 * s for s in quartiles(t.seconds))
        equal = t.cost <= best * (1 + EQUAL)
        ratios = [
            f"{ratio(t, by_name[peer]):.2f}" if equal else "-" for peer in (REFERENCE, CURVE_FIT)
        ]
        rows.append([
            t.problem, t.jac, t.solver, f"{middle:,.0f}", f"{low:,.0f} .. {high:,.0f}", *ratios,
            t.fun_calls, t.jac_calls, f"{t.cost / best - 1:.0e}", "-" if t.peak is None else t.peak,
        ])  # fmt: skip
    return rows


def ratio(ours: Timing, peer: Timing) -> float:
    """Median over the rounds of the ratio within a round."""
    return float(np.median(np.divide(ours.seconds, peer.seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few repeats, nothing written")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each problem and jac")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "small_fits.json")
    parser.add_argument("--peak", nargs=3, metavar=("PROBLEM", "JAC", "SOLVER"), help="one fit's")
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak)
        return
    budget, least = (0.2, 2) if args.smoke else (args.seconds, 7)
    timings, rows = [], []
    for problem in CURVES[:1] if args.smoke else CURVES:
        for exact in (False, True):
            found = measure(problem, exact, budget, least, CLOCKS[args.clock])
            timings += found
            rows += rows_of(found)
    print(table(
        ["problem", "jac", "solver", "us", "quartiles", "to lm", "to curve_fit", "fun", "jac",
         "excess", "MiB"], rows,
    ))  # fmt: skip
    print("\n" + footer())
    if not args.smoke:
        save(args.output, {"clock": args.clock, "timings": [asdict(t) for t in timings]})


if __name__ == "__main__":
    main()
