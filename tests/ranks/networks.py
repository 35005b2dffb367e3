"""Networks on two ranks: what each finds, written to FOLDER/RANK.json; see `checks.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmsolve.legate import _cholesky
from lmsolve.legate._start import start
from lmsolve.torch import LM, fit
from tests.test_torch_legate import cloud, curve, dropping, first_step, net

start()
from legate.core import get_legate_runtime  # noqa: E402  starts Legate, which start() does politely

RANK = get_legate_runtime().node_id
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
    """A step of a network whose normal matrix stays on the processors that made it."""
    pays, _cholesky.pays = _cholesky.pays, lambda n: True
    try:
        looked_at, step = first_step(net(3), (X, Y), "legate")
    finally:
        _cholesky.pays = pays
    return {"step": step.tolist(), "matrix": looked_at.cluster.traffic["matrix"]}


def last(target: Any) -> bool:
    """Whether a block is of the last shard, which rank 1 holds; the probes see the first rows."""
    return bool(target[-1] == Y[-1]) and len(target) < len(Y)


def exception_of_one_rank() -> str:
    """A residual function that fails on the last shard only."""

    def failing(output: Any, target: Any) -> Any:
        if last(target):
            raise KeyError("the last shard")
        return output - target

    try:
        fit(net(3), (X, Y), residual=failing, linalg="legate")
    except KeyError as caught:
        return str(caught.args[0])
    return ""


def nan_of_one_rank() -> bool:
    """Whether the cost is finite where the last shard's is not."""

    def nan(output: Any, target: Any) -> Any:
        return (output - target) * (float("nan") if last(target) else 1.0)

    try:
        fit(net(3), (X, Y), residual=nan, linalg="legate")
    except ValueError as caught:
        return "must be finite at the start" not in str(caught)
    return True


def data_that_differ() -> str:
    """Other targets on every rank."""
    return told(net(3), (X, Y + RANK))


def parameters_that_differ() -> str:
    """Models that were made with different seeds."""
    return told(net(3, seed=RANK), (X, Y))


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
    crossed,
    in_bands,
    exception_of_one_rank,
    nan_of_one_rank,
    data_that_differ,
    parameters_that_differ,
)

if __name__ == "__main__":
    found: dict[str, Any] = {"ranks": get_legate_runtime().node_count}
    for check in CHECKS:
        found[check.__name__] = check()
        Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
