"""Networks on Legate: a step beside cuPyLMA's algorithm, and 10,000 parameters on one machine.

    scripts/with-legate.sh single python benchmarks/legate_networks.py            # both tables
    scripts/with-legate.sh single python benchmarks/legate_networks.py --smoke    # small sizes
    scripts/with-legate.sh single python benchmarks/legate_networks.py --only cupylma

cuPyLMA's wheel needs CUDA, so that its algorithm (version 0.1.2) is written down here once more,
with its data path: the batch in slices, J of a slice by `torch.func` (forward mode where a slice
has more samples than the model parameters, else reverse), every slice a copy on the host and kept
there, then copied into the whole J of cuPyNumeric, which is multiplied out and solved by LU, all in
float32. Its slices are the fastest of several. What stands for its copies between devices is a copy
in memory, far faster than a bus.

Every contender runs in processes of its own, in turn, on two CPUs of Legate, as many steps as the
other; times are of a whole accepted step, the damping's rejected trials included. Our first step
has our set-up in it (the way of differentiating is chosen by trying); the choice of the other's
slices, which cuPyLMA leaves to its user, does not count. Memory is the growth of the process beyond
what it holds when data, model and Legate are there. The images are Fashion-MNIST's where
Debian's dataset-fashion-mnist is installed, else random ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT, footer, save, status, table

sys.path.insert(0, str(ROOT / "examples"))

import torch
from torch import Tensor, nn

IMAGES = Path("/usr/share/datasets/fashion-mnist")
#: Larger slices take longer for each row here, and 1,024 rows more than 10 GB.
SLICES = (8, 16, 32, 64)
#: Bytes that ours may take for blocks and matrices; its default is half of what is free. A quarter
#: holds the rows of the first problem in float32, 246 MB.
MEMORY, LARGE_MEMORY = 1 << 30, 6 << 30
STEPS = 3


def data(samples: int) -> tuple[Tensor, Tensor]:
    """Images (samples, 1, 28, 28) and classes."""
    import mnist

    if IMAGES.exists():
        images = mnist.load(IMAGES)
        return images.x[:samples].clone(), images.y[:samples].clone()
    torch.manual_seed(1)
    return torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))


def network(kind: str) -> nn.Module:
    """cuPyLMA's convolutions of 1,026 parameters, or 10,166 in dense layers."""
    import mnist

    if kind == "cnn":
        return mnist.make_model("cnn", 28, 0)
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def residual(output: Tensor, target: Tensor) -> Tensor:
    """One residual a sample, whose square is its cross entropy."""
    return nn.functional.cross_entropy(output, target, reduction="none").sqrt()


