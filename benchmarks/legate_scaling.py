"""One Levenberg-Marquardt iteration over Legate's processors, beside NumPy in the same run.

The problem is r = tanh(A x) - y with J = (1 - tanh^2) A: evaluation, products and solve all count.
One iteration is a trial (residuals and cost), a linearisation and a solve. NumPy does it at once,
on one thread; Legate's tasks do it block by block on the same A, which they read in place.

    scripts/with-legate.sh single python benchmarks/legate_scaling.py           # 1 and 2 CPUs
    legate --gpus 8 benchmarks/legate_scaling.py --here                         # what was launched

The first form starts a process for each number of CPUs. Strong scaling keeps m, weak scaling keeps
m per processor. On a shared machine, or where cores share the bandwidth of their memory, two CPUs
can't be twice one: "machine" is what two NumPy processes at once do over one after the other, and
"work" the processor seconds of two CPUs over those of one, which other people's load leaves alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZES = [(10_000_000, 20), (1_000_000, 200), (100_000, 1000)]
SMOKE = [(20_000, 20), (5_000, 100)]
MU = 1e-3


def problem(m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (m, n), y (m,) and x (n,), made block by block."""
    rng = np.random.default_rng(0)
    A = np.empty((m, n))
    x = rng.standard_normal(n) / np.sqrt(n)
    y = np.empty(m)
    for i in range(0, m, 100_000):
        block = A[i : i + 100_000]
        rng.standard_normal(out=block)
        y[i : i + 100_000] = np.tanh(block @ x) + 0.01 * rng.standard_normal(len(block))
    return A, y, x + 0.1 / np.sqrt(n)


def residual(x: Any, A: Any, y: Any) -> Any:
    """r (b,) of a block."""
    return np.tanh(A @ x) - y


def linear(x: Any, A: Any, y: Any) -> Any:
    """r (b,) and J (b, n) of a block."""
    t = np.tanh(A @ x)
    return t - y, A * (1.0 - t * t)[:, None]


class Clock:
    """Seconds that threads spend in functions, by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to the label's."""

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            value = function(*arguments)
            with self._lock:
                elapsed = time.perf_counter() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + elapsed
            return value

        return call


