"""`curve_fit` and `leastsq`: SciPy's calls and returns, on our solver."""

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import OptimizeWarning

from lmsolve import CurveFit, LeastSquaresResult, curve_fit, least_squares, leastsq
from tests.tools import Counted, Decay

DECAY = Decay()
T, Y, MODEL, P0 = DECAY.t, DECAY.y, Decay.model, DECAY.x0
SIGMA = np.linspace(0.03, 0.08, 40)
CORRELATED = 0.05**2 * 0.6 ** np.abs(np.subtract.outer(np.arange(40), np.arange(40)))


def jac(t, a, b, c):
    e = np.exp(-b * t)
    return np.stack([e, -a * t * e, np.ones_like(t)], axis=1)


def assert_scipys(**options):
    """The same popt and pcov as SciPy's, which is given an exact Jacobian and no tolerance."""
    popt, pcov = curve_fit(MODEL, T, Y, P0, **options)
    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
    options["jac"] = jac
    if np.ndim(options["sigma"]) == 0 and options["sigma"]:
        options["sigma"] = np.full(40, options["sigma"])  # theirs cannot have a number and a jac
    theirs = scipy.optimize.curve_fit(MODEL, T, Y, P0, **options, **tight)
    np.testing.assert_allclose(popt, theirs[0], rtol=1e-7)
    np.testing.assert_allclose(pcov, theirs[1], rtol=1e-5, atol=1e-9 * np.abs(theirs[1]).max())


@pytest.mark.parametrize("absolute_sigma", [False, True])
@pytest.mark.parametrize("sigma", [None, 0.05, SIGMA, CORRELATED], ids=["no", "0-d", "1-d", "2-d"])
@pytest.mark.parametrize("scheme", [None, jac, "3-point"], ids=["default", "exact", "3-point"])
def test_sigma(scheme, sigma, absolute_sigma):
    assert_scipys(jac=scheme, sigma=sigma, absolute_sigma=absolute_sigma)


@pytest.mark.parametrize("bounds", [(0, 9), ([0, 1, -1], [9, 9, 9]), (-np.inf, np.inf)])
def test_bounds(bounds):
    options = {"p0": [2.0, 1.5, 0.4], "bounds": bounds}
    popt, pcov = curve_fit(MODEL, T, Y, **options)
    theirs = scipy.optimize.curve_fit(MODEL, T, Y, jac=jac, **options, xtol=1e-14, ftol=1e-14)
    np.testing.assert_allclose(popt, theirs[0], rtol=1e-6)
    np.testing.assert_allclose(pcov, theirs[1], rtol=1e-4, atol=1e-8)


def test_p0_is_inferred_from_the_model():
    points = []

    def model(t, a, b, c):
        points.append((a, b, c))
        return MODEL(t, a, b, c)

    curve_fit(model, T, Y)
    assert points[0] == (1.0, 1.0, 1.0)
    points.clear()
    curve_fit(model, T, Y, bounds=([0, -np.inf, -3], [4, 5, np.inf]))
    assert points[0] == (2.0, 4.0, -2.0)
    with pytest.raises(ValueError, match="number of fit parameters"):
        curve_fit(lambda t, *p: MODEL(t, *p), T, Y)
    popt, _ = curve_fit(lambda t, *p: MODEL(t, *p), T, Y, p0=P0)
    assert popt.shape == (3,)


