"""Trouble is contained: non-finite values, singular systems, single precision, interruptions."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import OptimizeWarning

from lmsolve import curve_fit, least_squares

T = np.linspace(0.0, 3.0, 30)
TRUE = np.array([2.5, 1.3])
NOISE = 0.01 * np.random.default_rng(7).standard_normal(30)
Y = TRUE[0] * np.exp(-TRUE[1] * T) + NOISE


def decay(x):
    """Residuals of an exponential decay."""
    return x[0] * np.exp(-x[1] * T) - Y


def decay_jac(x):
    """Their Jacobian."""
    e = np.exp(-x[1] * T)
    return np.stack([e, -x[0] * T * e], axis=1)


BEST = least_squares(decay, [1.0, 1.0], decay_jac)

# The tiny path, the general one with bounds, a robust loss, and the general one without.
ROUTES = {
    "plain": {},
    "bounded": {"bounds": ([0.0, 0.0], [10.0, 10.0])},
    "robust": {"loss": "soft_l1", "f_scale": 10.0},
    "watched": {"callback": lambda x: None},
    "iterative": {"tr_solver": "lsmr"},
}


@pytest.fixture(params=ROUTES, name="route")
def fixture_route(request):
    """Options that send a fit through one part of the solver."""
    return ROUTES[request.param]


def spoiled(value, when, rows=slice(None)):
    """The decay, with ``value`` in some rows of the calls whose number ``when`` picks."""
    calls = 0

    def fun(x):
        nonlocal calls
        calls += 1
        r = decay(x)
        if when(calls):
            r[rows] = value
        return r

    return fun


class TestNonFiniteTrials:
    """A trial whose cost is not finite is a rejected step, and nothing else."""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
    @pytest.mark.parametrize("rows", [0, slice(None)], ids=["one row", "all rows"])
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    def test_spoiled_trials_are_rejected(self, route, value, rows):
        fun = spoiled(value, lambda calls: calls in (2, 4, 5), rows)
        result = least_squares(fun, [1.0, 1.0], decay_jac, **route)
        assert result.success
        np.testing.assert_allclose(result.x, BEST.x, rtol=2e-4 if "loss" in route else 1e-7)
        assert not any(i.accepted for i in result.history if i.nfev in (2, 4, 5))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_bounded_loss_does_not_hide_them(self, value):
        """arctan is finite at infinity, and no larger than at this start far from the data."""
        A, b = 1e12 * np.array([[1.0, -1e-9], [5.0, 1e-9]]), 1e12 * np.array([-0.1, -0.5])
        calls = 0

        def fun(x):
            nonlocal calls
            calls += 1
            return np.full(2, value) if calls == 2 else A @ x - b

        result = least_squares(
            fun, [0.0, 0.0], lambda x: A, loss="arctan", f_scale=0.1, max_nfev=2
        )  # fmt: skip
        assert np.isfinite(result.fun).all()
        np.testing.assert_array_equal(result.fun, A @ result.x - b)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_every_trial_spoiled_ends_at_the_start(self, route, value):
        fun = spoiled(value, lambda calls: calls > 1)
        result = least_squares(fun, [1.0, 1.0], decay_jac, **route)
        assert result.x.tolist() == [1.0, 1.0]
        assert np.array_equal(result.fun, decay(result.x))
        assert result.nfev < 100
        assert result.nit == 0
        assert not result.success
        assert "No step" in result.message

    @pytest.mark.parametrize("xtol", [1e-8, None])
    def test_nothing_but_the_start_at_zero(self, route, xtol):
        """Where x is 0, xtol has no length to compare a step with."""
        fun = spoiled(np.nan, lambda calls: calls > 1)
        result = least_squares(fun, [0.0, 0.0], decay_jac, xtol=xtol, max_nfev=400, **route)
        assert not result.success
        assert result.x.tolist() == [0.0, 0.0]
        assert result.nfev < 400

    @pytest.mark.parametrize("jac", ["2-point", "3-point", decay_jac], ids=["2", "3", "exact"])
    def test_domain_edge_within_a_step(self, jac):
        """sqrt(x - 1) is NaN below 1, where the first Gauss-Newton step from 4 leads."""

        def fun(x):
            return np.array([np.sqrt(x[0] - 1.0), 1e-3 * x[0], 1.0]) - [0.1, 0.0, 0.0]

        def fun_jac(x):
            return np.array([[0.5 / np.sqrt(x[0] - 1.0)], [1e-3], [0.0]])

        with np.errstate(invalid="ignore"):
            result = least_squares(fun, [4.0], fun_jac if callable(jac) else jac)
        assert result.success
        assert result.x[0] == pytest.approx(1.01, abs=1e-5)

    def test_non_finite_jacobian_after_the_start(self, route):
        """The run ends at the best point, and says that the Jacobian is not finite there."""

        def jac(x):
            return decay_jac(x) if x[0] == 1.0 else np.full((30, 2), np.nan)

        result = least_squares(decay, [1.0, 1.0], jac, **route)
        assert not result.success
        assert "Jacobian is not finite" in result.message
        assert result.cost < 0.5 * np.sum(decay([1.0, 1.0]) ** 2)
        assert np.isfinite(result.x).all()

    def test_non_finite_differences_after_the_start(self):
        """The function breaks down just beside an accepted point."""
        accepted = []

        def fun(x):
            r = decay(x)
            return r * np.nan if accepted and 0 < abs(x[1] - accepted[-1][1]) < 1e-6 else r

        result = least_squares(fun, [1.0, 1.0], callback=lambda x: accepted.append(x))
        assert not result.success
        assert result.cost == 0.5 * np.sum(decay(result.x) ** 2)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_at_the_start(self, route, value):
        fun = spoiled(value, lambda calls: True, [3, 17])
        with pytest.raises(ValueError, match=r"2 of 30 are not finite \(indices 3, 17\)"):
            least_squares(fun, [1.0, 1.0], decay_jac, **route)


class TestSingular:
    """Systems that are singular, at the start or on the way."""

    def test_dead_parameter(self, route):
        def jac(x):
            return np.pad(decay_jac(x), ((0, 0), (0, 1)))

        options = dict(route)
        if "bounds" in options:
            options["bounds"] = (0.0, 10.0)
        result = least_squares(decay, [1.0, 1.0, 5.0], jac, **options)
        assert result.success
        np.testing.assert_allclose(result.x[:2], BEST.x, rtol=2e-4 if "loss" in route else 1e-7)
        assert result.x[2] == 5.0

    def test_twin_parameters(self, route):
        def jac(x):
            J = decay_jac([x[0] + x[2], x[1]])
            return J[:, [0, 1, 0]]

        options = dict(route)
        if "bounds" in options:
            options["bounds"] = (0.0, 10.0)
        result = least_squares(
            lambda x: decay([x[0] + x[2], x[1]]), [1.0, 1.0, 0.5], jac, **options
        )
        assert result.success
        rtol = 2e-4 if "loss" in route else 1e-7
        np.testing.assert_allclose(result.x[0] + result.x[2], BEST.x[0], rtol=rtol)

    def test_zero_jacobian_at_the_start(self, route):
        result = least_squares(lambda x: x**2 - 4.0, [0.0, 0.0][:1], lambda x: np.diag(2 * x),
                               **{k: v for k, v in route.items() if k != "bounds"})  # fmt: skip
        assert result.status == 1
        assert result.x.tolist() == [0.0]

    def test_singular_at_the_solution(self):
        """Powell's singular function: the Jacobian loses two ranks at the solution 0."""

        def fun(x):
            return np.array([
                x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2,
                10**0.5 * (x[0] - x[3]) ** 2,
            ])  # fmt: skip

        result = least_squares(fun, [3.0, -1.0, 0.0, 1.0])
        assert result.cost < 1e-20

    @pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
    def test_units_of_the_residuals(self, scale):
        result = least_squares(
            lambda x: scale * decay(x), [1.0, 1.0], lambda x: scale * decay_jac(x)
        )
        assert result.success
        np.testing.assert_allclose(result.x, BEST.x, rtol=1e-7)

    @pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
    @pytest.mark.parametrize("jac", ["2-point", "exact"])
    def test_units_of_a_parameter(self, scale, jac):
        s = np.array([scale, 1.0])
        result = least_squares(
            lambda x: decay(x / s), s * [1.0, 1.0], jac if jac != "exact" else
            (lambda x: decay_jac(x / s) / s),
        )  # fmt: skip
        assert result.success
        np.testing.assert_allclose(result.x / s, BEST.x, rtol=1e-7)


