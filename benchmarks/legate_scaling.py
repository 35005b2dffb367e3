"""One Levenberg-Marquardt iteration over Legate's processors, beside NumPy in the same run.

The problem is r = tanh(A x) - y with J = (1 - tanh^2) A: evaluation, products and solve all count.
One iteration is a trial (residuals and cost), a linearisation and a solve. NumPy does it at once,
on one thread; Legate's tasks do it block by block on the same A, which they read in place.

    scripts/with-legate.sh single python benchmarks/legate_scaling.py           # 1 and 2 CPUs
    legate --gpus 8 benchmarks/legate_scaling.py --here                         # what was launched

The first form keeps a process for each configuration and lets them take turns, one iteration each,
so that a ratio is always one of neighbours in time; the median over the rounds is reported. Strong
scaling keeps m, weak scaling keeps m per processor. Where cores share a memory bus, or other work
runs beside, two CPUs can't be twice one: "two processes" is how much faster the same work is done
by two independent processes of one CPU at the same time, each on half the rows, which is what this
machine has to give. "Work" is the processor seconds of two CPUs over those of one. Every
iteration is one residual and one Jacobian evaluation, and the costs that its step leads to are
compared. Peak memory is that of a process beyond its data and the libraries that it imports.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, footer, quartiles, save, status

SIZES = [(10_000_000, 20), (1_000_000, 200), (100_000, 1000)]
SMOKE = [(20_000, 20), (5_000, 100)]
MU = 1e-3
EQUAL = 1e-9  # relative difference of costs; each configuration adds up in an order of its own


def problem(m: int, n: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some rows of A (m, n), of y (m,), and x (n,), made block by block."""
    rng = np.random.default_rng(0)
    m = len(range(m)[part])
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
    start, work = time.perf_counter(), time.process_time()
    r = clock.timed("evaluation", residual)(x, A, y)
    clock.timed("products", lambda: 0.5 * (r @ r))()
    r, J = clock.timed("evaluation", linear)(x, A, y)
    gram, grad = clock.timed("products", lambda: (J.T @ J, J.T @ r))()
    step = clock.timed("solve", solve)(gram, grad)
    work = time.process_time() - work
    found = {"total": time.perf_counter() - start, **clock.seconds, "processor": work}
    r = residual(x + step, A, y)
    return {**found, "cost": 0.5 * float(r @ r)}


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
        step = clock.timed("solve", solve)(subproblem.gram, subproblem.grad)
        total = time.perf_counter() - start
        parts = {k: v / (1 if k == "solve" else workers) for k, v in clock.seconds.items()}
        work = time.process_time() - work
        rest = total - sum(parts.values())
        found = {"total": total, **parts, "synchronisation": rest, "processor": work}
        return {**found, "cost": sharded.residual(x + step).cost}

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


