"""Networks on two ranks: what each finds, written to FOLDER/RANK.json; see `checks.py`."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmsolve.legate import _cholesky
from lmsolve.legate._start import start
from lmsolve.torch import LM, fit
from tests.test_torch_legate import cloud, curve, dropping, first_step, net, normalised

start()
from legate.core import get_legate_runtime  # noqa: E402  starts Legate, which start() does politely

RANK = get_legate_runtime().node_id
FOLDER = Path(sys.argv[1])
X, Y = curve()


def summary(result: Any) -> dict[str, Any]:
    """Cost and bits of a fit."""
    return {"cost": float(result.cost), "bits": result.x.numpy().tobytes().hex()}


def tall() -> dict[str, Any]:
    """More rows than parameters."""
    return summary(fit(net(3), (X, Y), max_steps=3, max_seconds=500.0, linalg="legate"))


def wide() -> dict[str, Any]:
    """More parameters than rows."""
    return summary(fit(net(40, 3, 2), cloud(), max_steps=2, linalg="legate"))


def dropped() -> dict[str, Any]:
    """Random masks, drawn by the rank that holds the shard."""
    return summary(fit(dropping(), (X, Y), max_steps=2, linalg="legate"))


def crossed() -> dict[str, int]:
    """Bytes between the host and the tasks in two steps."""
    optimizer = LM(net(3), linalg="legate")
    for _ in range(2):
        optimizer.step(X, Y)
    return dict(optimizer._session.cluster.traffic)


def in_bands() -> dict[str, Any]:
    """A network whose normal matrix stays on the processors that made it: its step, and a fit."""
    return distributed(net(3), (X, Y))


def in_wide_bands() -> dict[str, Any]:
    """The same of a kernel J J'."""
    return distributed(net(40, 3, 2), cloud())


@contextmanager
def everything_distributed() -> Iterator[None]:
    """Every matrix is large enough."""
    pays, _cholesky.pays = _cholesky.pays, lambda n: True
    try:
        yield
    finally:
        _cholesky.pays = pays


def clocks_that_differ() -> bool:
    """Whether a checkpoint is written that is due by the first rank's clock alone."""
    path, seconds = FOLDER / f"clock{RANK}", 1e-9 if RANK == 0 else 1e9
    options = {"checkpoint": path, "checkpoint_steps": None, "checkpoint_seconds": seconds}
    with everything_distributed():
        fit(net(3), (X, Y), max_steps=4, linalg="legate", **options)
    return path.exists()


def distributed(model: Any, data: Any) -> dict[str, Any]:
    """The first step, and two more that are accepted, of matrices that are large enough."""
    with everything_distributed():
        looked_at, step = first_step(model, data, "legate")
        crossed = looked_at.cluster.traffic
        crossed.clear()
        while looked_at.state.nit < 2:
            looked_at.trial()
        crossed = dict(crossed)
    bits = looked_at.x.numpy().tobytes().hex()
    return {"step": step.tolist(), "crossed": crossed, "x": looked_at.x.tolist(), "bits": bits}


def last(target: Any) -> bool:
    """Whether a block is of the last shard, which rank 1 holds; the probes see the first rows."""
    return bool(target[-1] == Y[-1]) and len(target) < len(Y)


def exception_of_one_rank() -> dict[str, Any]:
    """A residual function that fails on the last shard only."""

    def failing(output: Any, target: Any) -> Any:
        if last(target):
            raise KeyError("the last shard")
        return output - target

    try:
        fit(net(3), (X, Y), residual=failing, linalg="legate")
    except KeyError as caught:
        trace = "".join(traceback.format_exception(caught))
        return {"message": caught.args[0], "trace": trace}
    return {}


def nan_of_one_rank() -> bool:
    """Whether the cost is finite where the last shard's is not."""

    def nan(output: Any, target: Any) -> Any:
        return (output - target) * (float("nan") if last(target) else 1.0)

    try:
        fit(net(3), (X, Y), residual=nan, linalg="legate")
    except ValueError as caught:
        return "must be finite at the start" not in str(caught)
    return True


def nan_on_the_way() -> dict[str, Any]:
    """The last shard's residuals are NaN in two of its evaluations, those of a trial."""
    count = 0

    def nan(output: Any, target: Any) -> Any:
        nonlocal count
        count += last(target)
        # The start, its linearisation with the curvature, then the first trial.
        return (output - target) * (float("nan") if last(target) and 4 <= count < 6 else 1.0)

    result = fit(net(3), (X, Y), residual=nan, linalg="legate", max_steps=5)
    return {"accepted": result.history["accepted"], **summary(result)}


def out_of_memory_of_one_rank() -> dict[str, Any]:
    """The last shard's blocks are too large until they are halved, on both ranks."""

    def greedy(output: Any, target: Any) -> Any:
        if last(target) and len(target) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return output - target

    optimizer = LM(net(3), residual=greedy, linalg="legate", memory=1 << 20)
    optimizer.step(X, Y)
    session = optimizer._session
    return {"cost": session.state.cost, "samples": session.problem.plan.samples}


def resumed() -> dict[str, Any]:
    """A fit that one process has begun; it leaves a checkpoint of its own."""
    options = {"resume": FOLDER / "begun", "checkpoint": FOLDER / "state", "checkpoint_steps": 1}
    return summary(fit(net(3), (X, Y), max_steps=5, linalg="legate", **options))


def coupled() -> dict[str, Any]:
    """Batch normalisation in training mode: the samples of both ranks see each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return summary(fit(normalised(), (X, Y), max_steps=2, linalg="legate"))


def data_that_differ() -> str:
    """Other targets on every rank."""
    return told(net(3), (X, Y + RANK))


def parameters_that_differ() -> str:
    """Models that were made with different seeds."""
    return told(net(3, seed=RANK), (X, Y))


def stored_parameters_that_differ() -> str:
    """The same where no rank's memory holds what the tasks see."""
    with everything_distributed():
        return parameters_that_differ()


def told(model: Any, data: Any) -> str:
    """What a step says."""
    try:
        LM(model, linalg="legate").step(*data)
    except RuntimeError as caught:
        return str(caught)
    return ""


CHECKS: tuple[Callable[[], Any], ...] = (
    tall,
    wide,
    dropped,
    coupled,
    resumed,
    crossed,
    in_bands,
    in_wide_bands,
    clocks_that_differ,
    exception_of_one_rank,
    nan_of_one_rank,
    nan_on_the_way,
    out_of_memory_of_one_rank,
    data_that_differ,
    parameters_that_differ,
    stored_parameters_that_differ,
)

if __name__ == "__main__":
    found: dict[str, Any] = {"ranks": get_legate_runtime().node_count}
    for check in CHECKS:
        found[check.__name__] = check()
        (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
