"""A network learns sinc(10 x): Levenberg-Marquardt beside Adam and L-BFGS, on the same seeds.

    python examples/sinc.py [--smoke] [--seconds 60] [--seeds 5] [--linalg legate] [--out out]
    python examples/sinc.py --hidden 16 16
    legate --launcher mpirun --ranks-per-node 2 --cpus 1 --gpus 0 examples/sinc.py --linalg legate

The network has 20 tanh units (61 parameters) and sees 20,000 points in float64; ours stops at a
mean squared error of 1e-10. The second line takes two layers (321 parameters) to 1e-15, on 1,000
points. L-BFGS and Adam get the time of the slowest of ours. Prints the mean squared errors and
draws them against wall time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _picture
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import lmsolve.torch
from lmsolve.legate import is_first_rank

Trace = list[tuple[float, float]]  # seconds, mean squared error


def make_data(points: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]
    return x, torch.sinc(10 * x)


def make_model(seed: int, *hidden: int) -> nn.Module:
    """Layers of so many tanh units."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, units in itertools.pairwise((1, *hidden)):
        layers += [nn.Linear(inputs, units), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 1)).double()


def run_lm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seconds: float,
    batch: int | None,
    enough: float,
    linalg: str = "torch",
) -> Trace:
    """Ours: cost over wall time, the best of all data for mini-batches."""
    trace: Trace = []
    probe = copy.deepcopy(model)
    epoch = -1

    def note(step: OptimizeResult) -> None:
        nonlocal epoch
        full = step.cost
        if batch is not None:  # the cost of a mini-batch says little: all data once an epoch
            if step.epoch == epoch:
                return
            epoch = step.epoch
            nn.utils.vector_to_parameters(step.x, probe.parameters())
            full = loss_of(probe, x, y)
        trace.append((step.seconds, full))
        if full < enough:
            raise StopIteration

    lmsolve.torch.fit(
        model, (x, y), loss="mse", batch_size=batch, max_steps=10**9, max_seconds=seconds,
        ftol=0, xtol=0, callback=note, linalg=linalg,
    )  # fmt: skip
    return trace


def run_adam(model: nn.Module, x: Tensor, y: Tensor, seconds: float) -> Trace:
    """Adam on batches of 1,000, its rate decayed along a cosine over the time it has."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trace: Trace = []
    start = now = time.perf_counter()
    while now - start < seconds:
        for chosen in torch.randperm(len(x)).split(1000):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        now = time.perf_counter()
        left = max(0.0, 1 - (now - start) / seconds)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - math.cos(math.pi * left)) / 2
        trace.append((now - start, loss_of(model, x, y)))
    return trace


def run_lbfgs(model: nn.Module, x: Tensor, y: Tensor, seconds: float) -> Trace:
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip
    trace: Trace = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    start = now = time.perf_counter()
    while now - start < seconds:
        optimizer.step(closure)
        now = time.perf_counter()
        trace.append((now - start, loss_of(model, x, y)))
    return trace


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), y))


def best(trace: Trace) -> float:
    return min((value for _, value in trace), default=math.inf)


def paint(figure: Any, traces: dict[str, list[Trace]], title: str) -> None:
    axes = figure.subplots()
    for color, (name, runs) in enumerate(traces.items()):
        for i, trace in enumerate(runs):
            seconds, values = zip(*trace, strict=True)
            lowest = torch.tensor(values).cummin(0).values
            axes.loglog(seconds, lowest, color=f"C{color}", lw=1, label=name if i == 0 else None)
    axes.set(xlabel="wall time (s)", ylabel="mean squared error", title=title)
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, 2,000 points, to 1e-6")
    parser.add_argument("--alone", action="store_true", help="without L-BFGS and Adam")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=[20], help="units of each layer")
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--goal", type=float, default=1e-10, help="where ours stops")
    parser.add_argument("--linalg", choices=("torch", "legate"), default="torch")
    parser.add_argument("--out", type=Path, default=Path("out"))
    if parser.parse_args().hidden != [20]:
        parser.set_defaults(points=1_000, goal=1e-15)
    if parser.parse_args().smoke:
        parser.set_defaults(seconds=30.0, seeds=1, points=2_000, goal=1e-6)
    args = parser.parse_args()
    seconds, seeds, points, enough = args.seconds, args.seeds, args.points, args.goal
    first = args.linalg == "torch" or is_first_rank()
    x, y = make_data(points)
    n = sum(p.numel() for p in make_model(0, *args.hidden).parameters())
    title = f"sinc(10 x), {n} parameters"
    if first:
        print(f"{title}, {points} points, mean squared error of each seed:")
    traces: dict[str, list[Trace]] = {}

    def run(name: str, solve: Callable[[nn.Module], Trace]) -> None:
        runs = [solve(make_model(seed, *args.hidden)) for seed in range(seeds)]
        figures = " ".join(f"{best(t):.0e}" for t in runs)
        times = " ".join(f"{t[-1][0]:.0f}" for t in runs)
        if first:
            print(f"  {name:22s} {figures}   after {times} s", flush=True)
        traces[name] = runs

    run("LM, full batch", lambda m: run_lm(m, x, y, seconds, None, enough, args.linalg))
    if points > 1000:
        run("LM, batches of 1,000", lambda m: run_lm(m, x, y, seconds, 1000, enough, args.linalg))
    if not first:
        return
    longest = max(t[-1][0] for runs in traces.values() for t in runs)
    if not args.alone:
        run("L-BFGS", lambda m: run_lbfgs(m, x, y, longest))
        run("Adam", lambda m: run_adam(m, x, y, longest))
    _picture.write(args.out / "sinc.png", (7, 4.5), lambda f: paint(f, traces, title))
    lm = [best(t) for t in traces["LM, full batch"]]
    rest = [best(t) for name in ("L-BFGS", "Adam") for t in traces.get(name, [])]
    assert max(lm) < (enough if args.smoke else 10 * enough), lm
    assert max(lm) < min(rest, default=math.inf), (lm, rest)


if __name__ == "__main__":
    main()
