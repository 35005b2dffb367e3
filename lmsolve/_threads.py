"""How many threads BLAS has, and one alone where we run threads, or tasks, of our own.

torch has a setting for the calling thread, OpenBLAS one for the process, which OMP_NUM_THREADS sets
at the start. Two tasks with NumPy's `A.T @ A` (600 x 1000) took 0.60 s of wall time with one thread
each and 1.05 s with two, on two cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

#: Names of OpenBLAS' functions: its own, and those of the builds in the wheels of NumPy and SciPy.
NAMES = [f"{p}openblas_%s_num_threads{s}" for p in ("scipy_", "") for s in ("64_", "")]

Getter: TypeAlias = Callable[[], int]
Setter: TypeAlias = Callable[[int], Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in every OpenBLAS of this process, and then as many as before."""
    changed = [(set_to, before) for get, set_to in libraries() if (before := get()) != 1]
    for set_to, _ in changed:
        set_to(1)
    try:
        yield
    finally:
        for set_to, before in changed:
            set_to(before)


def threads() -> int:
    """Threads that every OpenBLAS of this process may take; 1 where there is none."""
    return min((get() for get, _ in libraries()), default=1)


@cache
def libraries() -> list[tuple[Getter, Setter]]:
    """Functions that get and set the number of threads; none but on Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line.rpartition("/")[2]}
    found: list[tuple[Getter, Setter]] = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        name = next((n for n in NAMES if hasattr(library, n % "set")), None)
        if name is not None:
            found.append((getattr(library, name % "get"), getattr(library, name % "set")))
    return found
