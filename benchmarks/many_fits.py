"""How many small fits a second? 10,000 decays of 50 points, and a million spots on a GPU.

    python benchmarks/many_fits.py              # the tables, and results/many_fits.json
    python benchmarks/many_fits.py --smoke      # 200 fits, lmsolve and SciPy, nothing written
    python benchmarks/many_fits.py --only scipy
    python benchmarks/many_fits.py --fits 100000 --repeats 3
    python benchmarks/many_fits.py --clock cpu  # CPU time of all threads, on a busy machine

Every solver fits a exp(-k x) + c to the same data from the same start, with its own tolerances;
those that compile have compiled before the clock starts, and the table says how long that took.
The runs of all solvers take turns, so that what else the machine does falls on all alike. A fit
counts as solved when its cost is within 1e-6 of the lowest that any solver found for it, and the
distance is from the exact minimum (median and worst over the fits that were solved).

Peak memory (Linux) is that of a fresh process beyond imports and data, compilation included.

With a CUDA device: five-parameter 2-D Gaussian spots of 12 x 12 pixels in float32, Gpufit's own
example of its class; the GPU is waited for before the clock is read.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from _common import CLOCKS, RESULTS, Clock, footer, in_fresh_process, peak_beyond_now, save

from lmsolve import curve_fit_many

P0 = (2.0, 1.0, 0.5)
# Shares of the fits that are enough for those that are two and three orders of magnitude slower.
SLOW = {"lmfit Model.fit, loop": 0.05, "nlsq curve_fit, loop": 0.01}


@dataclass(frozen=True)
class Data:
    """The decays: x (m,), y (B, m)."""

    x: np.ndarray
    y: np.ndarray


@dataclass
class Fitted:
    """What a run returns: parameters (B, n), and means of the calls per fit where they are told."""

    x: np.ndarray
    nfev: float | None = None
    njev: float | None = None


@dataclass
class Row:
    """One solver in the table; seconds of every run, for `fits` fits."""

    name: str
    package: str
    fits: int
    compiling: float
    seconds: list[float] = field(default_factory=list)
    nfev: float | None = None
    njev: float | None = None
    solved: float = 0.0
    distance_median: float = 0.0
    distance_worst: float = 0.0
    peak_mib: float | None = None

    @property
    def rates(self) -> list[float]:
        return [self.fits / s for s in self.seconds]


def decay(x, a, k, c):
    return a * np.exp(-k * x) + c


def decay_columns(x, a, k, c):
    e = np.exp(-k * x)
    return e, -a * x * e, np.ones_like(e)


def decay_jac(x, a, k, c):
    return np.stack(decay_columns(x, a, k, c), axis=1)


def make_data(fits: int) -> Data:
    rng = np.random.default_rng(0)
    true = rng.uniform([1, 0.5, 0.2], [5, 2, 1], (fits, 3))
    x = np.linspace(0, 4, 50)
    y = decay(x, *true.T[:, :, None]) + 0.05 * rng.standard_normal((fits, 50))
    return Data(x, y)


# The solvers: each takes the data and returns what runs all fits once.

Prepare = Callable[[Data], Callable[[], Fitted]]


def ours(**options: Any) -> Prepare:
    def prepare(data: Data) -> Callable[[], Fitted]:
        def run() -> Fitted:
            result = curve_fit_many(decay, data.x, data.y, P0, **options)
            return Fitted(result.x, float(result.nfev.mean()), float(result.njev.mean()))

        return run

    return prepare


def ours_torch(data: Data) -> Callable[[], Fitted]:
    import torch

    x, y = torch.as_tensor(data.x), torch.as_tensor(data.y)

    def run() -> Fitted:
        result = curve_fit_many(lambda x, a, k, c: a * torch.exp(-k * x) + c, x, y, P0)
        nfev, njev = (float(n.double().mean()) for n in (result.nfev, result.njev))
        return Fitted(result.x.numpy(), nfev, njev)

    return run


def scipy_curve_fit(data: Data) -> Callable[[], Fitted]:
    def run() -> Fitted:
        x, calls = [], 0
        for y in data.y:
            popt, _, info, *_ = scipy.optimize.curve_fit(decay, data.x, y, P0, full_output=True)
            x.append(popt)
            calls += info["nfev"]
        return Fitted(np.array(x), calls / len(x))

    return run


def scipy_leastsq(data: Data) -> Callable[[], Fitted]:
    def residual(p, x, y):
        return p[0] * np.exp(-p[1] * x) + p[2] - y

    def jac(p, x, y):
        e = np.exp(-p[1] * x)
        return np.stack([e, -p[0] * x * e, np.ones_like(e)])

    def run() -> Fitted:
        x, nfev, njev = [], 0, 0
        for y in data.y:
            popt, _, info, *_ = scipy.optimize.leastsq(
                residual, P0, (data.x, y), jac, col_deriv=True, full_output=True
            )
            x.append(popt)
            nfev, njev = nfev + info["nfev"], njev + info["njev"]
        return Fitted(np.array(x), nfev / len(x), njev / len(x))

    return run


def lmfit_model(data: Data) -> Callable[[], Fitted]:
    import lmfit

    model = lmfit.Model(decay)
    start = model.make_params(a=P0[0], k=P0[1], c=P0[2])

    def run() -> Fitted:
        fits = [model.fit(y, start, x=data.x) for y in data.y]
        x = np.array([list(f.best_values.values()) for f in fits])
        return Fitted(x, float(np.mean([f.nfev for f in fits])))

    return run


def nlsq_curve_fit(data: Data) -> Callable[[], Fitted]:
    import jax.numpy as jnp
    import nlsq

    logging.disable(logging.CRITICAL)  # it reports each iteration
    fitter = nlsq.CurveFit()  # keeps what it compiled from one fit to the next

    def model(x, a, k, c):
        return a * jnp.exp(-k * x) + c

    def run() -> Fitted:
        found = [fitter.curve_fit(model, data.x, y, p0=P0) for y in data.y]
        return Fitted(np.array([np.asarray(popt) for popt, _ in found]))

    return run


def optimistix_vmap(data: Data) -> Callable[[], Fitted]:
    import jax
    import jax.numpy as jnp
    import optimistix

    jax.config.update("jax_enable_x64", True)
    solver = optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    x, ys, p0 = jnp.asarray(data.x), jnp.asarray(data.y), jnp.asarray(P0)

    def residual(p, y):
        return p[0] * jnp.exp(-p[1] * x) + p[2] - y

    @jax.jit
    def solve(ys):
        def one(y):
            solution = optimistix.least_squares(residual, solver, p0, y, throw=False)
            return solution.value, solution.stats["num_steps"]

        return jax.vmap(one)(ys)

    def run() -> Fitted:
        p, steps = jax.block_until_ready(solve(ys))
        return Fitted(np.asarray(p), float(steps.mean()), float(steps.mean()))

    return run


def lumafit_pixelwise(data: Data) -> Callable[[], Fitted]:
    import lumafit
    import numba

    # Just as fast, and its OpenMP threads would make torch's in the same process 40 times slower.
    numba.config.THREADING_LAYER = "workqueue"

    @numba.njit
    def model(p, x):
        return p[0] * np.exp(-p[1] * x) + p[2]

    cube = np.ascontiguousarray(data.y[None, :, :])

    def run() -> Fitted:
        p, *_, turns, _ = lumafit.levenberg_marquardt_pixelwise(
            model, np.array(P0), cube, args_for_each_pixel=(data.x,)
        )
        return Fitted(p[0], njev=float(turns.mean()))

    return run


CORES = os.cpu_count() or 1
SOLVERS: dict[str, tuple[str, Prepare]] = {
    "lmsolve": ("", ours()),
    "lmsolve, all cores": ("", ours(workers=CORES)),
    "lmsolve, forward differences": ("", ours(jac="2-point")),
    "lmsolve, user's jac": ("", ours(jac=decay_columns)),
    "lmsolve, user's jac, all cores": ("", ours(jac=decay_columns, workers=CORES)),
    "lmsolve, torch": ("torch", ours_torch),
    "scipy curve_fit, loop": ("scipy", scipy_curve_fit),
    "scipy leastsq with jac, loop": ("scipy", scipy_leastsq),
    "lmfit Model.fit, loop": ("lmfit", lmfit_model),
    "nlsq curve_fit, loop": ("nlsq", nlsq_curve_fit),
    "optimistix LM, vmap and jit": ("optimistix", optimistix_vmap),
    "lumafit, numba": ("lumafit", lumafit_pixelwise),
}
SMOKE = ("lmsolve", "lmsolve, all cores", "lmsolve, user's jac", "scipy curve_fit, loop")


# Measuring


def share_of(name: str, data: Data) -> Data:
    """The data a solver is given: all of them, unless it is too slow for that."""
    share = SLOW.get(name, 1.0)
    return Data(data.x, data.y[: max(1, round(share * len(data.y)))])


def measure(
    names: list[str], data: Data, repeats: int, clock: Clock
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows with the seconds of every run, and the parameters found, the solvers taking turns."""
    rows, runs, found = [], [], {}
    for name in names:
        package, prepare = SOLVERS[name]
        part = share_of(name, data)
        run = prepare(part)
        first, fitted = timed(run, clock)
        second, _ = timed(run, clock)
        row = Row(name, package, len(part.y), max(0.0, first - second))
        row.nfev, row.njev = fitted.nfev, fitted.njev
        rows.append(row)
        runs.append(run)
        found[name] = fitted.x
    for turn in range(repeats):
        for i in range(len(rows)):
            k = (i + turn) % len(rows)
            rows[k].seconds.append(timed(runs[k], clock)[0])
    return rows, found


