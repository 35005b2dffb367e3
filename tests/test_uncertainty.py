"""Covariance, null directions and profile intervals, against formulas and brute force."""

import numpy as np
import pytest
import scipy.optimize
from scipy.sparse import coo_array, csc_array, csr_array, csr_matrix
from scipy.special import stdtrit

from lmsolve import curve_fit, least_squares
from lmsolve._loss import LOSSES
from tests.nist import load
from tests.tools import Decay

RNG = np.random.default_rng(8)
X = RNG.standard_normal((30, 4)) * [1.0, 1e-6, 1e6, 3.0]
Y = X @ [1.0, 2e6, -1e-6, 0.5] + RNG.standard_normal(30)
DECAY = Decay()


def linear(**options):
    """Fit of the linear model X b ~ Y, columns of very different sizes."""
    return least_squares(lambda b: X @ b - Y, np.zeros(4), lambda b: X, **options)


def inverse():
    """(X'X)^-1 by a QR factorisation of the scaled columns."""
    d = 1 / np.linalg.norm(X, axis=0)
    R_inverse = np.linalg.inv(np.linalg.qr(X * d)[1])
    return R_inverse @ R_inverse.T * np.outer(d, d)


def test_covariance_of_a_linear_model():
    result = linear()
    u = result.uncertainty()
    variance = 2 * result.cost / 26
    np.testing.assert_allclose(u.covariance, variance * inverse(), rtol=1e-10)
    np.testing.assert_allclose(u.stderr, np.sqrt(variance * inverse().diagonal()), rtol=1e-10)
    assert (u.rank, u.dof, u.null_space.shape) == (4, 26, (4, 0))
    assert u.variance == pytest.approx(variance)
    np.testing.assert_allclose(np.diag(u.correlation), 1)
    np.testing.assert_array_equal(result.covariance(), u.covariance)
    np.testing.assert_array_equal(result.standard_errors(), u.stderr)


def test_absolute_sigma():
    np.testing.assert_allclose(linear().covariance(absolute_sigma=True), inverse(), rtol=1e-10)


@pytest.mark.parametrize("form", ["sparse", "streamed", "operator"])
def test_every_form_of_the_jacobian(form):
    from scipy.sparse.linalg import aslinearoperator

    def jac(b):
        if form == "streamed":
            return ((X[i : i + 10] @ b - Y[i : i + 10], X[i : i + 10]) for i in (0, 10, 20))
        return csr_array(X) if form == "sparse" else aslinearoperator(X)

    result = least_squares(lambda b: X @ b - Y, [0.1, 1e5, 1e-7, 0.1], jac)
    variance = 2 * result.cost / 26
    np.testing.assert_allclose(result.covariance(), variance * inverse(), rtol=1e-6)


def test_fixed_parameters_have_no_variance():
    result = linear(fixed=[False, True, False, False])
    u = result.uncertainty()
    free = [0, 2, 3]
    J = X[:, free] * [1, 1e-6, 1]
    scale = np.outer([1, 1e-6, 1], [1, 1e-6, 1])
    expected = np.linalg.inv(J.T @ J) * scale * 2 * result.cost / 27
    np.testing.assert_allclose(u.covariance[np.ix_(free, free)], expected, rtol=1e-9)
    assert not u.covariance[1].any() and not u.covariance[:, 1].any()
    assert u.held.tolist() == [False, True, False, False] and u.dof == 27


def test_a_parameter_at_its_bound_is_not_estimated():
    free = linear()
    bound = float(free.x[3]) - 0.1
    result = linear(bounds=([-np.inf] * 4, [np.inf, np.inf, np.inf, bound]))
    assert result.active_mask.tolist() == [0, 0, 0, 1]
    u = result.uncertainty()
    assert u.held.tolist() == [False, False, False, True] and u.stderr[3] == 0
    assert "at upper bound" in result.summary()
    held = least_squares(
        lambda b: X @ b - Y, [0, 0, 0, bound], lambda b: X, fixed=[False, False, False, True]
    )
    np.testing.assert_allclose(u.covariance, held.covariance(), rtol=1e-7)


