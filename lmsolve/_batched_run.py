"""Running many fits: stages of derivatives, the width of the working set, threads, progress.

The fits that are worked on at one time, the working set, are few enough for their arrays to stay
in the processor's cache: 10,000 fits in sets of 1,000 take half the time of one set of 10,000.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ._batched_inputs import Options
from ._batched_lm import RUNNING, Ended, Fits, Limits, Loop, fresh, take
from ._batched_model import ByTorch, Derivative, Model, central, device_of, forward
from ._xp import Array, Namespace, is_numpy, is_torch

# Measured with 2 MiB of level-2 cache: 4 to 16 MiB differ by 4 %, 2 MiB is 14 % and 1 MiB 30 %
# slower than 8 (more turns of the loop); each thread has its own.
CACHE_BYTES = 8 * 2**20
DEVICE_BYTES = 2**30
# Working sets that are done in one go: each ends with a few slow fits by themselves, and all that
# the loop keeps of a fit is dropped after it.
BLOCK = 16
# Forward differences serve to come this near; central ones take it to the tolerance asked for.
NEAR = 1e-8


def run(
    xp: Namespace, model: Model, derivative: Derivative | None, start: Array, options: Options
) -> Ended:
    """All fits from the starting points (n, B), by shares if there are several workers."""
    total = start.shape[1]
    width = max(1, min(total, _width(xp, start, model.m, options.memory)))
    stages = [
        Loop(xp, model, derivative, limits, width)
        for derivative, limits in _stages(derivative, options, is_torch(start))
    ]
    index = xp.arange(total, **device_of(start))
    bar = _bar(options.progress, total)

    def share(cut: tuple[int, int]) -> list[Ended]:
        parts = []
        with quiet(xp):
            starts = [*range(*cut, BLOCK * width)] or [cut[0]]
            for a, b in pairwise([*starts, cut[1]]):
                fits = fresh(xp, start[:, a:b], index[a:b])
                fits = _through(xp, stages, fits)
                # Every trial is an evaluation, and so is the start of every stage.
                parts.append(fits.ended(fits.nit + len(stages), stages[-1].scatter(fits)))
                bar(b - a)
        return parts

    if is_numpy(xp):
        _keep_memory()
    cuts = list(pairwise(total * i // options.workers for i in range(options.workers + 1)))
    try:
        if options.workers == 1:
            parts = share((0, total))
        else:
            with ThreadPoolExecutor(options.workers) as pool:
                parts = [part for parts in pool.map(share, cuts) for part in parts]
    finally:
        bar.close()
    return Ended(*[xp.concat(arrays, axis=-1) for arrays in zip(*parts)])


def _through(xp: Namespace, stages: list[Loop], fits: Fits) -> Fits:
    """The fits after all stages, in the order in which they came."""
    for i, stage in enumerate(stages):
        if i > 0:
            status = xp.where(fits.status > 0, RUNNING, fits.status)
            fits = replace(fits, status=status, last=xp.zeros_like(fits.last))
        fits = stage.run(fits)
    return take(xp, fits, xp.argsort(fits.index))


def _stages(
    derivative: Derivative | None, options: Options, torch_arrays: bool
) -> list[tuple[Derivative, Limits]]:
    """What to run one after the other: derivatives, and the limits to run them to."""
    limits = options.limits
    if derivative is not None:
        return [(derivative, limits)]
    if options.jac is not None:
        return [({"2-point": forward, "3-point": central}[options.jac], limits)]
    if torch_arrays:
        return [(ByTorch(), limits)]
    near = limits._replace(xtol=max(NEAR, limits.xtol), gtol=max(NEAR, limits.gtol))
    return [(forward, near), (central, limits)]


def _width(xp: Namespace, start: Array, m: int, memory: int | None) -> int:
    """Fits whose arrays fill `memory`: n columns and some temporaries of length m, 6 of n^2."""
    n = start.shape[0]
    item = int(xp.finfo(start.dtype).bits) // 8
    if memory is None:
        on_host = is_numpy(xp) or str(device_of(start).get("device")) == "cpu"
        memory = CACHE_BYTES if on_host else DEVICE_BYTES
    temporaries = 12 if is_torch(start) else 6  # torch keeps some for its backward pass
    return int(memory // (item * (m * (n + temporaries) + 6 * n * n)))


class _Bar:
    """A progress bar that several threads may move, or none at all."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.lock = bar, threading.Lock()

    def __call__(self, k: int) -> None:
        if self.bar is not None:
            with self.lock:
                self.bar.update(k)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar(progress: bool, total: int) -> _Bar:
    """A tqdm bar over the fits, if asked for."""
    if not progress:
        return _Bar(None)
    try:
        from tqdm.auto import tqdm
    except ImportError as missing:
        raise ImportError("`progress` needs tqdm: pip install tqdm") from missing
    return _Bar(tqdm(total=total, unit="fit"))


@contextlib.contextmanager
def quiet(xp: Namespace) -> Iterator[None]:
    """No warnings of trial points that overflow, and no graph kept by torch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        if "torch" in xp.__name__:
            stack.enter_context(xp.no_grad())
        yield


def _keep_memory() -> None:
    """Have the C library keep freed arrays of up to 16 MiB instead of handing each back.

    Freeing one large block raises glibc's own threshold; elsewhere this does nothing. Without it
    every temporary of a model is paged in anew, which doubled the time of a model of 500 x 50.
    """
    np.empty(2**24, dtype=np.uint8)
