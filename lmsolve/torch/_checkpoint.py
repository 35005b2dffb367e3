"""The checkpoints of a fit: what is in a file, and when one is due."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from lmsolve._files import replacing

VERSION = 1


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint; whatever kills the process, the old one or the new one is whole."""
    with replacing(path) as file:
        torch.save({"version": VERSION, **content}, file)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, so that a file cannot run code."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("version") != VERSION:
        raise ValueError(
            f"`resume` must name a checkpoint of version {VERSION}, got "
            f"{content.get('version')} in {os.fspath(path)}."
        )
    return content


class Schedule:
    """When a checkpoint is due: every so many steps, or seconds."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self._steps, self._seconds = steps, seconds
        self._last_step, self._last_time = 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to write now; the clock restarts when it is."""
        by_steps = self._steps is not None and step - self._last_step >= self._steps
        by_time = self._seconds is not None and time.monotonic() - self._last_time >= self._seconds
        if by_steps or by_time:
            self._last_step, self._last_time = step, time.monotonic()
        return by_steps or by_time