def test_null_directions():
    t = np.linspace(0, 1, 20)

    def model(t, a, b, c):
        return a * b * t + c

    y = model(t, 2.0, 3.0, 1.0) + 0.01 * np.cos(40 * t)
    result = least_squares(lambda p: model(t, *p) - y, [1.0, 1.0, 0.0])
    u = result.uncertainty()
    a, b, _ = result.x
    assert result.success and u.rank == 2 and u.dof == 18
    direction = np.array([a, -b, 0]) / np.hypot(a, b)
    assert abs(u.null_space[:, 0] @ direction) == pytest.approx(1, abs=1e-6)
    assert np.isinf(u.stderr[:2]).all()
    line = np.polyfit(t, y, 1, cov="unscaled")[1]
    assert u.stderr[2] == pytest.approx(np.sqrt(line[1, 1] * u.variance), rel=1e-6)
    assert "1 direction(s) undetermined" in result.summary()
    assert np.isfinite(u.correlation).all()


def test_more_parameters_than_residuals():
    result = least_squares(lambda x: np.array([x[0] + x[1] - 1]), [0.0, 3.0])
    u = result.uncertainty()
    assert (u.rank, u.dof, u.null_space.shape) == (1, 0, (2, 1))
    np.testing.assert_allclose(np.abs(u.null_space[:, 0]), np.sqrt(0.5), rtol=1e-6)
    assert np.isinf(u.stderr).all()


@pytest.mark.parametrize("form", [np.asarray, csr_matrix, csc_array, coo_array])
@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy"])
def test_sandwich(loss, form):
    C = 0.1
    rng = np.random.default_rng(3)
    outliers = np.where(rng.uniform(size=40) < 0.1, 2.0, 0.0)

    def fun(x):
        return DECAY.fun(x) + outliers

    result = least_squares(fun, DECAY.x0, lambda x: form(DECAY.jac(x)), loss=loss, f_scale=C)
    J, r = DECAY.jac(result.x), fun(result.x)
    z = (r / C) ** 2
    _, rho1, rho2 = LOSSES[loss](np, z)
    curvature = np.maximum(rho1 + 2 * z * rho2, 2.0**-52)
    H = np.linalg.inv(J.T @ (J * curvature[:, None]))
    psi = rho1 * r
    expected = H @ (J.T @ (J * psi[:, None] ** 2)) @ H * 40 / 37
    np.testing.assert_allclose(result.covariance(), expected, rtol=1e-8)
    plain = result.uncertainty(sandwich=False)
    np.testing.assert_allclose(plain.covariance, H * 2 * result.cost / 37, rtol=1e-8)


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
@pytest.mark.parametrize("complex_x", [True, False])
def test_complex_fits_have_the_covariance_of_their_real_parts(complex_x, loss):
    t = np.linspace(0, 2, 25)
    noise = 0.01 * np.random.default_rng(8).standard_normal((2, 25))
    y = (2 - 1j) * np.exp(-(0.5 + 3j) * t) + noise[0] + 1j * noise[1]

    def fun(z):
        a, b = (z[0], z[1]) if complex_x else (z[0] + 1j * z[1], 0.5 + 1j * z[2])
        return a * np.exp(-b * t) - y

    def real(x):
        r = fun(x[:2] + 1j * x[2:] if complex_x else x)
        return np.concatenate([r.real, r.imag])

    x0 = np.array([1.9, 0.4, -0.9, 2.9]) if complex_x else np.array([1.9, -0.9, 2.9])
    options = {"loss": loss, "f_scale": 0.02}
    result = least_squares(fun, x0[:2] + 1j * x0[2:] if complex_x else x0, "3-point", **options)
    expected = least_squares(real, x0, "3-point", **options)
    scale = np.sqrt(np.outer(*2 * [np.diagonal(expected.covariance())]))
    np.testing.assert_allclose(
        result.covariance() / scale, expected.covariance() / scale, atol=1e-6
    )
    np.testing.assert_allclose(
        result.confidence_intervals(), expected.confidence_intervals(), rtol=1e-5
    )


