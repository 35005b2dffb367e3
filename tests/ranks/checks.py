"""What each rank of a run of two finds, written to FOLDER/RANK.json: started by the rank tests.

Every check runs on both ranks in the same order, so that a rank that went its own way would hang
and not pass. Data and problems are small: two ranks on one machine take a second per step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmsolve import least_squares
from lmsolve.legate import rows
from lmsolve.legate._start import start
from tests.decay import X0, T, Y, curved, jacobian, nearly_dependent, residual, wide

xp = start()
from legate.core import get_legate_runtime  # noqa: E402  starts Legate, which start() does politely

RANK = get_legate_runtime().node_id


def mine(t: Any) -> bool:
    """Whether the block belongs to the last shard, which rank 1 holds."""
    return bool(t[-1] == T[-1])


def fitted() -> dict[str, Any]:
    """A fit on resident data: the bits of x and of the cost."""
    result = least_squares(rows(residual, jacobian, n=3, data=(xp.array(T), xp.array(Y))), X0)
    return {"x": result.x.tolist(), "bits": result.x.tobytes().hex(), "cost": result.cost.hex()}


def fitted_from_host_data() -> dict[str, Any]:
    """Robust, on host data that each rank reads by itself."""
    sharded = rows(residual, jacobian, n=3, data=(T, Y), loss="huber", f_scale=0.01)
    result = least_squares(sharded, X0, max_nfev=12)
    covariance = result.covariance()
    return {
        "x": result.x.tolist(),
        "bits": result.x.tobytes().hex() + covariance.tobytes().hex(),
        "covariance": covariance.tolist(),
    }


def fitted_by_torch() -> dict[str, Any]:
    """torch inside the tasks."""
    import torch

    def fun(x: Any, t: Any, y: Any) -> Any:
        return x[0] * torch.exp(-x[1] * t) + x[2] - y

    def jac(x: Any, t: Any, y: Any) -> Any:
        e = torch.exp(-x[1] * t)
        return torch.stack([e, -x[0] * t * e, torch.ones_like(t)], dim=1)

    sharded = rows(fun, jac, n=3, data=(xp.array(T), Y), namespace="torch")
    result = least_squares(sharded, X0, max_nfev=4)
    return {"cost": result.cost.hex(), "bits": result.x.tobytes().hex()}


def fitted_arrays() -> dict[str, Any]:
    """Residuals and Jacobian that are cuPyNumeric arrays."""
    fun, jac = arrays()
    result = least_squares(fun, xp.array(X0), jac, backend="cupynumeric", max_nfev=4)
    return {"cost": result.cost.hex(), "bits": np.asarray(result.x).tobytes().hex()}


def streamed_arrays() -> dict[str, Any]:
    """The same in blocks, whose sums stay with the shards of each rank until the last one."""
    fun, jac = arrays()
    cuts = (slice(0, 600), slice(600, len(T)))
    result = least_squares(
        lambda x: (fun(x)[cut] for cut in cuts),
        xp.array(X0),
        lambda x: ((fun(x)[cut], jac(x)[cut]) for cut in cuts),
        backend="cupynumeric",
        max_nfev=4,
    )
    return {"cost": result.cost.hex(), "bits": np.asarray(result.x).tobytes().hex()}


def arrays() -> tuple[Any, Any]:
    """The decay as functions of cuPyNumeric arrays."""
    t, y = xp.array(T), xp.array(Y)

    def fun(x: Any) -> Any:
        return x[0] * xp.exp(-x[1] * t) + x[2] - y

    def jac(x: Any) -> Any:
        e = xp.exp(-x[1] * t)
        return xp.stack([e, -x[0] * t * e, xp.ones_like(t)], axis=1)

    return fun, jac


def wide_arrays() -> dict[str, Any]:
    """More parameters than residuals, whose Jacobian is cut into columns."""
    fun, jac = wide(xp, 30, 4)
    result = least_squares(
        fun, xp.zeros(30), jac, bounds=(-0.01, 0.01), backend="cupynumeric", max_nfev=3
    )
    errors = result.standard_errors(absolute_sigma=True)
    bits = np.asarray(result.x).tobytes().hex() + errors.tobytes().hex()
    return {"cost": result.cost.hex(), "bits": bits, "errors": errors.tolist()}


def wide_trials() -> dict[str, Any]:
    """The same without bounds, robust: trials stay in Legate's memory, and one is rejected."""
    fun, jac = curved(xp, 30, 4)
    x0 = xp.array(3.0 * np.random.default_rng(3).standard_normal(30))
    result = least_squares(fun, x0, jac, loss="soft_l1", backend="cupynumeric", max_nfev=5)
    accepted = [trial.accepted for trial in result.history]
    bits = np.asarray(result.x).tobytes().hex()
    return {"cost": result.cost.hex(), "bits": bits, "accepted": accepted}


def iterated_arrays() -> dict[str, Any]:
    """Conjugate gradients whose products are sums over the rows of both ranks."""
    fun, jac = arrays()
    result = least_squares(
        fun, xp.array(X0), jac, tr_solver="lsmr", backend="cupynumeric", max_nfev=4
    )
    return {"cost": result.cost.hex(), "bits": np.asarray(result.x).tobytes().hex()}


def reduced_by_qr() -> dict[str, Any]:
    """An ill-conditioned problem goes over to the triangular factors of both ranks."""
    A, b = nearly_dependent()
    sharded = rows(lambda x, A, b: A @ x - b, lambda x, A, b: A, n=4, data=(A, b))
    result = least_squares(sharded, np.full(4, 2.0), max_nfev=9)
    return {"x": result.x.tolist(), "bits": result.x.tobytes().hex()}


def exception_of_one_rank() -> dict[str, Any]:
    """A function that fails on the last shard only."""

    def fun(x: Any, t: Any, y: Any) -> Any:
        if mine(t):
            raise KeyError("the last shard")
        return residual(x, t, y)

    try:
        rows(fun, jacobian, n=3, data=(T, Y)).residual(X0)
    except KeyError as caught:
        return {"message": caught.args[0], "notes": "".join(getattr(caught, "__notes__", []))}
    return {}


def trouble_of_one_rank() -> dict[str, Any]:
    """A NaN, and a singular system, in the last shard only: a cost that is not finite."""

    def nan(x: Any, t: Any, y: Any) -> Any:
        return residual(x, t, y) * (np.nan if mine(t) else 1.0)

    def singular(x: Any, t: Any, y: Any) -> Any:
        if mine(t):
            raise np.linalg.LinAlgError("singular")
        return residual(x, t, y)

    costs = [rows(f, jacobian, n=3, data=(T, Y)).residual(X0).cost for f in (nan, singular)]
    return {"finite": np.isfinite(costs).tolist()}


def parameters_that_differ() -> dict[str, Any]:
    """Ranks with different parameters are told so; they do not wait for each other for ever."""
    try:
        rows(residual, jacobian, n=3, data=(T, Y)).residual(X0 + RANK)
    except RuntimeError as caught:
        return {"message": str(caught)}
    return {}


CHECKS: tuple[Callable[[], dict[str, Any]], ...] = (
    fitted,
    fitted_from_host_data,
    fitted_by_torch,
    fitted_arrays,
    streamed_arrays,
    wide_arrays,
    wide_trials,
    iterated_arrays,
    reduced_by_qr,
    exception_of_one_rank,
    trouble_of_one_rank,
    parameters_that_differ,
)

if __name__ == "__main__":
    found = {"ranks": get_legate_runtime().node_count}
    for check in CHECKS:
        found[check.__name__] = check()
        Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
