"""What does an iteration cost where the normal equations will not do?

    python benchmarks/ill_conditioned.py             # four shapes, results/ill_conditioned.json
    python benchmarks/ill_conditioned.py --smoke     # a small shape, nothing written
    python benchmarks/ill_conditioned.py --clock cpu # on a machine that does other work as well

The problem is that of large_dense.py, tanh(A x) = y with noise, and the same with half of A's
columns a small distance from the other half: A has the scaled condition in the second column. An
iteration is the time from one accepted step to the next, evaluations included, where no trial
between them was rejected: by the normal equations on the first problem, by QR on the others, in one
run. The first point at which QR is asked for has made J'J in vain; "first" has it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _common import CLOCKS, RESULTS, Clock, footer, save, table
from large_dense import Tanh

import lmsolve

SHAPES = ((300_000, 20), (50_000, 200), (20_000, 1000), (5_000, 2000))
SMOKE = ((2_000, 20),)
CONDITIONS = (1e7, 1e12)
TARGET = 3.0


@dataclass(frozen=True)
class Fit:
    """Seconds of the iterations of a fit, by how their steps were found."""

    m: int
    n: int
    condition: float | None
    normal: list[float]
    first: list[float]
    qr: list[float]
    rank: int
    cost: float


def problem(m: int, n: int, condition: float | None) -> Tanh:
    """The problem with its columns in pairs that nearly agree, or as it is."""
    p = Tanh(m, n)
    rng = np.random.default_rng(1)
    if condition is not None:
        half = n // 2
        q = np.sqrt(half / m)  # singular values of half of A: (1 - q) to (1 + q) times sqrt(m)
        distance = 2 * (1 + q) / (1 - q) / condition
        p.A[:, half:] = p.A[:, : n - half] + p.A[:, half:] * distance
        p.A *= 0.5
    p.y = np.tanh(p.A @ rng.normal(0, 1 / np.sqrt(n), n)) + 0.01 * rng.standard_normal(m)
    return p


def measure(m: int, n: int, condition: float | None, clock: Clock) -> Fit:
    """A fit, and the time of each of its accepted steps."""
    p = problem(m, n, condition)
    stamps = [clock()]
    result = lmsolve.least_squares(p.fun, p.x0, p.jac, callback=lambda x: stamps.append(clock()))
    kinds: dict[str, list[float]] = {"normal": [], "first": [], "qr": []}
    before, escalated = 1, False
    accepted = [trial for trial in result.history if trial.accepted]
    for seconds, trial in zip(np.diff(stamps).tolist(), accepted, strict=True):
        kind = "normal" if not trial.escalated else "qr" if escalated else "first"
        if trial.nfev == before + 1:
            kinds[kind].append(seconds)
        before, escalated = trial.nfev, trial.escalated
    return Fit(m, n, condition, **kinds, rank=result.rank, cost=result.cost)


def row(fit: Fit, base: Fit) -> list[object]:
    """Medians in milliseconds, and the ratio that is asked for."""
    normal, first, qr = (
        1e3 * float(np.median(v)) if v else None for v in (base.normal, fit.first, fit.qr)
    )
    return [
        f"{fit.m} x {fit.n}",
        "-" if fit.condition is None else f"{fit.condition:.0e}",
        *("-" if v is None else f"{v:,.1f}" for v in (normal, first, qr)),
        "-" if qr is None else f"{qr / normal:.2f}",
        len(fit.normal), len(fit.qr), fit.rank, f"{fit.cost:.8g}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small shape, nothing written")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS / "ill_conditioned.json")
    args = parser.parse_args()
    fits, rows = [], []
    for m, n in SMOKE if args.smoke else SHAPES:
        base = measure(m, n, None, CLOCKS[args.clock])
        found = [base, *(measure(m, n, k, CLOCKS[args.clock]) for k in CONDITIONS)]
        if not all(fit.qr for fit in found[1:]):
            raise SystemExit(f"{m} x {n}: no iteration went by QR")
        fits += found
        rows += [row(fit, base) for fit in found]
    print(table(
        ["m x n", "condition", "normal ms", "first ms", "QR ms", "QR / normal", "normal", "by QR",
         "rank", "cost"], rows,
    ))  # fmt: skip
    print(f"\nclock: {args.clock}; target: {TARGET}\n{footer()}")
    if not args.smoke:
        save(args.output, {"clock": args.clock, "fits": [asdict(fit) for fit in fits]})


if __name__ == "__main__":
    main()
