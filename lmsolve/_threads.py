"""How many threads BLAS has, and one alone where we run threads, or tasks, of our own.

torch has a setting for the calling thread, OpenBLAS one for the process, which OMP_NUM_THREADS sets
at the start. Two tasks with NumPy's `A.T @ A` (600 x 1000) took 0.60 s of wall time with one thread
each and 1.05 s with two, on two cores.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

#: Names of OpenBLAS' functions: its own, and those of the builds in the wheels of NumPy and SciPy.
NAMES = [f"{p}openblas_%s_num_threads{s}" for p in ("scipy_", "") for s in ("64_", "")]

Getter: TypeAlias = Callable[[], int]
Setter: TypeAlias = Callable[[int], Any]


class _Users:
    """Who is within `one_thread`, and what each library had before the first of them.

    OpenBLAS' setting is one for the process, so there is one of these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within: set[object] = set()
        self._before: list[tuple[Setter, int]] = []

    def enter(self, user: object) -> None:
        """Set one thread for the first to come."""
        with self._lock:
            if not self._within:
                self._before = [(put, count) for get, put in libraries() if (count := get()) != 1]
                for put, _ in self._before:
                    put(1)
            self._within.add(user)

    def leave(self, user: object) -> None:
        """Undo that after the last; also for one whom a signal has kept from entering."""
        with self._lock:
            self._within.discard(user)
            if not self._within:
                self._restore()

    def forked(self) -> None:
        """In a child, which has none of the threads that were to leave or had the lock."""
        self._lock, self._within = threading.Lock(), set()
        self._restore()

    def _restore(self) -> None:
        for put, count in self._before:
            put(count)
        self._before = []


_users = _Users()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_users.forked)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in every OpenBLAS of this process, and then as many as before.

    Several threads of the process may be within at once: the last one to leave restores.
    """
    user = object()
    try:
        _users.enter(user)
        yield
    finally:
        _users.leave(user)


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
        with suppress(OSError):  # other files have such names, and a library may be deleted since
            library = ctypes.CDLL(path)
            name = next((n for n in NAMES if hasattr(library, n % "set")), None)
            if name is not None:
                found.append((getattr(library, name % "get"), getattr(library, name % "set")))
    return found
