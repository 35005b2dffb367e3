"""Legate's memory, estimated before anything is launched: running out of it aborts the process."""

from __future__ import annotations

import os
import re
from pathlib import Path

MEGABYTE = 2**20
#: Share of a pool that one use may count on: the rest is for statuses, and lost between pieces.
USABLE = 0.95


def pool(option: str) -> int | None:
    """Bytes of a pool of this process, by the option that sets it; None if Legate chose it."""
    found = re.search(rf"--{option}[ =](\d+)", os.environ.get("LEGATE_CONFIG", ""))
    if found:
        return int(found.group(1)) * MEGABYTE
    return _chosen(option)


def _chosen(option: str) -> int | None:
    """Bytes of the pool as Legate tells them, from 26.6 on."""
    from legate.core import get_legate_runtime

    runtime = get_legate_runtime()
    if not hasattr(runtime, "realm_config"):
        return None
    size = getattr(runtime.realm_config(), option, None)
    return size * MEGABYTE if isinstance(size, int) and size > 0 else None


def require(need: int, option: str, what: str) -> None:
    """Raise MemoryError if ``need`` bytes per process can't fit the pool."""
    size = pool(option)
    if size is not None and need > USABLE * size:
        raise MemoryError(
            f"{what} need {_text(need)} of Legate's memory in each process, its pool has "
            f"{_text(size)}: start with --{option} {-(-need * 11 // (10 * MEGABYTE))} or more."
        )


def fitting(size: int, option: str) -> int:
    """How many pieces of ``size`` bytes the pool holds; many where its size is not known."""
    bytes_ = pool(option)
    return 2**30 if bytes_ is None else int(USABLE * bytes_) // max(size, 1)


def available() -> int | None:
    """Bytes of host memory that are free for use; None where Linux does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return 1024 * int(found.group(1)) if found else None


def require_host(need: int, what: str) -> None:
    """Raise MemoryError if ``need`` bytes don't fit the host: allocating them would not fail."""
    free = available()
    if free is not None and need > USABLE * free:
        raise MemoryError(
            f"{what} need {_text(need)}, and {_text(free)} of host memory are free: use fewer "
            "parameters or a machine with more memory."
        )


def fitting_host(size: int) -> int:
    """How many pieces of ``size`` bytes the host has room for; many where that is not known."""
    free = available()
    return 2**30 if free is None else int(USABLE * free) // max(size, 1)


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
