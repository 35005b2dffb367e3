"""A network learns sinc(10 x): Levenberg-Marquardt beside Adam and L-BFGS, on the same seeds.

    python examples/sinc.py [--smoke] [--seconds 60] [--seeds 5] [--linalg legate] [--out out]

The network has 20 tanh units (61 parameters) and sees 20,000 points in float64. Prints the mean
squared error each solver reaches and draws it against wall time. Ours stops at 1e-10.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

import lmsolve.torch

Trace = list[tuple[float, float]]  # seconds, mean squared error


def make_data(points: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]
    return x, torch.sinc(10 * x)


def make_model(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()


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

    probe = make_model(0, model[0].out_features)
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


def draw(traces: dict[str, list[Trace]], path: Path) -> None:
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, (name, runs) in enumerate(traces.items()):
        for i, trace in enumerate(runs):
            seconds, values = zip(*trace, strict=True)
            lowest = torch.tensor(values).cummin(0).values
            axes.loglog(seconds, lowest, color=f"C{color}", lw=1, label=name if i == 0 else None)
    axes.set(xlabel="wall time (s)", ylabel="mean squared error", title="sinc(10 x), 61 parameters")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, 2,000 points, to 1e-6")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--linalg", choices=("torch", "legate"), default="torch")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    seconds, seeds, points, enough = args.seconds, args.seeds, 20_000, 1e-10
    others = seconds
    if args.smoke:
        seconds, others, seeds, points, enough = 30.0, 2.0, 1, 2_000, 1e-6
    x, y = make_data(points)
    solvers: dict[str, Callable[[nn.Module], Trace]] = {
        "LM, full batch": lambda model: run_lm(model, x, y, seconds, None, enough, args.linalg),
        "LM, batches of 1,000": lambda model: run_lm(
            model, x, y, seconds, 1000, enough, args.linalg
        ),
        "L-BFGS": lambda model: run_lbfgs(model, x, y, others),
        "Adam": lambda model: run_adam(model, x, y, others),
    }
    traces = {
        name: [solve(make_model(seed, args.width)) for seed in range(seeds)]
        for name, solve in solvers.items()
    }
    print(f"{points} points, {seeds} seeds, at most {seconds:g} s a run; mean squared error:")
    for name, runs in traces.items():
        figures = " ".join(f"{best(t):.0e}" for t in runs)
        median = statistics.median(t[-1][0] for t in runs)
        print(f"  {name:22s} {figures}   median time {median:.1f} s")
    draw(traces, args.out / "sinc.png")
    lm = [best(t) for t in traces["LM, full batch"]]
    rest = min(best(t) for name in ("L-BFGS", "Adam") for t in traces[name])
    assert max(lm) < (1e-6 if args.smoke else 1e-9), lm
    assert max(lm) < rest, (lm, rest)


if __name__ == "__main__":
    main()