def test_flat_bound_is_no_trap():
    """exp(-(decay t)**2) is flat in decay at its bound 0, where a rash first step leads."""
    t = np.linspace(0.0, 250.0, 1500)
    noise = np.random.RandomState(0).normal(scale=2.8, size=t.size)
    true = np.array([14.0, 5.4321, 0.12345, 0.01])

    def wave(x):
        return x[0] * np.sin(x[2] + t / x[1]) * np.exp(-((x[3] * t) ** 2))

    bounds = ([0.0, -np.inf, -np.pi / 2, 0.0], [20.0, 10.0, np.pi / 2, 0.1])
    data = wave(true) + noise
    start = [13.0, 2.0, 0.0, 0.02]
    result = least_squares(lambda x: wave(x) - data, start, bounds=bounds, x_scale=1.0)
    np.testing.assert_allclose(result.x, true, rtol=0.05)
    assert result.cost < 1.01 * 0.5 * np.sum(noise**2)


class Interrupted(Exception):
    """Raised by a user's function in these tests."""


class TestExceptions:
    """Exceptions of user code pass through untouched, and a run can go on from a kept state."""

    @pytest.mark.parametrize(
        "error", [Interrupted("mine"), KeyboardInterrupt(), ZeroDivisionError("0"),
                  np.linalg.LinAlgError("mine"), FloatingPointError("f"), StopIteration("mine")],
        ids=lambda e: type(e).__name__,
    )  # fmt: skip
    @pytest.mark.parametrize(
        "where", ["at x0", "in a trial", "in a difference", "in jac", "callback"]
    )
    def test_pass_through(self, route, error, where):
        calls = 0

        def raising(at, inner):
            def function(x):
                nonlocal calls
                calls += 1
                if calls == at:
                    raise error
                return inner(x)

            return function

        options = {"fun": decay, "jac": decay_jac, **route}
        if where == "in jac":
            options["jac"] = raising(2, decay_jac)
        elif where == "callback":
            if isinstance(error, StopIteration):
                pytest.skip("StopIteration of a callback ends the run, as in SciPy")
            options["callback"] = raising(2, lambda x: None)
        elif where == "in a difference":
            options |= {"fun": raising(3, decay), "jac": "2-point"}
        else:
            options["fun"] = raising(1 if where == "at x0" else 3, decay)
        with pytest.raises(type(error)) as raised:
            least_squares(x0=[1.0, 1.0], **options)
        assert raised.value is error

    @pytest.mark.parametrize("at", [2, 3, 5, 7])
    def test_interrupted_run_goes_on(self, at):
        """The state that a callback keeps is enough to finish, bit for bit."""
        states, points = [], []

        def keep(intermediate_result):
            states.append(intermediate_result.state)

        whole = least_squares(decay, [0.2, 0.1], decay_jac, callback=keep)
        assert len(states) >= 4
        states.clear()

        def fun(x):
            points.append(x)
            if len(points) == at:
                raise KeyboardInterrupt
            return decay(x)

        with pytest.raises(KeyboardInterrupt):
            least_squares(fun, [0.2, 0.1], decay_jac, callback=keep)
        resume = states[-1] if states else None
        rest = least_squares(decay, [0.2, 0.1], decay_jac, callback=keep, resume=resume)
        assert rest.x.tolist() == whole.x.tolist()
        assert rest.cost == whole.cost
        assert (rest.nfev, rest.njev, rest.nit) == (whole.nfev, whole.njev, whole.nit)
        assert rest.message == whole.message

    def test_user_code_may_keep_and_change_its_argument(self):
        kept = []

        def fun(x):
            r = decay(x)
            kept.append(x)
            x[:] = -1.0
            return r

        result = least_squares(fun, [1.0, 1.0])
        np.testing.assert_allclose(result.x, BEST.x, rtol=1e-7)
        assert all((x == -1.0).all() for x in kept)

    def test_user_code_may_reuse_its_result(self):
        out, rows = np.empty(30), np.empty((30, 2))

        def fun(x):
            out[:] = decay(x)
            return out

        def jac(x):
            rows[:] = decay_jac(x)
            return rows

        result = least_squares(fun, [1.0, 1.0], jac)
        np.testing.assert_allclose(result.x, BEST.x, rtol=1e-7)
        np.testing.assert_array_equal(result.fun, decay(result.x))
        np.testing.assert_allclose(result.jac, decay_jac(result.x))

    def test_start_is_not_written_to(self):
        x0 = np.array([1.0, 1.0])
        result = least_squares(decay, x0)
        assert x0.tolist() == [1.0, 1.0]
        result.x[:] = 0.0
        assert x0.tolist() == [1.0, 1.0]


