"""What a caller hangs on a run: a callback, and workers for the differences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult


def notifier(callback: Any) -> Callable[[OptimizeResult], bool] | None:
    """The user's callback by SciPy's two conventions, as a question whether to stop."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"`callback` must be callable, got {type(callback).__name__}.")
    try:
        by_name = set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except (TypeError, ValueError):
        by_name = False

    def notify(result: OptimizeResult) -> bool:
        try:
            if by_name:
                return bool(callback(intermediate_result=result))
            return bool(callback(result.x))
        except StopIteration:
            return True

    return notify


class Workers:
    """Context in which a problem's differences are evaluated by ``workers``."""

    def __init__(self, workers: Any, problem: Any) -> None:
        self._workers, self._problem = workers, problem
        self._pool: Any = None
        if workers is None or isinstance(workers, bool):
            if workers is not None:
                raise TypeError("`workers` must be an int or map-like, got a bool.")
        elif not callable(workers) and not isinstance(workers, int | np.integer):
            raise TypeError(f"`workers` must be an int or map-like, got {type(workers).__name__}.")
        elif not callable(workers) and (workers == 0 or workers < -1):
            raise ValueError(f"`workers` must be -1 or a positive integer, got {workers}.")

    def __enter__(self) -> None:
        diff = getattr(self._problem, "differences", None)
        if diff is None or self._workers is None or self._workers == 1:
            return
        if callable(self._workers):
            run = self._workers
        else:
            from multiprocessing import Pool

            self._pool = Pool(None if self._workers == -1 else int(self._workers))
            run = self._pool.map
        self._problem.differences = replace(diff, map=run)

    def __exit__(self, *exception: object) -> None:
        diff = getattr(self._problem, "differences", None)
        if diff is not None and diff.map is not map:
            self._problem.differences = replace(diff, map=map)
        if self._pool is not None:
            self._pool.close()
            self._pool.join()
