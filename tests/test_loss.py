"""Robust losses: their values, their derivatives, and the least squares they become."""

import math

import numpy as np
import pytest
import scipy.optimize

from lmsolve import _loss
from lmsolve._loss import LOSSES, Loss, UserLoss

ROBUST = [name for name, rho in LOSSES.items() if rho is not None]


@pytest.mark.parametrize(
    ("name", "z", "expected"),
    [
        ("huber", 0.25, (0.25, 1.0, 0.0)),
        ("huber", 4.0, (3.0, 0.5, -0.0625)),
        ("soft_l1", 3.0, (2.0, 0.5, -0.0625)),
        ("cauchy", 1.0, (math.log(2), 0.5, -0.25)),
        ("arctan", 1.0, (math.pi / 4, 0.5, -0.5)),
        ("soft_l1", 1e-20, (1e-20, 1.0, -0.5)),  # no cancellation
        ("cauchy", 1e-20, (1e-20, 1.0, -1.0)),
    ],
)
def test_values(xp, name, z, expected):
    values = LOSSES[name](xp.namespace, xp.array([z]))
    np.testing.assert_allclose([xp.host(v)[0] for v in values], expected, rtol=8 * xp.eps)


@pytest.mark.parametrize("name", ROBUST)
def test_derivatives_are_those_of_rho(name):
    z, h = np.array([0.01, 0.3, 0.9, 1.7, 5.0, 300.0]), 1e-5
    rho, rho1, rho2 = LOSSES[name](np, z)
    up, up1, _ = LOSSES[name](np, z + h * z)
    down, down1, _ = LOSSES[name](np, z - h * z)
    np.testing.assert_allclose((up - down) / (2 * h * z), rho1, rtol=1e-6)
    np.testing.assert_allclose((up1 - down1) / (2 * h * z), rho2, rtol=1e-6, atol=1e-9)
    assert np.all(rho <= z) and np.all(rho1 <= 1)


@pytest.mark.parametrize("f_scale", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("name", ROBUST)
def test_weights_keep_the_gradient(xp, name, f_scale):
    rng = np.random.default_rng(0)
    J, r = rng.standard_normal((30, 3)), 3 * rng.standard_normal(30)
    loss = Loss(LOSSES[name], f_scale)
    w, r_w = loss.weights(xp.namespace, xp.array(r))
    gradient = (J * xp.host(w)[:, None]).T @ xp.host(r_w)
    h, differences = 1e-6, []
    exact = Loss(LOSSES[name], f_scale)
    for j in range(3):
        up, down = exact.cost(np, r + h * J[:, j]), exact.cost(np, r - h * J[:, j])
        differences.append((up - down) / (2 * h))
    np.testing.assert_allclose(gradient, differences, rtol=1e-5 + 1e3 * xp.eps, atol=1e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_curvature_is_that_of_the_cost_or_clamped(name):
    r, h = np.array([0.2, 0.7, 3.0]), 1e-4
    loss = Loss(LOSSES[name], 1.3)
    w = loss.curvature_weights(np, r)
    for i, value in enumerate(r):
        v = np.array([value])
        second = (loss.cost(np, v + h) - 2 * loss.cost(np, v) + loss.cost(np, v - h)) / h**2
        assert w[i] ** 2 == pytest.approx(max(second, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", ROBUST)
def test_cost_is_scipys(name):
    r = np.linspace(-5, 5, 11)
    theirs = scipy.optimize.least_squares(
        lambda x: r + 0 * x[0], [0.0], loss=name, f_scale=0.7, max_nfev=1
    )
    assert Loss(LOSSES[name], 0.7).cost(np, r) == pytest.approx(theirs.cost, rel=1e-14)


def test_a_users_loss_is_called_with_squares():
    def half(z):
        return np.stack([0.5 * z, 0.5 + 0 * z, 0 * z])

    loss = Loss(UserLoss(half), 2.0)
    assert loss.cost(np, np.array([3.0, 4.0])) == pytest.approx(0.25 * 25)


def test_costs_of_single_precision_are_summed_in_double():
    r = np.full(10**6, 0.1, dtype=np.float32)
    cost = Loss(LOSSES["huber"]).cost(np, r)
    assert cost.dtype == np.float64
    assert cost == pytest.approx(0.5e6 * float(r[0] * r[0]), rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", ROBUST)
def test_many_residuals_go_block_by_block(monkeypatch, name, dtype):
    r = np.random.default_rng(3).standard_normal(1003).astype(dtype)
    loss = Loss(LOSSES[name], 0.5)
    cost, (w, scaled) = loss.cost(np, r), loss.weights(np, r)
    sizes = []
    counted = Loss(lambda xp, z: sizes.append(z.shape[0]) or LOSSES[name](xp, z), 0.5)
    monkeypatch.setattr(_loss, "BLOCK", 100)
    assert counted.cost(np, r) == pytest.approx(cost, rel=1e-12)
    for found, expected in zip(counted.weights(np, r), (w, scaled), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)
    assert sizes == 2 * ([100] * 10 + [3])
    r[567] = np.inf
    with np.errstate(all="ignore"):  # as `LocalSums` has it
        assert not np.isfinite(counted.cost(np, r))


def test_a_loss_of_the_user_sees_all_residuals_at_once(monkeypatch):
    monkeypatch.setattr(_loss, "BLOCK", 10)
    sizes = []

    def user(z):
        sizes.append(z.shape[0])
        return np.stack([z, np.ones_like(z), np.zeros_like(z)])

    loss = Loss(UserLoss(user))
    loss.cost(np, np.ones(35))
    loss.weights(np, np.ones(35))
    assert sizes == [35, 35]
