"""One Levenberg-Marquardt step in twenty thousand parameters, in the memory of one machine.

The model is y(t) = tanh(sum_j x_j cos(pi j t)) on a grid of m times: J is dense, and its blocks are
made as they are needed, by Legate's tasks. J'J takes 8 n^2 bytes, 3.2 GB for n = 20,000.

    CPUS=2 scripts/with-legate.sh single python benchmarks/large_n.py 20000 25000
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np

from lmsolve import LevenbergMarquardt
from lmsolve.legate import RowProblem, rows


def basis(numbers: range, m: int, n: int) -> np.ndarray:
    """cos(pi j t_i) (b, n) of some rows."""
    t = (np.arange(numbers.start, numbers.stop) + 0.5) / m
    A = np.multiply.outer(np.pi * t, np.arange(n))
    return np.cos(A, out=A)


def series(m: int, n: int, true: np.ndarray) -> tuple[Any, Any]:
    """fun_block and jac_block of the model."""

    def residual(x: np.ndarray, numbers: range) -> np.ndarray:
        A = basis(numbers, m, n)
        both = np.tanh(A @ np.stack([x, true], axis=1))
        difference: np.ndarray = both[:, 0] - both[:, 1]
        return difference

    def linear(x: np.ndarray, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        A = basis(numbers, m, n)
        both = np.tanh(A @ np.stack([x, true], axis=1))
        A *= 1.0 - both[:, :1] ** 2
        return both[:, 0] - both[:, 1], A

    return residual, linear


def peak() -> float:
    """Largest resident memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    n, m = (int(value) for value in sys.argv[1:3]) if len(sys.argv) > 2 else (20_000, 25_000)
    rng = np.random.default_rng(0)
    true = rng.standard_normal(n) / np.sqrt(n)
    problem: RowProblem = rows(*series(m, n, true), m=m, n=n)
    before = peak()
    clock = time.perf_counter

    def timed(label: str, function: Any, *arguments: Any) -> Any:
        start, work = clock(), time.process_time()
        value = function(*arguments)
        seconds, work = clock() - start, time.process_time() - work
        print(f"{label:<16} {seconds:7.1f} s {work:7.1f} s of processors   peak {peak():.2f} GB")
        return value

    print(f"n = {n}, m = {m}, one matrix {8 * n * n / 1e9:.2f} GB, at the start {before:.2f} GB")
    solver = LevenbergMarquardt()
    start = clock()
    x0 = true + 0.1 * rng.standard_normal(n) / np.sqrt(n)
    state = timed("residuals at x0", solver.init, problem, x0)
    first = state.cost
    state = timed("linearisation", solver.linearize, problem, state)
    state = timed("solve and trial", solver.step, problem, state)
    matrices = (peak() - before) / (8 * n * n / 1e9)
    print(f"cost {first:.6e} -> {state.cost:.6e}, {'accepted' if state.accepted else 'rejected'}")
    print(f"{clock() - start:.1f} s in all; at the peak {matrices:.2f} matrices held")


if __name__ == "__main__":
    main()