def test_the_sandwich_matches_the_scatter_of_repeated_fits():
    rng = np.random.default_rng(5)
    t = np.linspace(0, 1, 60)
    estimates, claimed = [], []
    for _ in range(150):
        noise = np.where(rng.uniform(size=60) < 0.1, 10.0, 1.0) * rng.standard_normal(60)
        y = 1 + 2 * t + 0.1 * noise
        result = least_squares(
            lambda b, y=y: b[0] + b[1] * t - y, [0.0, 0.0], loss="huber", f_scale=0.15
        )
        estimates.append(result.x)
        claimed.append(result.standard_errors())
    scatter = np.std(estimates, axis=0, ddof=1)  # known to 6 % from 150 fits
    np.testing.assert_allclose(np.mean(claimed, axis=0), scatter, rtol=0.2)


# Profile intervals.


def rise(p, result, j, value):
    """Root of the rise of the profiled cost, in standard deviations, by SciPy alone."""
    others = [i for i in range(p.n) if i != j]
    x = result.x.copy()
    x[j] = value

    def fun(free):
        x[others] = free
        return p.fun(x)

    def jac(free):
        x[others] = free
        return p.jac(x)[:, others]

    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "x_scale": "jac", "max_nfev": 5000}
    start = result.x[others] + result.covariance()[others, j] / result.covariance()[j, j] * (
        value - result.x[j]
    )
    profiled = scipy.optimize.least_squares(fun, start, jac, **tight).cost
    return np.sqrt(2 * (profiled - result.cost) / result.uncertainty().variance)


@pytest.mark.parametrize("level", [0.683, 0.95])
@pytest.mark.parametrize("name", ["Misra1a", "DanWood", "Rat42", "Eckerle4", "BoxBOD", "Chwirut2"])
def test_profile_intervals_end_where_the_cost_has_risen_by_the_quantile(name, level):
    p = load(name)
    result = least_squares(p.fun, p.starts[1], p.jac)
    quantile = stdtrit(p.m - p.n, 0.5 + 0.5 * level)
    intervals = result.confidence_intervals(level)
    for j, (low, high) in enumerate(intervals):
        assert low < result.x[j] < high
        for end in (low, high):
            if np.isfinite(end):
                assert rise(p, result, j, end) == pytest.approx(quantile, rel=1e-4), (j, end)
            else:  # never reached: far out the cost is still lower
                far = result.x[j] + np.sign(end) * 1e3 * result.standard_errors()[j]
                assert rise(p, result, j, far) < quantile


def test_intervals_of_a_linear_model_are_symmetric_and_exact():
    result = linear()
    half = stdtrit(26, 0.975) * result.standard_errors()
    expected = np.stack([result.x - half, result.x + half], axis=1)
    for method in ("profile", "linear"):
        intervals = result.confidence_intervals(method=method)
        np.testing.assert_allclose(intervals, expected, rtol=1e-5)


def test_an_interval_is_cut_at_a_bound():
    x0, t = [1.0, 1.0], np.linspace(0, 1, 10)
    y = 0.2 + 2 * t + 0.3 * np.cos(9 * t)
    fit = least_squares(lambda b: b[0] + b[1] * t - y, x0, bounds=([0.0, -9], [9, 9]))
    low, high = fit.confidence_intervals()[0]
    free = least_squares(lambda b: b[0] + b[1] * t - y, x0).confidence_intervals()[0]
    assert low == 0.0 > free[0]
    assert high == pytest.approx(free[1], rel=1e-4)


def test_intervals_of_held_and_undetermined_parameters():
    t = np.linspace(0, 1, 20)
    y = 6 * t + 0.01 * np.cos(40 * t)
    result = least_squares(
        lambda p: p[0] * p[1] * t + p[2] - y, [1.0, 1.0, 0.0], fixed=[False, False, True]
    )
    intervals = result.confidence_intervals()
    np.testing.assert_array_equal(intervals[2], 0.0)
    assert np.isinf(intervals[:2]).all()