class Worker:
    """A process of its own that runs iterations when it is asked to."""

    def __init__(self, cpus: int, m: int, n: int, first: int, last: int) -> None:
        command = [sys.executable, __file__, "--serve", f"{m}x{n}", "--rows", f"{first}:{last}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["LEGATE_CONFIG"] = f"--cpus {max(cpus, 1)} --gpus 0 --sysmem 1000"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command + ["--numpy"] * (cpus == 0), stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def ask(self, part: str = "all") -> None:
        """Start one iteration over all or half of the rows."""
        assert self._process.stdin is not None
        self._process.stdin.write(part + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Seconds of the iteration that was asked for, and of its parts."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise SystemExit("A worker has ended.")

    def run(self, part: str = "all") -> dict[str, float]:
        """One iteration."""
        self.ask(part)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(m: int, n: int, part: slice, numpy: bool) -> None:
    """Run the iterations that a `Worker` asks for."""
    A, y, x = problem(m, n, part)
    sizes = {"all": len(A), "half": m // 2}
    if numpy:
        runs = {k: partial(numpy_iteration, A[:size], y[:size], x) for k, size in sizes.items()}
    else:
        runs = {k: legate_iteration(A[:size], y[:size], x, False) for k, size in sizes.items()}
    # Legate pins the threads of one CPU to the first core, where two processes would meet.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), range(os.cpu_count() or 1))
    held = status("VmRSS")
    for line in sys.stdin:
        found = runs[line.strip()]()
        print(json.dumps({**found, "peak_mib": status("VmHWM") - held}), flush=True)


def compare(m: int, n: int, rounds: int) -> dict[str, Any]:
    """All configurations at one size, in turns."""
    numpy, one, two = (Worker(cpus, m, n, 0, m) for cpus in (0, 1, 2))
    other = Worker(1, m, n, m // 2, m)
    workers = numpy, one, two, other
    found: dict[str, Any] = {"m": m, "n": n}
    runs: dict[str, list[dict[str, float]]] = {}
    for k in range(rounds + 1):
        measured = {"numpy": numpy.run(), "one": one.run(), "two": two.run()}
        measured["half"] = one.run("half")
        one.ask("half")
        other.ask()
        pair = one.answer(), other.answer()
        measured["pair"] = max(pair, key=lambda each: each["total"])
        if k:  # the first round warms up
            for name, value in measured.items():
                runs.setdefault(name, []).append(value)
    for worker in workers:
        worker.close()
    for name, values in runs.items():
        found[name] = {k: statistics.median(v[k] for v in values) for k in values[0]}
        found[name]["seconds"] = [v["total"] for v in values]
    costs = [v["cost"] for name in ("numpy", "one", "two") for v in runs[name]]
    assert max(costs) <= min(costs) * (1 + EQUAL), costs

    def ratio(a: str, b: str, what: str = "total") -> float:
        return statistics.median(u[what] / v[what] for u, v in zip(runs[a], runs[b], strict=True))

    found["ratios"] = {
        "over numpy": ratio("one", "numpy"),
        "two over one": ratio("one", "two"),
        "two processes": ratio("one", "pair"),
        "weak": ratio("half", "two"),
        "work": ratio("two", "one", "processor"),
    }
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The measured figures as Markdown."""
    lines = [
        "| m x n | NumPy | 1 CPU | 2 CPUs | 1 CPU / NumPy | 2 CPUs over 1 | two processes | weak | work | cost |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    spreads = [
        "| m x n, quartiles and peak | NumPy | 1 CPU | 2 CPUs |",
        "| --- | --- | --- | --- |",
    ]
    shares = [
        "| m x n | CPUs | evaluation | products | solve | synchronisation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in found:
        size = f"{each['m']:.0e} x {each['n']}".replace("e+0", "e")
        seconds = " | ".join(f"{each[k]['total']:.3f} s" for k in ("numpy", "one", "two"))
        ratios = " | ".join(f"{value:.2f}" for value in each["ratios"].values())
        lines.append(f"| {size} | {seconds} | {ratios} | {each['one']['cost']:.8g} |")
        cells = []
        for k in ("numpy", "one", "two"):
            low, _, high = quartiles(each[k]["seconds"])
            cells.append(f"{low:.3f} .. {high:.3f} s, {each[k]['peak_mib']:,.0f} MiB")
        spreads.append(f"| {size} | {' | '.join(cells)} |")
        for cpus, parts in ((1, each["one"]), (2, each["two"])):
            cells = " | ".join(
                f"{100 * parts[k] / parts['total']:.0f} %"
                for k in ("evaluation", "products", "solve", "synchronisation")
            )
            shares.append(f"| {size} | {cpus} | {cells} |")
    return "\n".join([*lines, "", *spreads, "", *shares])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure what Legate has here")
    parser.add_argument("--no-peer", action="store_true", help="leave NumPy out")
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", metavar="MxN")
    parser.add_argument("--output", type=Path, default=RESULTS / "legate_scaling.json")
    parser.add_argument("--serve", metavar="MxN", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)
    parser.add_argument("--numpy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        m, n = (int(value) for value in options.serve.split("x"))
        serve(m, n, slice(*(int(value) for value in options.rows.split(":"))), options.numpy)
        return
    sizes = SMOKE if options.smoke else SIZES
    if options.sizes:
        sizes = [(int(m), int(n)) for m, n in (size.split("x") for size in options.sizes)]
    if options.here:
        run_here(sizes, options.repeats, not options.no_peer)
        return
    found = []
    for m, n in sizes:
        found.append(compare(m, n, options.repeats))
        print(json.dumps(found[-1]["ratios"]), flush=True)
    print(f"{table(found)}\n\n{footer()}")
    if not options.smoke:
        save(options.output, {"sizes": found})


if __name__ == "__main__":
    main()