def timed(run: Callable[[], Fitted], clock: Clock) -> tuple[float, Fitted]:
    began = clock()
    fitted = run()
    return clock() - began, fitted


def judge(rows: list[Row], found: dict[str, np.ndarray], data: Data) -> None:
    """Fill in which fits were solved, and how far they are from the exact minimum."""

    def cost(x: np.ndarray) -> np.ndarray:
        r = decay(data.x, *x.T[:, :, None]) - data.y[: len(x)]
        return 0.5 * np.sum(r * r, axis=1)

    costs = {name: cost(x) for name, x in found.items()}
    padded = [np.pad(c, (0, len(data.y) - len(c)), constant_values=np.inf) for c in costs.values()]
    lowest = np.min(padded, axis=0)
    exact = newton(data, found[rows[0].name])
    for row in rows:
        x, best = found[row.name], lowest[: row.fits]
        solved = costs[row.name] <= best * (1 + 1e-6)
        distance = np.max(np.abs(x / exact[: row.fits] - 1), axis=1)[solved]
        row.solved = float(solved.mean())
        row.distance_median, row.distance_worst = map(float, np.quantile(distance, [0.5, 1.0]))


def newton(data: Data, x: np.ndarray, steps: int = 5) -> np.ndarray:
    """The minima (B, 3) next to x, by Newton's method with exact second derivatives."""
    for _ in range(steps):
        a, k, c = x.T[:, :, None]
        columns = np.broadcast_arrays(*decay_columns(data.x, a, k, c))
        r = decay(data.x, a, k, c) - data.y[: len(x)]
        J = np.stack(columns, axis=2)
        H = J.mT @ J
        mixed = np.sum(r * -data.x * columns[0], axis=1)
        H[:, 0, 1] += mixed
        H[:, 1, 0] += mixed
        H[:, 1, 1] += np.sum(r * a * data.x**2 * columns[0], axis=1)
        x = x - np.linalg.solve(H, J.mT @ r[:, :, None])[:, :, 0]
    return x