class HostPath:
    """cuPyLMA's step: J in slices over the host, whole in cuPyNumeric, normal equations, LU."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, size: int | None) -> None:
        import cupynumeric

        self.xp = cupynumeric
        self.model, self.x, self.y = model, x, y
        parts = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in parts.items()}
        self.flat = torch.cat([p.detach().reshape(-1) for p in parts.values()])
        self.damping = 1e-3
        self.costs: list[float] = []
        choices = itertools.product((1, os.cpu_count() or 1), (size,) if size else SLICES)
        threads, self.size = min(choices, key=self.seconds_a_sample)
        torch.set_num_threads(threads)

    def rows(self, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Residuals of a slice."""
        parts = flat.split([math.prod(s) for s in self.shapes.values()])
        named = {name: p.view(s) for (name, s), p in zip(self.shapes.items(), parts, strict=True)}
        return residual(torch.func.functional_call(self.model, named, x), y)

    def jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Rows (slice, n)."""
        mode = torch.func.jacfwd if len(x) > self.flat.numel() else torch.func.jacrev
        return mode(lambda flat: self.rows(flat, x, y))(self.flat).detach()

    def seconds_a_sample(self, choice: tuple[int, int]) -> float:
        """Of the Jacobian of slices and their way into cuPyNumeric, a second time."""
        threads, size = choice
        torch.set_num_threads(threads)
        J = self.xp.empty((len(self.x), self.flat.numel()), dtype=self.xp.float32)
        slices = range(0, min(128, len(self.x)), size)
        for _ in range(2):
            start = time.perf_counter()
            for i in slices:
                there = slice(i, i + size)
                J[there] = self.jacobian(self.x[there], self.y[there]).clone().numpy()
            float(J[0, 0])  # waits for all of them
        return (time.perf_counter() - start) / len(slices) / size

    def cost(self) -> float:
        """Mean square of all residuals."""
        slices = zip(self.x.split(self.size), self.y.split(self.size), strict=True)
        total = sum(float(self.rows(self.flat, *part).double().square().sum()) for part in slices)
        return total / len(self.x)

    @torch.no_grad()
    def step(self) -> None:
        """One accepted step."""
        xp, m, n = self.xp, len(self.x), self.flat.numel()
        J, r = xp.empty((m, n), dtype=xp.float32), xp.empty(m, dtype=xp.float32)
        slices = []
        for x, y in zip(self.x.split(self.size), self.y.split(self.size), strict=True):
            on_host = self.rows(self.flat, x, y).clone(), self.jacobian(x, y).clone()
            slices.append(on_host)
        done = 0
        while slices:
            r_part, J_part = slices.pop(0)
            there = slice(done, done + len(r_part))
            r[there], J[there] = r_part.numpy(), J_part.numpy()
            done += len(r_part)
        A, b = J.T @ J / m, J.T @ r / m
        before, old = self.cost(), self.flat
        if not self.costs:
            self.costs.append(before)
        while True:
            p = xp.linalg.solve(A + self.damping * xp.eye(n, dtype=xp.float32), b)
            self.flat = old - torch.from_numpy(p.__array__().copy())
            after = self.cost()
            if after < before:
                self.costs.append(after)
                self.damping = max(0.1 * self.damping, 1e-10)
                return
            self.damping *= 10.0
            if self.damping > 1e10:
                raise RuntimeError("no step lowers the cost")


def ours(model: nn.Module, x: Tensor, y: Tensor, memory: int, acceleration: bool = True) -> Any:
    """A session that looks at the data."""
    from lmsolve.torch._data import make_batch
    from lmsolve.torch._descent import Descent
    from lmsolve.torch._session import Options, Session

    options = Options(residual, linalg="legate", memory=memory, acceleration=acceleration)
    session = Session(model, options, Descent())
    session.place(make_batch(x, y, None, session.network.parameters), 0)
    return session


def accepted(session: Any) -> None:
    """One accepted step of ours."""
    while not session.trial().accepted:
        if session.state.status is not None:
            raise RuntimeError(f"no step lowers the cost: status {session.state.status}")


def clocks() -> tuple[float, float]:
    """Wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Steps of one contender in this process."""
    if task["contender"] == "cuPyLMA's":
        import cupynumeric as xp
    else:
        from lmsolve.legate._start import start

        xp = start()
    float(xp.zeros(3).sum())
    x, y = data(task["m"])
    model = network(task["network"])
    with torch.no_grad():
        model(x[:256])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = status("VmRSS")
    found: dict[str, Any] = {"n": sum(p.numel() for p in model.parameters())}
    begun = clocks()
    if task["contender"] == "cuPyLMA's":
        path = HostPath(model, x, y, task["slice"])
        found["slice"] = path.size
        step, costs = path.step, path.costs
        begun = clocks()
    else:
        session = ours(model, x, y, task["memory"], task["acceleration"])
        costs = [2 * session.state.cost / len(x)]

        def step() -> None:
            accepted(session)
            costs.append(2 * session.state.cost / len(x))

    found |= {"wall": [], "processor": []}
    for _ in range(task["steps"]):
        step()
        done = clocks()
        for key, start, end in zip(("wall", "processor"), begun, done, strict=True):
            found[key].append(end - start)
        begun = done
    found["cost"] = costs
    found["peak"] = status("VmHWM") - before
    found["held before"] = before
    return found


def in_process(sysmem: int, **task: Any) -> dict[str, Any]:
    """Result of `measure` in a fresh process on two CPUs of Legate."""
    config = f"--cpus 2 --gpus 0 --sysmem {sysmem}"
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)],
        capture_output=True, text=True, check=False, env={**os.environ, "LEGATE_CONFIG": config},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def beside_cupylma(smoke: bool, rounds: int) -> dict[str, Any]:
    """Seconds of a step and peak memory, both algorithms in turn."""
    m = 600 if smoke else 60_000
    tasks = {
        "ours": {"contender": "ours", "memory": MEMORY, "acceleration": True},
        "cuPyLMA's": {"contender": "cuPyLMA's", "slice": 32 if smoke else None},
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
    for _ in range(1 if smoke else rounds):
        for name, task in tasks.items():
            runs[name].append(in_process(4000, network="cnn", m=m, steps=STEPS, **task))
            print(name, runs[name][-1], flush=True)
    size, n = runs["cuPyLMA's"][0]["slice"], runs["ours"][0]["n"]
    print(f"\nSteps of {m} rows and {n} parameters, 2 CPUs of Legate; its slices have {size} rows")
    print(table(["", "ours", "cuPyLMA's", "ratio"], figures(*runs.values())))
    return runs


def figures(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[list[Any]]:
    """The rows of the table: medians of all processes, the largest peak, the first one's costs."""

    def middle(runs: list[dict[str, Any]], key: str, steps: slice) -> float:
        return statistics.median(value for run in runs for value in run[key][steps])

    both = ours, theirs
    parts = {"first step": slice(0, 1), "later steps": slice(1, None)}
    rows: list[list[Any]] = [
        [f"{name}, {key} s", *(middle(runs, key, parts[name]) for runs in both)]
        for name, key in itertools.product(parts, ("wall", "processor"))
    ]
    rows.append(["peak MiB", *(max(run["peak"] for run in runs) for runs in both)])
    costs = enumerate(zip(*(runs[0]["cost"] for runs in both), strict=True))
    return [[*row, row[2] / row[1]] for row in rows] + [
        [f"cost after {k} steps", *(f"{cost:.4f}" for cost in pair), ""] for k, pair in costs
    ]


def large(smoke: bool) -> dict[str, Any]:
    """Ten thousand parameters and sixty thousand rows in place."""
    m, steps = (200, 1) if smoke else (60_000, 3)
    task = {"contender": "ours", "memory": LARGE_MEMORY, "acceleration": True}
    found = in_process(2000, network="dense", m=m, steps=steps, **task)
    n = found["n"]
    print(f"\n{m} rows, {n} parameters: J would take {8 * m * n / 1e9:.1f} GB in float64")
    made = zip(found["wall"], found["processor"], found["cost"][1:], strict=True)
    rows = [[str(k), *step] for k, step in enumerate(made, 1)]
    print(table(["step", "wall s", "processor s", "cost"], rows))
    peak = found["peak"] + found["held before"]
    print(f"peak {peak:.0f} MiB, {found['peak']:.0f} of them beyond data, model and Legate")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=("cupylma", "large"))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(json.loads(args.task))))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "cupylma": lambda: beside_cupylma(args.smoke, args.rounds),
        "large": lambda: large(args.smoke),
    }
    found = {name: part() for name, part in parts.items() if args.only in (None, name)}
    print(f"\n{footer()}")
    if not args.smoke:
        for name, figures_of in found.items():
            save(RESULTS / f"legate_networks_{name}.json", figures_of)


if __name__ == "__main__":
    main()