def test_full_output():
    model = Counted(lambda t, *p: MODEL(t, *p))
    popt, pcov, info, message, status = curve_fit(
        lambda t, a, b, c: model(t, a, b, c), T, Y, P0, jac=jac, full_output=True
    )
    assert info["nfev"] == model.calls
    np.testing.assert_array_equal(info["fvec"], MODEL(T, *popt) - Y)
    assert status in (1, 2, 3, 4) and "reached" in message
    R = np.triu(info["fjac"].T[:3])
    J = jac(T, *popt)[:, info["ipvt"]]
    np.testing.assert_allclose(R.T @ R, J.T @ J, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(R.T @ info["qtf"], J.T @ info["fvec"], atol=1e-10)
    assert pcov.shape == (3, 3)


def test_the_tuple_carries_the_result():
    fit = curve_fit(MODEL, T, Y, P0)
    assert isinstance(fit, CurveFit) and len(fit) == 2
    assert isinstance(fit.result, LeastSquaresResult)
    for name in ("a", "b", "c"):
        assert f"  {name} " in str(fit)
    np.testing.assert_allclose(fit.result.covariance(), fit[1])
    intervals = fit.result.confidence_intervals()
    assert np.all((intervals[:, 0] < fit[0]) & (fit[0] < intervals[:, 1]))


def test_absolute_sigma_is_remembered():
    fit = curve_fit(MODEL, T, Y, P0, sigma=SIGMA, absolute_sigma=True)
    np.testing.assert_allclose(fit.result.covariance(), fit[1])


@pytest.mark.parametrize("where", ["ydata", "xdata"])
def test_nan_policy(where):
    t, y = T.copy(), Y.copy()
    (y if where == "ydata" else t)[[3, 17]] = np.nan
    with pytest.raises(ValueError, match="infs or NaNs"):
        curve_fit(MODEL, t, y, P0)
    with pytest.raises(ValueError, match="nan"):
        curve_fit(MODEL, t, y, P0, nan_policy="raise")
    kept = np.delete(np.arange(40), [3, 17])
    for sigma in (None, SIGMA, CORRELATED):
        popt, pcov = curve_fit(MODEL, t, y, P0, sigma=sigma, nan_policy="omit")
        if sigma is not None:
            sigma = sigma[kept] if sigma.ndim == 1 else sigma[np.ix_(kept, kept)]
        expected = curve_fit(MODEL, T[kept], Y[kept], P0, sigma=sigma)
        np.testing.assert_allclose(popt, expected[0], rtol=1e-10)
        np.testing.assert_allclose(pcov, expected[1], rtol=1e-8)


def test_undetermined_parameters_warn():
    with pytest.warns(OptimizeWarning, match="could not be estimated"):
        popt, pcov = curve_fit(lambda t, a, b: a * b * t, T, 6 * T, [1.0, 1.0])
    assert popt[0] * popt[1] == pytest.approx(6)
    assert np.isinf(pcov).all()


def test_as_many_parameters_as_data_warn():
    with pytest.warns(OptimizeWarning):
        popt, pcov = curve_fit(lambda t, a, b: a * t + b, [0.0, 1.0], [1.0, 3.0])
    np.testing.assert_allclose(popt, [2, 1])
    assert np.isinf(pcov).all()


def test_a_fit_that_fails_raises():
    with pytest.raises(RuntimeError, match="Optimal parameters not found: `max_nfev`"):
        curve_fit(MODEL, T, Y, P0, maxfev=2)


def test_data_of_several_dimensions():
    u, v = np.meshgrid(np.linspace(0, 1, 6), np.linspace(0, 1, 7))
    data = np.stack([u.ravel(), v.ravel()])

    def plane(uv, a, b, c):
        return a * uv[0] + b * uv[1] + c

    popt, _ = curve_fit(plane, data, plane(data, 1.0, 2.0, 3.0) + 0.01 * np.cos(np.arange(42)))
    np.testing.assert_allclose(popt, [1, 2, 3], atol=0.02)


@pytest.mark.parametrize("kind", [list, tuple, np.float32], ids=["list", "tuple", "float32"])
def test_kinds_of_data(kind):
    t, y = (T.astype(kind), Y.astype(kind)) if kind is np.float32 else (kind(T), kind(Y))
    popt, _ = curve_fit(MODEL, t, y, P0)
    np.testing.assert_allclose(popt, curve_fit(MODEL, T, Y, P0)[0], rtol=1e-5)


@pytest.mark.parametrize("method", ["trf", "dogbox"])
def test_other_methods_are_scipys(method):
    ours = curve_fit(MODEL, T, Y, P0, method=method)
    theirs = scipy.optimize.curve_fit(MODEL, T, Y, P0, method=method)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])


def test_options_of_least_squares():
    outliers = np.where(np.arange(40) % 9 == 4, 1.5, 0.0)
    plain, _ = curve_fit(MODEL, T, Y + outliers, P0)
    robust, _ = curve_fit(MODEL, T, Y + outliers, P0, loss="cauchy", f_scale=0.05)
    clean, _ = curve_fit(MODEL, T, Y, P0)
    assert np.linalg.norm(robust - clean) < 0.2 * np.linalg.norm(plain - clean)
    held, _ = curve_fit(MODEL, T, Y, P0, fixed=[False, False, True])
    assert held[2] == P0[2]


# leastsq.


@pytest.mark.parametrize("derivative", [None, "rows", "columns"])
def test_leastsq(derivative):
    options = {}
    if derivative:
        options["Dfun"] = DECAY.jac if derivative == "rows" else lambda x: DECAY.jac(x).T
        options["col_deriv"] = derivative == "columns"
    x, cov, info, message, status = leastsq(DECAY.fun, P0, full_output=True, **options)
    theirs = scipy.optimize.leastsq(DECAY.fun, P0, full_output=True, ftol=1e-14, xtol=1e-14)
    np.testing.assert_allclose(x, theirs[0], rtol=1e-6)
    np.testing.assert_allclose(cov, theirs[1], rtol=1e-5, atol=1e-8)
    assert set(theirs[2]) | ({"njev"} if derivative else set()) == set(info)
    assert status in (1, 2, 3, 4) and "reached" in message
    short = leastsq(DECAY.fun, P0, **options)
    np.testing.assert_array_equal(short[0], x)
    assert short[1] == status


