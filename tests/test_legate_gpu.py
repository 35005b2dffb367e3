"""The same fits on GPUs, where a machine has them: sums are made there, in streams of Legate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmsolve import least_squares
from lmsolve.legate import _cholesky, rows
from lmsolve.legate._cholesky import LegateCholesky
from tests.decay import X0, T, Y, jacobian, residual
from tests.test_legate_arrays import long_decay

pytestmark = [pytest.mark.legate, pytest.mark.gpu]


@pytest.fixture(scope="module")
def xp() -> Any:
    from lmsolve.legate._start import start

    return start()


def torch_functions() -> tuple[Any, Any]:
    """The decay in torch, which insists on the GPU."""
    import torch

    def fun(x: Any, t: Any, y: Any) -> Any:
        assert x.is_cuda and t.is_cuda and y.is_cuda
        return x[0] * torch.exp(-x[1] * t) + x[2] - y

    def jac(x: Any, t: Any, y: Any) -> Any:
        e = torch.exp(-x[1] * t)
        return torch.stack([e, -x[0] * t * e, torch.ones_like(t)], dim=1)

    return fun, jac


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("resident", [True, False])
def test_rows_are_evaluated_by_torch_on_the_gpu(xp: Any, resident: bool, exact: bool) -> None:
    fun, jac = torch_functions()
    data = (xp.array(T), xp.array(Y)) if resident else (T, Y)
    problem = rows(fun, jac if exact else None, n=3, data=data, namespace="torch")
    expected = least_squares(residual, X0, jacobian, args=(T, Y))
    np.testing.assert_allclose(least_squares(problem, X0).x, expected.x, rtol=1e-7)


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_arrays_are_reduced_on_the_gpu(xp: Any, blocks: int, loss: str) -> None:
    options: Any = {"loss": loss, "f_scale": 0.1}
    fun, jac = long_decay(xp, 30_000, blocks)
    result = least_squares(fun, xp.array(X0), jac, backend="cupynumeric", **options)
    whole, exact = long_decay(np, 30_000)
    expected = least_squares(whole, X0, exact, **options)
    np.testing.assert_allclose(np.asarray(result.x), expected.x, rtol=1e-8)


@pytest.mark.parametrize("bands", [False, True])
@pytest.mark.parametrize("width", [8, 40])
def test_networks_take_the_steps_of_one_process_on_the_gpu(
    xp: Any, monkeypatch: pytest.MonkeyPatch, width: int, bands: bool
) -> None:
    from lmsolve.torch import fit
    from tests.test_torch_legate import assert_same, cloud, net

    if bands:  # with few parameters, too
        monkeypatch.setattr(_cholesky, "pays", lambda n: True)
    data = tuple(a.cuda() for a in cloud(41))
    ways = ("torch", "legate")
    assert_same(tuple(fit(net(width, 3, 2).cuda(), data, max_steps=6, linalg=w) for w in ways))


@pytest.mark.multigpu
@pytest.mark.parametrize("n", [2048, 4096])
def test_the_factor_of_several_gpus_is_that_of_lapack(xp: Any, n: int) -> None:
    B = np.random.default_rng(0).standard_normal((n + 8, n))
    A = B.T @ B + np.eye(n)
    factor = LegateCholesky(A)
    assert factor.reproduces(A)
    np.testing.assert_allclose(factor.solve(A @ np.ones(n)), np.ones(n), rtol=1e-6)
