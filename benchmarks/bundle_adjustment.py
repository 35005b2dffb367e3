"""A sparse problem of the shape of bundle adjustment: 50 cameras, 5,000 points, 30,000 views.

    python benchmarks/bundle_adjustment.py              # results/bundle_adjustment.json
    python benchmarks/bundle_adjustment.py --smoke      # 8 cameras, 200 points, nothing written
    python benchmarks/bundle_adjustment.py --repeats 3

9 parameters a camera (rotation vector, translation, focal length, two of radial distortion) and 3
a point: 60,000 residuals of 15,450 parameters, generated with noise of half a pixel. Both solvers
get the residual and `jac_sparsity`, and difference the same groups of columns; SciPy's `trf` gets
x_scale='jac' and, beside its default tolerance, ftol=1e-4, both as its own bundle-adjustment
example has them, and at most 100 evaluations: its last steps crawl. Runs take turns. A start
`--away 3` is three times as far from the truth as one of 1, where the cameras are off by 0.6
degrees and 1 % of the distance, and the points by 3 % of the scene.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from _common import CLOCKS, RESULTS, Clock, footer, quartiles, save, seconds_of, table

import lmsolve

CAMERA, POINT = 9, 3
TARGET = 3.0


@dataclass(frozen=True)
class Scene:
    """Residuals of a generated scene, a start, and where the Jacobian is not zero."""

    fun: Callable[[np.ndarray], np.ndarray]
    x0: np.ndarray
    sparsity: Any


@dataclass
class Row:
    solver: str
    seconds: list[float]
    cost: float = np.inf
    nfev: int = 0
    njev: int = 0
    message: str = ""


def project(cameras: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Images (k, 2) of points (k, 3) in cameras (k, 9)."""
    w, shift = cameras[:, :3], cameras[:, 3:6]
    angle = np.sqrt(np.sum(w * w, axis=1, keepdims=True)) + 1e-12
    axis = w / angle
    along = np.sum(axis * points, axis=1, keepdims=True)
    turned = points * np.cos(angle) + np.cross(axis, points) * np.sin(angle)
    seen = turned + axis * along * (1 - np.cos(angle)) + shift
    image = -seen[:, :2] / seen[:, 2:]
    square = np.sum(image * image, axis=1)
    focal, k1, k2 = cameras[:, 6:].T
    return (focal * (1 + square * (k1 + square * k2)))[:, None] * image


def make_scene(cameras: int, points: int, views: int, away: float = 1.0) -> Scene:
    rng = np.random.default_rng(0)
    # Every camera and, twice, every point is seen; the other views are drawn at random.
    camera = np.concatenate([np.arange(cameras), rng.integers(0, cameras, views - cameras)])
    point = np.concatenate([np.tile(np.arange(points), 2), rng.integers(0, points, views)])[:views]
    C = np.zeros((cameras, CAMERA))
    C[:, :3] = 0.1 * rng.standard_normal((cameras, 3))
    C[:, 3:6] = [0, 0, -6] + 0.3 * rng.standard_normal((cameras, 3))
    C[:, 6] = 500 + 10 * rng.standard_normal(cameras)
    C[:, 7] = 0.01 * rng.standard_normal(cameras)
    P = rng.uniform(-1, 1, (points, POINT))
    seen = project(C[camera], P[point]) + 0.5 * rng.standard_normal((views, 2))
    spread = np.array([0.01] * 3 + [0.05] * 3 + [5, 0.001, 0.001])
    C0 = C + away * spread * rng.standard_normal(C.shape)
    P0 = P + away * 0.03 * rng.standard_normal(P.shape)

    def fun(x):
        C = x[: CAMERA * cameras].reshape(cameras, CAMERA)
        P = x[CAMERA * cameras :].reshape(points, POINT)
        return (project(C[camera], P[point]) - seen).ravel()

    x0 = np.concatenate([C0.ravel(), P0.ravel()])
    columns = np.hstack([
        CAMERA * camera[:, None] + np.arange(CAMERA),
        CAMERA * cameras + POINT * point[:, None] + np.arange(POINT),
    ])  # fmt: skip
    columns = np.repeat(columns, 2, axis=0)
    rows = np.repeat(np.arange(2 * views), columns.shape[1])
    ones = np.ones(rows.size, dtype=int)
    shape = (2 * views, x0.size)
    return Scene(fun, x0, scipy.sparse.csr_array((ones, (rows, columns.ravel())), shape=shape))


def solvers(s: Scene, trf_nfev: int) -> dict[str, Callable[[], Any]]:
    def trf(ftol):
        return lambda: scipy.optimize.least_squares(
            s.fun, s.x0, jac_sparsity=s.sparsity, method="trf", x_scale="jac", ftol=ftol,
            max_nfev=trf_nfev,
        )  # fmt: skip

    return {
        "lmsolve": lambda: lmsolve.least_squares(s.fun, s.x0, jac_sparsity=s.sparsity),
        "scipy trf": trf(1e-8),
        "scipy trf, ftol=1e-4": trf(1e-4),
    }


def measure(scene: Scene, trf_nfev: int, repeats: int, clock: Clock) -> list[Row]:
    runs = solvers(scene, trf_nfev)
    rows = {name: Row(name, []) for name in runs}

    def once(name):
        result = runs[name]()
        row = rows[name]
        row.cost, row.message = float(result.cost), result.message
        row.nfev, row.njev = int(result.nfev), int(result.njev)

    for _ in range(repeats):
        for name, row in rows.items():
            row.seconds.append(seconds_of(lambda name=name: once(name), clock))
    return list(rows.values())


def report(rows: list[Row]) -> str:
    best = min(row.cost for row in rows)
    cells = []
    for row in rows:
        low, middle, high = quartiles(row.seconds)
        ratio = np.median(np.divide(row.seconds, rows[0].seconds))
        cells.append([
            row.solver, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", f"{ratio:.1f}", row.nfev,
            row.njev, f"{row.cost:.9g}", f"{row.cost / best - 1:.0e}", row.message,
        ])  # fmt: skip
    head = ["solver", "seconds", "quartiles", "to lmsolve", "nfev", "njev", "cost", "excess", ""]
    return table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a small scene, nothing written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS / "bundle_adjustment.json")
    parser.add_argument("--away", type=float, nargs="*", default=[1.0, 2.0, 3.0, 5.0, 8.0])
    args = parser.parse_args()
    cameras, points, views = (8, 200, 900) if args.smoke else (50, 5_000, 30_000)
    trf_nfev, repeats = (10, 1) if args.smoke else (100, args.repeats)
    kept = {}
    for away in args.away[:1] if args.smoke else args.away:
        scene = make_scene(cameras, points, views, away)
        rows = measure(scene, trf_nfev, repeats, CLOCKS[args.clock])
        m, n = scene.sparsity.shape
        print(f"{cameras} cameras, {points:,} points, {views:,} views: m = {m:,}, n = {n:,}; "
              f"start {away:g} away\n\n{report(rows)}\n", flush=True)  # fmt: skip
        assert rows[0].cost <= min(row.cost for row in rows) * (1 + 1e-6)
        kept[f"{away:g}"] = [asdict(row) for row in rows]
    print(f"clock: {args.clock}; target: trf at least {TARGET} times lmsolve\n{footer()}")
    if not args.smoke:
        save(args.output, {"clock": args.clock, "away": kept})


if __name__ == "__main__":
    main()