def test_leastsq_arguments_and_limit():
    def fun(x, t, y):
        return MODEL(t, *x) - y

    x, status = leastsq(fun, P0, args=(T, Y))
    np.testing.assert_allclose(x, leastsq(DECAY.fun, P0)[0])
    assert status in (1, 2, 3, 4)
    with pytest.warns(RuntimeWarning, match="max_nfev` reached: 3 evaluations"):
        assert leastsq(fun, P0, args=(T, Y), maxfev=3)[1] == 5


@pytest.mark.parametrize("start", [np.float32(P0), np.reshape(P0, (1, 3)), np.reshape(P0, (3, 1))])
def test_starts_are_flattened_and_in_double_precision(start):
    for x in (leastsq(DECAY.fun, start)[0], curve_fit(MODEL, T, Y, start)[0]):
        assert type(x) is np.ndarray and x.dtype == np.float64
        np.testing.assert_allclose(x, leastsq(DECAY.fun, P0)[0], rtol=1e-8)


def test_leastsq_of_a_singular_problem_has_no_covariance():
    x, cov, *_ = leastsq(lambda x: np.array([x[0] + x[1] - 1, 0, 0]), [3.0, 1.0], full_output=True)
    assert cov is None and x.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pandas(dtype):
    pd = pytest.importorskip("pandas")
    t, y = pd.Series(T).astype(dtype), pd.Series(Y).astype(dtype)
    popt, pcov = curve_fit(lambda t, a, b: a * t + b, t, y, [0.1, 0.1])
    expected, covariance = np.polyfit(T, Y, 1, cov=True)
    np.testing.assert_allclose(popt, expected, rtol=1e-5)
    np.testing.assert_allclose(pcov, covariance, rtol=1e-5)


