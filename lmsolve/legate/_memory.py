"""Legate's memory, estimated before anything is launched: running out of it aborts the process."""

from __future__ import annotations

import os
import re

MEGABYTE = 2**20


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
    if size is not None and need > size:
        raise MemoryError(
            f"{what} need {_text(need)} of Legate's memory in each process, its pool has "
            f"{_text(size)}: start with --{option} {-(-need * 11 // (10 * MEGABYTE))} or more."
        )


def fitting(size: int, option: str) -> int:
    """How many pieces of ``size`` bytes the pool holds; many where its size is not known."""
    bytes_ = pool(option)
    return 2**30 if bytes_ is None else bytes_ // max(size, 1)


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