@pytest.mark.parametrize("options", [{}, {"bounds": (0, 9)}, {"loss": "huber"}])
@pytest.mark.parametrize("fixed", [None, [False, True]])
def test_intervals_of_one_free_parameter(fixed, options):
    """No other parameter is left to be fitted again: its cost alone is followed."""
    t = np.linspace(0, 1, 20)
    r = 6 * t - (6 * t + 0.01 * np.cos(40 * t))
    start = [1.0] if fixed is None else [1.0, 0.0]
    result = least_squares(lambda p: (p[0] - 6) * t + r, start, fixed=fixed, **options)
    intervals = result.confidence_intervals()[0]
    half = stdtrit(19, 0.975) * result.uncertainty(sandwich=False).stderr[0]
    np.testing.assert_allclose(intervals, result.x[0] + [-half, half], rtol=1e-6)


@pytest.mark.parametrize("m", [1, 2])
def test_no_degrees_of_freedom_leave_a_robust_fit_undetermined(m):
    A = np.array([[1.0, 2.0], [3.0, 1.0]])[:m]
    result = least_squares(lambda x: A @ x - 1.0, [0.0, 0.0], lambda x: A, loss="huber")
    assert np.isinf(result.standard_errors()).all() and result.uncertainty().dof == 0


@pytest.mark.parametrize(("level", "method"), [(0.0, "profile"), (1.0, "linear"), (0.5, "exact")])
def test_wrong_intervals(level, method):
    with pytest.raises(ValueError, match=r"`level`|`method`"):
        linear().confidence_intervals(level, method=method)


# Reports of wrong covariances in other software.


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_parameters_that_are_exactly_zero(a, b, size):
    """Odd noise on an even model: the best b is 0 and a step relative to it says nothing."""
    x = np.linspace(-1, 1, 20)
    A = np.stack([np.ones_like(x), x**2], axis=1)
    y = A @ [a, b] + size * x**3
    popt, pcov = curve_fit(lambda x, a, b: a + b * x**2, x, y)
    np.testing.assert_allclose(popt, [a, b], atol=1e-9)
    expected = np.linalg.inv(A.T @ A) * np.sum((size * x**3) ** 2) / 18
    np.testing.assert_allclose(pcov, expected, rtol=1e-6)


@pytest.mark.parametrize("bounded", [False, True])
def test_parameters_of_very_different_sizes(bounded):
    """A resonance at 6 GHz: parameters from 1 to 1e10, standard errors from 1e-6 to 1e6."""
    f = 6.1234e9 + np.linspace(-4e4, 4e4, 201)
    true = np.array([6.1234e9, 8e5, 2e6, 0.7, -2.6])

    def model(f, f0, internal, external, scale, phase):
        dip = (1 / external) / (1 / internal + 1 / external + 2j * (f - f0) / f0)
        s = scale * np.exp(1j * phase) * (1 - dip)
        return np.concatenate([s.real, s.imag])

    def jac(f, *p):
        h = 1e-6 * np.abs(p) * [1e-6, 1, 1, 1, 1]
        return np.stack(
            [(model(f, *(p + e)) - model(f, *(p - e))) / (2 * e.sum()) for e in np.diag(h)], axis=1
        )

    noise = 1e-3
    y = model(f, *true) + noise * np.random.default_rng(0).standard_normal(402)
    p0 = true * [1 + 2e-7, 1.3, 0.8, 1.1, 0.95]
    limits = {"bounds": (true - 0.5 * np.abs(true), true + 0.5 * np.abs(true))} if bounded else {}
    popt, pcov = curve_fit(
        model, f, y, p0, sigma=np.full(402, noise), absolute_sigma=True, **limits
    )
    J = jac(f, *popt) / noise
    d = 1 / np.linalg.norm(J, axis=0)
    expected = np.linalg.inv((J * d).T @ (J * d)) * np.outer(d, d)
    np.testing.assert_allclose(pcov, expected, rtol=1e-3)
    assert np.all(np.abs(popt - true) < 5 * np.sqrt(np.diag(pcov)))
