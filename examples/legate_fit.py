"""A fit to more rows than memory holds: each Legate task makes its own rows as it needs them.

    legate --cpus 2 --gpus 0 examples/legate_fit.py              # 1e8 rows on this machine
    legate --gpus 8 --nodes 2 --launcher mpirun examples/legate_fit.py 1e10
    scripts/with-legate.sh single python examples/legate_fit.py 1e6

A real fit would read its rows: pass `data=` a memory map, a dataset of h5py, or cuPyNumeric arrays.
"""

import resource
import sys
import time

import numpy as np

from lmsolve import least_squares
from lmsolve.legate import is_first_rank, rows

TRUE = np.array([2.0, 1.5, 0.7, 0.3])
NOISE = 0.1
M = int(float(sys.argv[1])) if len(sys.argv) > 1 else 100_000_000


def uniform(i):
    """Numbers in [0, 1) that depend on the row alone, by splitmix64."""
    z = (i.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(float) * 2.0**-53


def data(numbers):
    """t and y of some rows."""
    i = np.arange(numbers.start, numbers.stop)
    t = 4.0 * uniform(i)
    noise = NOISE * 12**0.5 * (uniform(i + M) - 0.5)
    return t, TRUE[0] * np.exp(-TRUE[1] * t) * np.cos(TRUE[2] * t) + TRUE[3] + noise


def residual(x, numbers):
    t, y = data(numbers)
    return x[0] * np.exp(-x[1] * t) * np.cos(x[2] * t) + x[3] - y


def linear(x, numbers):
    """Residuals and Jacobian in one pass over the rows."""
    t, y = data(numbers)
    e, c = np.exp(-x[1] * t), np.cos(x[2] * t)
    J = np.empty((len(t), 4))
    J[:, 0] = e * c
    J[:, 1] = -x[0] * t * J[:, 0]
    J[:, 2] = -x[0] * t * e * np.sin(x[2] * t)
    J[:, 3] = 1.0
    return x[0] * J[:, 0] + x[3] - y, J


def main():
    problem = rows(residual, linear, m=M, n=4)
    first = is_first_rank()
    start = time.perf_counter()

    def report(intermediate_result):
        if first:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{time.perf_counter() - start:7.1f} s  step {intermediate_result.nit}  "
                f"cost {intermediate_result.cost:.8e}  memory {memory:.2f} GB",
                flush=True,
            )

    result = least_squares(problem, [1.0, 1.0, 1.0, 0.0], callback=report)
    if first:
        print(result)
        print(f"J would have taken {M * 4 * 8 / 1e9:.1f} GB.")
    assert result.success
    assert np.all(np.abs(result.x - TRUE) < 5 * result.standard_errors())


main()
