"""What `import lmsolve` costs beyond `import scipy.optimize`.

Every sample is a fresh interpreter that imports scipy.optimize and then lmsolve, each timed, in
processor time (on a machine that does other work as well, wall time measures that work), from
byte code, as after any first import.

    python benchmarks/import_time.py [--smoke]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

PROBE = """
from time import process_time
start = process_time()
import scipy.optimize
middle = process_time()
import lmsolve
print(middle - start, process_time() - middle)
"""


def sample() -> tuple[float, float]:
    """Seconds for scipy.optimize, and for lmsolve on top, in a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=environment
    )
    scipy_s, lmsolve_s = map(float, done.stdout.split())
    return scipy_s, lmsolve_s


def spread(milliseconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    return f"{middle:7.1f} ms   (quartiles {low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of import lmsolve beyond scipy.optimize.")
    parser.add_argument("--smoke", action="store_true", help="three samples, as CI runs it")
    repeats = 3 if parser.parse_args().smoke else 25
    sample()  # fills the file cache and the byte code
    scipy_ms, lmsolve_ms = zip(*[(1e3 * a, 1e3 * b) for a, b in (sample() for _ in range(repeats))])
    print(f"import scipy.optimize  {spread(list(scipy_ms))}")
    print(f"import lmsolve, beyond {spread(list(lmsolve_ms))}   {repeats} samples")


if __name__ == "__main__":
    main()