def numpy_iteration(A: np.ndarray, y: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """Seconds of one iteration in NumPy, and of its parts."""
    clock = Clock()
    start = time.perf_counter()
    r = clock.timed("evaluation", residual)(x, A, y)
    clock.timed("products", lambda: 0.5 * (r @ r))()
    r, J = clock.timed("evaluation", linear)(x, A, y)
    gram, grad = clock.timed("products", lambda: (J.T @ J, J.T @ r))()
    clock.timed("solve", solve)(gram, grad)
    return {"total": time.perf_counter() - start, **clock.seconds}


def solve(gram: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """The step (n,) at one damping."""
    from scipy.linalg import cho_factor, cho_solve

    damped = gram + MU * np.diag(gram.diagonal())
    step: np.ndarray = cho_solve(cho_factor(damped), -grad)
    return step


def legate_iteration(A: Any, y: Any, x: np.ndarray, torch: bool) -> Callable[[], dict[str, float]]:
    """A function that runs one iteration in Legate's tasks and returns seconds of its parts."""
    from lmsolve.legate import _blocks, rows
    from lmsolve.legate._tasks import processors

    clock = Clock()
    sums = _blocks.HostSums
    sums.add = clock.timed("products", sums.add)  # type: ignore[method-assign]
    functions = (torch_residual, torch_linear) if torch else (residual, linear)
    sharded = rows(
        clock.timed("evaluation", functions[0]),
        clock.timed("evaluation", functions[1]),
        n=x.size,
        data=(A, y),
        namespace="torch" if torch else "numpy",
    )
    workers = processors(sharded.layout.target)

    def iteration() -> dict[str, float]:
        clock.seconds.clear()
        start, work = time.perf_counter(), time.process_time()
        sharded.residual(x)
        subproblem = sharded.linearize(x)
        clock.timed("solve", solve)(subproblem.gram, subproblem.grad)
        total = time.perf_counter() - start
        parts = {k: v / (1 if k == "solve" else workers) for k, v in clock.seconds.items()}
        work = time.process_time() - work
        rest = total - sum(parts.values())
        return {"total": total, **parts, "synchronisation": rest, "processor": work}

    return iteration


def torch_residual(x: Any, A: Any, y: Any) -> Any:
    """r (b,) of a block on its device."""
    return (A @ x).tanh() - y


def torch_linear(x: Any, A: Any, y: Any) -> Any:
    """r (b,) and J (b, n) of a block on its device."""
    t = (A @ x).tanh()
    return t - y, A * (1.0 - t * t)[:, None]


def measure(iteration: Callable[[], dict[str, float]], repeats: int) -> dict[str, Any]:
    """Medians of the parts, and the spread of the total, after one run that is not counted."""
    iteration()
    runs = [iteration() for _ in range(repeats)]
    medians = {k: statistics.median(run.get(k, 0.0) for run in runs) for k in runs[0]}
    totals = [run["total"] for run in runs]
    return {**medians, "spread": [min(totals), max(totals)]}


def run_here(sizes: list[tuple[int, int]], repeats: int, peer: bool) -> list[dict[str, Any]]:
    """Measure on the processors that Legate has in this process (and its ranks)."""
    from lmsolve.legate._start import start

    cupynumeric = start()
    from legate.core import TaskTarget, get_legate_runtime

    from lmsolve.legate._tasks import processors

    gpus = processors(TaskTarget.GPU)
    found = []
    for m, n in sizes:
        A, y, x = problem(m, n)
        record: dict[str, Any] = {"m": m, "n": n}
        if peer:
            record["numpy"] = measure(lambda A=A, y=y, x=x: numpy_iteration(A, y, x), repeats)
        if gpus:
            A, y = cupynumeric.array(A), cupynumeric.array(y)
        record["processors"] = gpus or processors(TaskTarget.CPU)
        record["kind"] = "GPU" if gpus else "CPU"
        record["legate"] = measure(legate_iteration(A, y, x, torch=bool(gpus)), repeats)
        found.append(record)
        if get_legate_runtime().node_id == 0:
            print(json.dumps(record), flush=True)
    return found


def child(arguments: list[str], cpus: int, sizes: list[tuple[int, int]]) -> subprocess.Popen[str]:
    """This script in a process of its own with some CPUs."""
    command = [sys.executable, __file__, *arguments]
    command += ["--sizes", *(f"{m}x{n}" for m, n in sizes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["LEGATE_CONFIG"] = f"--cpus {cpus} --gpus 0 --sysmem 1000"
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def records(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What a child printed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"A run failed with status {process.returncode}.")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def run_all(sizes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Every configuration of this machine's CPUs, one process after the other."""
    common = ["--repeats", str(repeats)]
    found: dict[str, Any] = {"strong": [], "weak": [], "second_core": []}
    for size in sizes:
        for cpus in (1, 2):
            found["strong"] += records(child(["--here", *common], cpus, [size]))
        half = (size[0] // 2, size[1])
        found["weak"] += records(child(["--here", *common, "--no-peer"], 1, [half]))
        alone = records(child(["--numpy", *common], 1, [half]))[0]
        pair = [child(["--numpy", *common], 1, [half]) for _ in range(2)]
        both = [records(process)[0] for process in pair]
        worth = 2 * alone["numpy"]["total"] / max(b["numpy"]["total"] for b in both)
        found["second_core"].append({"m": size[0], "n": size[1], "worth": worth})
    return found


def table(found: dict[str, Any]) -> str:
    """The measured figures as Markdown."""
    lines = [
        "| m x n | NumPy | 1 CPU | 2 CPUs | 1 CPU / NumPy | 2 CPUs over 1 | weak | machine | work |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shares = [
        "| m x n | CPUs | evaluation | products | solve | synchronisation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one, two, half, core in zip(
        found["strong"][::2],
        found["strong"][1::2],
        found["weak"],
        found["second_core"],
        strict=True,
    ):
        size = f"{one['m']:.0e} x {one['n']}".replace("e+0", "e")
        t1, t2 = one["legate"]["total"], two["legate"]["total"]
        lines.append(
            f"| {size} | {one['numpy']['total']:.3f} s | {t1:.3f} s | {t2:.3f} s "
            f"| {t1 / one['numpy']['total']:.2f} | {t1 / t2:.2f} "
            f"| {half['legate']['total'] / t2:.2f} | {core['worth']:.2f} "
            f"| {two['legate']['processor'] / one['legate']['processor']:.2f} |"
        )
        for record in (one, two):
            parts = record["legate"]
            cells = " | ".join(
                f"{100 * parts.get(k, 0.0) / parts['total']:.0f} %"
                for k in ("evaluation", "products", "solve", "synchronisation")
            )
            shares.append(f"| {size} | {record['processors']} | {cells} |")
    return "\n".join([*lines, "", *shares])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure what Legate has here")
    parser.add_argument("--numpy", action="store_true", help="measure NumPy alone")
    parser.add_argument("--no-peer", action="store_true", help="leave NumPy out")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", metavar="MxN")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else SIZES
    if options.sizes:
        sizes = [(int(m), int(n)) for m, n in (size.split("x") for size in options.sizes)]
    if options.numpy:
        for m, n in sizes:
            A, y, x = problem(m, n)
            measured = measure(lambda A=A, y=y, x=x: numpy_iteration(A, y, x), options.repeats)
            print(json.dumps({"m": m, "n": n, "numpy": measured}), flush=True)
    elif options.here:
        run_here(sizes, options.repeats, not options.no_peer)
    else:
        found = run_all(sizes, options.repeats)
        print(table(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