class TestResultOnDemand:
    """`curve_fit` makes its result when it is asked for."""

    t = np.linspace(0, 4, 100)
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.02 * np.cos(7.0 * np.arange(100.0))

    @staticmethod
    def model(t, a, k, c):
        return a * np.exp(-k * t) + c

    @staticmethod
    def jac(t, a, k, c):
        e = np.exp(-k * t)
        return np.stack([e, -a * t * e, np.ones_like(t)], axis=1)

    @pytest.mark.parametrize("jac", [None, jac])
    def test_is_that_of_least_squares(self, jac):
        fit = curve_fit(self.model, self.t, self.y, [1.0, 1.0, 1.0], jac=jac)
        same = least_squares(
            lambda p: self.model(self.t, *p) - self.y,
            [1.0, 1.0, 1.0],
            "2-point" if jac is None else lambda p: jac(self.t, *p),
        )
        result = fit.result
        assert result is fit.result
        np.testing.assert_array_equal(result.x, fit[0])
        assert (result.nfev, result.status) == (same.nfev, same.status)
        assert len(result.history) == len(same.history)
        np.testing.assert_allclose(result.x, same.x, rtol=1e-8)
        np.testing.assert_allclose(result.jac, same.jac, rtol=1e-6)
        np.testing.assert_allclose(result.standard_errors(), same.standard_errors(), rtol=1e-7)
        exact = self.jac(self.t, *fit[0])
        np.testing.assert_allclose(result.jac, exact, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("jac", [None, jac])
    def test_covariance_is_that_of_the_solution(self, jac):
        fit = curve_fit(self.model, self.t, self.y, [1.0, 1.0, 1.0], jac=jac)
        rtol = 1e-5 if jac is None else 1e-12
        np.testing.assert_allclose(fit[1], fit.result.covariance(), rtol=rtol)
        absolute = curve_fit(
            self.model, self.t, self.y, [1.0, 1.0, 1.0], jac=jac, absolute_sigma=True
        )
        expected = absolute.result.covariance()
        np.testing.assert_allclose(absolute[1], expected, rtol=rtol)
        assert absolute.result.uncertainty().variance == 1.0

    def test_no_more_calls_than_it_needs(self):
        calls = []

        def model(t, *p):
            calls.append(p)
            return self.model(t, *p)

        fit = curve_fit(model, self.t, self.y, [1.0, 1.0, 1.0])
        before = len(calls)
        assert before == fit.result.nfev + 3 * (fit.result.njev - 1)
        assert len(calls) == before + 3  # the Jacobian at the solution

    def test_more_parameters_than_are_fitted_in_floats(self):
        t = np.linspace(0, 10, 400)

        def model(t, *p):
            y = np.full(t.size, p[6])
            for a, c, s in (p[0:3], p[3:6]):
                y += a * np.exp(-0.5 * ((t - c) / s) ** 2)
            return y

        calls = []

        def counted(t, *p):
            calls.append(p)
            return model(t, *p)

        y = model(t, 3, 3, 0.5, 2, 6, 0.7, 0.2) + 0.02 * np.cos(7.0 * np.arange(400.0))
        p0 = [2.5, 3.2, 0.6, 1.5, 6.3, 0.6, 0]
        fit = curve_fit(counted, t, y, p0)
        before = len(calls)
        assert before == fit.result.nfev + 7 * (fit.result.njev - 1)
        assert len(calls) == before + 7  # the Jacobian at the solution
        same = least_squares(lambda p: model(t, *p) - y, p0, "3-point")
        np.testing.assert_allclose(fit[0], same.x, rtol=1e-7)
        np.testing.assert_allclose(fit[1], same.covariance(), rtol=1e-5, atol=1e-12)

    @pytest.mark.parametrize("p0", [[1.0, 1.0, 1.0], [2.5, 1.3, 0.5]])
    @pytest.mark.parametrize("options", [{}, {"xtol": 1e-9}])
    def test_the_caller_may_write_into_popt(self, options, p0):
        expected = curve_fit(self.model, self.t, self.y, p0, **options).result
        fit = curve_fit(self.model, self.t, self.y, p0, **options)
        fit[0][1] *= 1e3
        np.testing.assert_array_equal(fit.result.x, expected.x)
        np.testing.assert_array_equal(fit.result.jac, expected.jac)
        fit.result.x[1] *= 1e3
        np.testing.assert_array_equal(fit.result.state.x, expected.x)

    @pytest.mark.parametrize("peaks", [0, 2])
    @pytest.mark.parametrize("changed", ["xdata", "ydata", "the function"])
    def test_is_of_the_data_and_the_function_as_they_were(self, changed, peaks):
        offset = 0.0

        def model(t, *p):
            y = p[0] * np.exp(-p[1] * t) + p[2] + offset
            for a, c, s in zip(p[3::3], p[4::3], p[5::3], strict=True):
                y += a * np.exp(-0.5 * ((t - c) / s) ** 2)
            return y

        t = np.linspace(0, 10, 400)
        true = np.array([2.5, 1.3, 0.5, 3, 3, 0.5, 2, 6, 0.7][: 3 + 3 * peaks])
        y = model(t, *true) + 0.02 * np.cos(7.0 * np.arange(400.0))
        expected = curve_fit(model, t, y, 1.1 * true).result
        expected.standard_errors()
        fit = curve_fit(model, t, y, 1.1 * true)
        if changed == "the function":
            offset = 1.0
        else:
            np.negative(t if changed == "xdata" else y, out=t if changed == "xdata" else y)
        scale = np.abs(expected.jac).max()
        np.testing.assert_allclose(fit.result.jac, expected.jac, atol=1e-5 * scale)
        np.testing.assert_allclose(
            fit.result.standard_errors(), expected.standard_errors(), rtol=1e-5
        )

    def test_a_run_goes_on_from_it(self):
        fit = curve_fit(self.model, self.t, self.y, [1.0, 1.0, 1.0])
        again = least_squares(
            lambda p: self.model(self.t, *p) - self.y, fit[0], resume=fit.result.state
        )
        np.testing.assert_allclose(again.x, fit[0], rtol=1e-7)
        assert again.cost <= fit.result.cost


@pytest.mark.parametrize("kind", ["one buffer", "integers first", "a list", "single precision"])
def test_models_that_return_odd_arrays(kind):
    """Differences of the model itself are for plain arrays; the others take the general way."""
    t = np.linspace(0, 4, 50)
    y = 2.0 * np.exp(-1.5 * t)
    buffer = np.empty_like(t)

    def model(t, a, k):
        value = a * np.exp(-k * t)
        if kind == "one buffer":
            buffer[:] = value
            return buffer
        if kind == "integers first":
            return np.ones(t.shape, dtype=int) if a == 1.0 and k == 1.0 else value
        return list(value) if kind == "a list" else value.astype(np.float32)

    popt, _ = curve_fit(model, t, y, [1.0, 1.0])
    expected = 1e-3 if kind == "single precision" else 1e-9
    np.testing.assert_allclose(popt, [2.0, 1.5], rtol=expected)


def test_a_model_whose_length_changes_is_told():
    t, y = np.linspace(0, 4, 50), np.ones(50)
    calls = []

    def model(t, a, k):
        calls.append(a)
        return (a * np.exp(-k * t))[: 50 if len(calls) < 3 else 49]

    with pytest.raises(ValueError, match=r"`ydata`, \(50,\), got \(49,\)"):
        curve_fit(model, t, y, [1.0, 1.0])
