"""A hundred million residuals, 20 parameters, 2 GB: a fit whose Jacobian never exists.

    python benchmarks/row_blocks.py                 # 1e8 rows: minutes; results/row_blocks.json
    python benchmarks/row_blocks.py --smoke         # 1e6 rows, beside a fit that holds J
    python benchmarks/row_blocks.py --rows 10000000

The model is y = exp(c_0 T_0(t) + ... + c_19 T_19(t)), T_k the Chebyshev polynomials, with noise.
Neither t nor y is stored: every block of rows is generated anew, in every pass, from its number.
J as one array would take 16 GB at full size. Peak memory is that of the whole process, the
interpreter and the libraries included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _common import RESULTS, footer, peak_rss, save

import lmsolve

PARAMETERS, BLOCK, SIGMA = 20, 50_000, 0.1
TRUE = np.array([0.3 * (-0.7) ** k for k in range(PARAMETERS)])
LIMIT = 2e9 / 2**20  # MiB


class Rows:
    """Rows of the problem in blocks; `fun` and `jac` each iterate over all of them once."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.passes = 0

    def _block(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Basis (20, k), one polynomial a row, and data y (k,) of the block that starts there."""
        k = min(BLOCK, self.rows - first)
        t = np.arange(first, first + k) * (2.0 / (self.rows - 1)) - 1.0
        T = np.empty((PARAMETERS, k))
        T[0], T[1] = 1.0, t
        for j in range(2, PARAMETERS):
            np.multiply(t, T[j - 1], out=T[j])
            T[j] *= 2.0
            T[j] -= T[j - 2]
        noise = np.random.default_rng(first).standard_normal(k)
        return T, np.exp(TRUE @ T) + SIGMA * noise

    def fun(self, c: np.ndarray) -> Iterator[np.ndarray]:
        self.passes += 1
        for first in range(0, self.rows, BLOCK):
            T, y = self._block(first)
            yield np.exp(c @ T) - y

    def jac(self, c: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.passes += 1
        for first in range(0, self.rows, BLOCK):
            T, y = self._block(first)
            model = np.exp(c @ T)
            T *= model
            yield model - y, T.T


def held(rows: Rows) -> lmsolve.LeastSquaresResult:
    """The same fit with residuals and Jacobian as whole arrays."""

    def fun(c):
        return np.concatenate(list(rows.fun(c)))

    def jac(c):
        return np.concatenate([J for _, J in rows.jac(c)])

    return lmsolve.least_squares(fun, np.zeros(PARAMETERS), jac)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="1e6 rows, nothing written")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "row_blocks.json")
    args = parser.parse_args()
    rows = Rows(1_000_000 if args.smoke else args.rows)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = lmsolve.least_squares(rows.fun, np.zeros(PARAMETERS), rows.jac)
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = peak_rss()
    off = float(np.max(np.abs(result.x - TRUE) / result.standard_errors()))
    print(
        f"{rows.rows:,} residuals, {PARAMETERS} parameters: {wall:.1f} s ({cpu:.1f} s processor), "
        f"{rows.passes} passes over the rows, nfev {result.nfev}, njev {result.njev}\n"
        f"cost {result.cost:.10g}; {result.message}\n"
        f"residual standard deviation {np.sqrt(2 * result.cost / rows.rows):.5f} (true {SIGMA}); "
        f"largest deviation from the truth {off:.1f} standard errors\n"
        f"peak memory of the process {peak:,.0f} MiB = {peak * 2**20 / 1e9:.2f} GB; "
        f"J alone would take {8 * PARAMETERS * rows.rows / 1e9:.2f} GB\n\n{footer()}"
    )
    assert result.success and off < 5 and peak < LIMIT
    if args.smoke:
        whole = held(rows)
        apart = float(np.max(np.abs(whole.x - result.x) / result.standard_errors()))
        print(
            f"\nwith J held: cost apart {whole.cost / result.cost - 1:.0e}, parameters apart "
            f"{apart:.0e} standard errors, peak {peak_rss():,.0f} MiB"
        )
        assert apart < 1e-6
        return
    save(
        args.output,
        {
            "rows": rows.rows, "seconds": wall, "processor_seconds": cpu, "passes": rows.passes,
            "nfev": result.nfev, "njev": result.njev, "cost": result.cost, "peak_mib": peak,
            "deviation_stderr": off, "message": result.message,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