def peak_of(name: str, fits: int) -> float | None:
    """Peak memory of one run in a fresh process beyond imports and data, in MiB."""
    return in_fresh_process(__file__, "--peak", name, "--fits", str(fits))


def print_peak(name: str, fits: int) -> None:
    """The child's side of `peak_of`."""
    package, prepare = SOLVERS[name]
    if package:
        importlib.import_module(package)
    print(peak_beyond_now(prepare(share_of(name, make_data(fits)))))


# The GPU


def spots(fits: int, pixels: int = 12) -> dict[str, Any] | None:
    """A million five-parameter 2-D Gaussians in float32 on a GPU, or None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    on = {"device": "cuda", "dtype": torch.float32}
    torch.manual_seed(0)
    side = torch.arange(pixels, **on)
    v, u = (g.ravel() for g in torch.meshgrid(side, side, indexing="ij"))
    middle = (pixels - 1) / 2
    low = torch.tensor([50.0, middle - 1, middle - 1, 1.0, 5.0], **on)
    high = torch.tensor([150.0, middle + 1, middle + 1, 2.0, 15.0], **on)
    true = low + (high - low) * torch.rand((fits, 5), **on)
    start = true * (1 + 0.2 * (torch.rand((fits, 5), **on) - 0.5))

    def spot(uv, height, cu, cv, width, offset):
        u, v = uv
        square = (u - cu) ** 2 + (v - cv) ** 2
        return height * torch.exp(-0.5 * square / width**2) + offset

    y = spot((u, v), *true.T[:, :, None])
    y += 3 * torch.randn(y.shape, **on)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = curve_fit_many(spot, (u, v), y, start)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    inside = (result.x - true).abs() <= 5 * result.stderr()
    return {
        "device": torch.cuda.get_device_name(),
        "fits": fits,
        "points": pixels**2,
        "seconds": seconds[1:],
        "success": float(result.success.float().mean()),
        "within_5_stderr": float(inside.all(dim=1).float().mean()),
        "nit": float(result.nit.float().mean()),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


# Reporting


def report(rows: list[Row]) -> str:
    base = statistics.median(rows[0].rates)
    head = (
        f"{'':32} {'fits/s':>9} {'quartiles':>17} {'ratio':>6} {'compile':>8} {'solved':>7} "
        f"{'distance':>17} {'nfev':>5} {'njev':>5} {'MiB':>6}"
    )
    lines = [head]
    for row in rows:
        low, middle, high = statistics.quantiles(row.rates, n=4)
        distance = f"{row.distance_median:.0e} {row.distance_worst:.0e}"
        calls = [f"{'' if n is None else format(n, '.1f'):>5}" for n in (row.nfev, row.njev)]
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        lines.append(
            f"{row.name:32} {middle:9,.0f} {f'{low:,.0f} .. {high:,.0f}':>17} {middle / base:6.2f} "
            f"{row.compiling:6.1f} s {row.solved:7.2%} {distance:>17} {calls[0]} {calls[1]} "
            f"{peak:>6}"
        )
    return "\n".join(lines)


def report_spots(case: dict[str, Any]) -> str:
    rates = [case["fits"] / s for s in case["seconds"]]
    return (
        f"2-D Gaussian spots, 5 parameters, {case['points']} points, float32, {case['device']}:\n"
        f"{statistics.median(rates):,.0f} fits/s ({min(rates):,.0f} .. {max(rates):,.0f}), "
        f"{case['success']:.3%} converged, {case['within_5_stderr']:.3%} within 5 standard errors "
        f"of the truth, {case['nit']:.1f} trials, peak {case['peak_mib']:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few fits, nothing written")
    parser.add_argument("--only", default="", help="only the solvers with this in their name")
    parser.add_argument("--fits", type=int, default=10_000)
    parser.add_argument("--spots", type=int, default=1_000_000, help="fits of the GPU case")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu on a busy machine")
    parser.add_argument("--output", type=Path, default=RESULTS / "many_fits.json")
    parser.add_argument("--peak", metavar="NAME", help="print the peak memory of one solver")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.fits)
        return
    names = [
        name
        for name, (package, _) in SOLVERS.items()
        if (name in SMOKE if args.smoke else args.only in name)
        and (not package or importlib.util.find_spec(package))
    ]
    fits, repeats = (200, 2) if args.smoke else (args.fits, args.repeats)
    data = make_data(fits)
    rows, found = measure(names, data, repeats, CLOCKS[args.clock])
    judge(rows, found, data)
    for row in rows:
        row.peak_mib = None if args.smoke else peak_of(row.name, fits)
    print(f"{fits:,} fits of 50 points and 3 parameters, {args.clock} time\n\n{report(rows)}")
    assert all(row.solved > 0.99 for row in rows if row.name.startswith("lmsolve"))
    case = spots(20_000 if args.smoke else args.spots)
    print("\n" + (report_spots(case) if case else "No CUDA device: the spots were not fitted."))
    print(f"\n{footer()}")
    if not args.smoke:
        decays = [asdict(row) for row in rows]
        save(args.output, {"clock": args.clock, "decays": decays, "spots": case})


if __name__ == "__main__":
    main()