class TestSinglePrecision:
    """float32 goes in and comes out, and a fit converges or says why not."""

    @pytest.mark.parametrize("jac", ["2-point", "3-point", "exact"])
    @pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, 10.0)], ids=["free", "bounded"])
    def test_converges(self, jac, bounds):
        t, y = T.astype(np.float32), Y.astype(np.float32)

        def fun(x):
            return x[0] * np.exp(-x[1] * t) - y

        def fun_jac(x):
            e = np.exp(-x[1] * t)
            return np.stack([e, -x[0] * t * e], axis=1)

        x0 = np.ones(2, dtype=np.float32)
        result = least_squares(fun, x0, fun_jac if jac == "exact" else jac, bounds=bounds)
        assert result.x.dtype == result.fun.dtype == result.jac.dtype == np.float32
        assert result.success
        np.testing.assert_allclose(result.x, BEST.x, rtol=1e-4)

    def test_line_through_noise(self):
        """SciPy issue 12991: the first differences were all zero, and it stopped at the start."""
        rng = np.random.default_rng(0)
        x = np.linspace(0, 1, 100, dtype=np.float32)
        y = rng.random(100, dtype=np.float32)
        coefficients = np.polyfit(x.astype(float), y.astype(float), 1)[::-1]
        for x0 in ([-1.0, -1.0], np.array([-1.0, -1.0], dtype=np.float32)):
            result = least_squares(lambda p: (p[0] + p[1] * x) - y, x0)
            assert result.success
            np.testing.assert_allclose(result.x, coefficients, atol=1e-4)

            def single(p):
                return (p[0] + p[1] * x - y).astype(np.float32)

            result = least_squares(single, x0)
            assert result.success
            np.testing.assert_allclose(result.x, coefficients, atol=1e-4)

    @pytest.mark.parametrize("x_type", [np.float32, np.float64, np.int32])
    @pytest.mark.parametrize("y_type", [np.float32, np.float64])
    def test_gaussian_of_mixed_types(self, x_type, y_type):
        """SciPy issue 9581: types that differ left the parameters where they started."""

        def gauss(x, area, mu, sigma):
            z = (x - mu) / sigma
            return area / (sigma * np.sqrt(2 * np.pi)) * np.exp(-0.5 * z**2)

        x = np.linspace(-10, 10, 21).astype(x_type)
        noise = np.random.default_rng(3).normal(scale=0.005, size=x.size)
        y = (gauss(x.astype(float), 1.4, 2.0, 2.0) + noise).astype(y_type)
        popt, pcov = curve_fit(gauss, x, y, p0=[1.0, 0.0, 1.0])
        reference, _ = curve_fit(gauss, x.astype(float), y.astype(float), p0=[1.4, 2.0, 2.0])
        np.testing.assert_allclose(popt, reference, rtol=1e-6)
        assert np.isfinite(pcov).all()

    def test_hyperbola_of_single_precision_data(self):
        """SciPy issue 7117: quietly wrong where both inputs were float32."""

        def hyperbola(x, s_1, s_2, o_x, o_y, c):
            slope, bend = (s_2 - s_1) / 2, (s_1 + s_2) / 2
            return o_y + slope * (x - o_x) + bend * np.sqrt((x - o_x) ** 2 + c**2 / 4)

        x = np.array([-32, -16, -8, 4, 4, 8, 16, 32], dtype=np.float32)
        y = hyperbola(x, -2, 0.4, -1, -5, 9.5).astype(np.float32)
        popt, _ = curve_fit(hyperbola, x, y, p0=[-0.8, 1.3, 1.0, -4.0, 0.5])
        popt[-1] = abs(popt[-1])
        np.testing.assert_allclose(popt, [-2, 0.4, -1, -5, 9.5], rtol=1e-4)

    @pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
    def test_pandas_series(self, dtype):
        """SciPy issue 16162: a float32 Series went past the conversion to float64."""

        def line(x, a, b):
            return a * x + b

        x, y = pd.Series([0, 1]).astype(dtype), np.array([0, 0])
        with pytest.warns(OptimizeWarning, match="Covariance"):
            popt, pcov = curve_fit(line, x, y, p0=[0.1, 0.1])
        np.testing.assert_allclose(popt, [0.0, 0.0], atol=1e-7)
        assert np.isinf(pcov).all()

    def test_says_why_it_stopped_short(self):
        """An ill-conditioned float32 fit ends, with a finite result no worse than the start."""
        t = np.linspace(0, 1, 40, dtype=np.float32)
        powers = np.stack([t**k for k in range(12)], axis=1)
        y = np.exp(t).astype(np.float32)
        x0 = np.ones(12, dtype=np.float32)
        result = least_squares(lambda x: powers @ x - y, x0, lambda x: powers)
        assert np.isfinite(result.x).all()
        assert result.cost < 1e-9 * 0.5 * np.sum((powers @ x0 - y) ** 2)
        assert result.message
