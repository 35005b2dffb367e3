"""The same problems on every array library: they agree with NumPy to the accuracy of the dtype.

``fun`` and ``jac`` insist on arrays of the library of x0 in its dtype (`Library.hosted`), and what
comes back is checked to be of it too (`Library.host`).
"""

import numpy as np
import pytest

from lmsolve import LMState, curve_fit, least_squares
from tests.nist import NAMES, digits, load
from tests.problems import PROBLEMS
from tests.tools import Decay

DECAY = Decay()
# Their residuals, or what tells their parameters apart, lie below single precision.
BEYOND_SINGLE = {"Lanczos1", "Lanczos2", "Lanczos3", "Bennett5"}


def check(xp, result, expected, loose=1.0):
    """The result is of the library, and agrees with that of NumPy in double precision."""
    assert result.success, result.message
    for value in (result.x, result.grad, result.fun, result.jac):
        assert value is None or xp.owns(value)
    tolerance = loose * (2e-4 if xp.is_single else 1e-8)
    np.testing.assert_allclose(xp.host(result.x), expected.x, rtol=tolerance, atol=tolerance)
    assert result.cost == pytest.approx(expected.cost, rel=1e4 * xp.eps, abs=1e3 * xp.eps**2)
    np.testing.assert_array_equal(result.active_mask, expected.active_mask)


def both(xp, fun, x0, jac=None, **options):
    """The fit on this library and on NumPy."""
    exact = {} if jac is None else {"jac": jac}
    hosted = {} if jac is None else {"jac": xp.hosted(jac)}
    ours = least_squares(xp.hosted(fun), xp.array(x0), **hosted, **options)
    return ours, least_squares(fun, np.array(x0, dtype=float), **exact, **options)


@pytest.mark.parametrize("name", NAMES)
def test_nist(xp, name):
    if xp.is_single and name in BEYOND_SINGLE:
        pytest.skip("needs double precision")
    p = load(name)
    result = least_squares(xp.hosted(p.fun), xp.array(p.starts[1]), xp.hosted(p.jac))
    x = xp.host(result.x).astype(float)
    assert result.success
    if xp.is_single:
        assert np.all(np.abs(x - p.certified) <= 0.01 * p.certified_stderr)
    else:
        assert digits(x, p.certified) >= 9


@pytest.mark.parametrize("name", ["Misra1a", "Chwirut2", "Hahn1", "MGH17", "ENSO", "BoxBOD"])
def test_nist_by_differences(xp, name):
    p = load(name)
    result = least_squares(xp.hosted(p.fun), xp.array(p.starts[1]))
    x = xp.host(result.x).astype(float)
    assert result.success
    if xp.is_single:
        assert np.all(np.abs(x - p.certified) <= 0.01 * p.certified_stderr)
    else:
        assert digits(x, p.certified) >= 6


@pytest.mark.parametrize("name", ["rosenbrock", "broyden_tridiagonal", "broyden_banded", "bard"])
def test_zero_residual_problems(xp, name):
    p = PROBLEMS[name]
    check(xp, *both(xp, p.fun, p.x0, p.jac), loose=10)


@pytest.mark.parametrize("scheme", ["2-point", "3-point"])
def test_differences(xp, scheme):
    ours = least_squares(xp.hosted(DECAY.fun), xp.array(DECAY.x0), scheme)
    check(xp, ours, least_squares(DECAY.fun, DECAY.x0, scheme), loose=5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "box", [([0, 0, -1], [2.0, 9, 9]), ([0, 1.6, -1], [2.0, 9, 9]), ([0, 0, 0], [9, 9, 9])]
)
def test_bounds(xp, box, exact):
    lb, ub = np.array(box, dtype=float)

    def inside(x):
        slack = xp.eps * 10
        assert np.all(x >= lb - slack) and np.all(x <= ub + slack)
        return DECAY.fun(x)

    x0 = np.clip(DECAY.x0, lb, ub)
    options = {"bounds": tuple(map(xp.array, (lb, ub))) if exact else box}
    jac = xp.hosted(DECAY.jac) if exact else "2-point"
    ours = least_squares(xp.hosted(inside), xp.array(x0), jac, **options)
    check(xp, ours, least_squares(DECAY.fun, x0, DECAY.jac, bounds=box), loose=5)


def test_fixed(xp):
    check(xp, *both(xp, DECAY.fun, DECAY.x0, DECAY.jac, fixed=[False, True, False]))


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy", "arctan"])
def test_losses(xp, loss):
    options = {"loss": loss, "f_scale": 0.08}
    x0 = [2.4, 1.2, 0.4]
    check(xp, *both(xp, DECAY.fun, x0, DECAY.jac, **options), loose=10)


def test_a_loss_of_ones_own(xp):
    def half(z):
        on_host = xp.name == "cupynumeric" and isinstance(z, np.ndarray)  # too small to gain
        assert xp.owns(z) or on_host
        ns = np if on_host else xp.namespace
        return ns.stack([0.5 * z, 0.5 * ns.ones_like(z), ns.zeros_like(z)])

    ours = least_squares(xp.hosted(DECAY.fun), xp.array(DECAY.x0), loss=half)
    expected = least_squares(DECAY.fun, DECAY.x0)
    np.testing.assert_allclose(xp.host(ours.x), expected.x, rtol=2e-3 if xp.is_single else 1e-7)
    assert ours.cost == pytest.approx(0.5 * expected.cost, rel=1e4 * xp.eps)


@pytest.mark.parametrize("x_scale", ["jac", 2.0, [1.0, 2.0, 0.5]], ids=str)
def test_scales(xp, x_scale):
    check(xp, *both(xp, DECAY.fun, DECAY.x0, DECAY.jac, x_scale=x_scale))


def wide(x):
    return np.array([x[0] * x[1] - 1, x[1] + x[2] ** 2 - 3])


def wide_jac(x):
    return np.array([[x[1], x[0], 0], [0, 1, 2 * x[2]]])


@pytest.mark.parametrize("jac", [None, wide_jac], ids=["differences", "exact"])
def test_wide(xp, jac):
    check(xp, *both(xp, wide, [1.0, 2, 3], jac), loose=20)


def test_rank_deficient(xp):
    def fun(x):
        return np.array([x[0] + x[1] - 1, 2 * (x[0] + x[1]) - 3, 0 * x[0]])

    def jac(x):
        return np.array([[1.0, 1], [2, 2], [0, 0]])

    ours, expected = both(xp, fun, [3.0, 1.0], jac)
    check(xp, ours, expected, loose=10)
    assert ours.rank == expected.rank == 1


def blocks(xp, x):
    """Row blocks of the decay fit, of the library."""
    r, J = DECAY.fun(x), DECAY.jac(x)
    return [(xp.array(r[i : i + 15]), xp.array(J[i : i + 15])) for i in (0, 15, 30)]


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
@pytest.mark.parametrize("streamed", ["Jacobian", "both"])
def test_row_blocks(xp, streamed, loss):
    def fun(x):
        if streamed == "both":
            return (r for r, _ in blocks(xp, xp.host(x)))
        return xp.array(DECAY.fun(xp.host(x)))

    options = {"loss": loss, "f_scale": 0.1}
    ours = least_squares(fun, xp.array(DECAY.x0), lambda x: iter(blocks(xp, xp.host(x))), **options)
    expected = least_squares(DECAY.fun, DECAY.x0, DECAY.jac, **options)
    check(xp, ours, expected, loose=10)
    if loss == "linear":
        rtol = 0.02 if xp.is_single else 1e-6
        np.testing.assert_allclose(ours.covariance(), expected.covariance(), rtol=rtol)


def test_both_from_one_function(xp):
    def pair(x):
        return xp.array(DECAY.fun(xp.host(x))), xp.array(DECAY.jac(xp.host(x)))

    ours = least_squares(pair, xp.array(DECAY.x0), True)
    check(xp, ours, least_squares(DECAY.fun, DECAY.x0, DECAY.jac))


def test_uncertainty(xp):
    ours, expected = both(xp, DECAY.fun, DECAY.x0, DECAY.jac)
    rtol = 5e-3 if xp.is_single else 1e-7
    np.testing.assert_allclose(ours.covariance(), expected.covariance(), rtol=rtol)
    intervals = ours.confidence_intervals()
    np.testing.assert_allclose(intervals, expected.confidence_intervals(), rtol=rtol)
    assert f"{expected.standard_errors()[0]:.2g}"[:4] in ours.summary()


@pytest.mark.parametrize("exact", [False, True])
def test_resumed_equals_uninterrupted(xp, exact, tmp_path):
    p = load("Chwirut2")
    fun, x0 = xp.hosted(p.fun), xp.array(p.starts[0])
    options = {"jac": xp.hosted(p.jac)} if exact else {}
    states = []

    def keep(intermediate_result):
        assert xp.owns(intermediate_result.x) and xp.owns(intermediate_result.fun)
        states.append(intermediate_result.state)

    whole = least_squares(fun, x0, callback=keep, **options)
    for state in states[:: max(1, len(states) // 4)]:
        state.save(tmp_path / "state.npz")
        loaded = LMState.load(tmp_path / "state.npz", like=x0)
        resumed = least_squares(fun, x0, resume=loaded, **options)
        elsewhere = least_squares(fun, x0, resume=LMState.load(tmp_path / "state.npz"), **options)
        assert xp.host(elsewhere.x).tobytes() == xp.host(resumed.x).tobytes()
        assert xp.host(resumed.x).tobytes() == xp.host(whole.x).tobytes()
        assert (resumed.cost, resumed.nfev, resumed.njev) == (whole.cost, whole.nfev, whole.njev)


@pytest.mark.parametrize("sigma", [None, "each"])
def test_curve_fit(xp, sigma):
    ns = xp.namespace

    def model(t, a, b, c):
        return a * ns.exp(-b * t) + c

    weights = np.linspace(0.03, 0.08, 40)
    options = {} if sigma is None else {"sigma": xp.array(weights)}
    popt, pcov = curve_fit(model, xp.array(DECAY.t), xp.array(DECAY.y), **options)
    options = {} if sigma is None else {"sigma": weights}
    expected, covariance = curve_fit(Decay.model, DECAY.t, DECAY.y, **options)
    rtol = 1e-3 if xp.is_single else 1e-7
    np.testing.assert_allclose(xp.host(popt), expected, rtol=rtol)
    tolerance = 10 * rtol * np.abs(covariance).max()
    np.testing.assert_allclose(np.asarray(pcov), covariance, atol=tolerance)


def test_complex_parameters(xp):
    if xp.is_single:
        pytest.skip("the same code as in double precision")
    ns = xp.namespace
    t = xp.array(np.linspace(0, 2, 25))
    true = [2 - 1j, 0.5 + 3j]

    def model(z):
        return z[0] * ns.exp(-z[1] * t)

    y = model(ns.asarray(true, dtype=ns.complex128))
    z0 = ns.asarray([1.5 - 0.5j, 0.4 + 2.7j], dtype=ns.complex128)
    result = least_squares(lambda z: model(z) - y, z0)
    assert result.success and type(result.x) is type(z0)
    assert [complex(z) for z in result.x] == pytest.approx(true, rel=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_trial_that_is_not_finite_is_rejected(xp, bad):
    def fun(x):
        return np.full(40, bad) if x[1] > 2.0 else DECAY.fun(x)

    ours = least_squares(xp.hosted(fun), xp.array([1.0, 1.9, 0.0]), xp.hosted(DECAY.jac))
    check(xp, ours, least_squares(DECAY.fun, DECAY.x0, DECAY.jac), loose=5)


def test_residuals_of_another_library_are_refused():
    torch = pytest.importorskip("torch")
    x0 = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="library of `x0`"):
        least_squares(lambda x: DECAY.fun(x.numpy()), x0)
    with pytest.raises(TypeError, match="library of `x0`"):
        least_squares(
            lambda x: torch.as_tensor(DECAY.fun(x.numpy())), x0, lambda x: np.ones((40, 3))
        )


def test_torch_parameters_that_require_gradients_are_left_alone():
    torch = pytest.importorskip("torch")
    x0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    seen = []

    def fun(x):
        seen.append(x.requires_grad)
        return torch.stack([10 * (x[1] - x[0] ** 2), 2 - x[0]])

    result = least_squares(fun, x0)
    assert result.success and not result.x.requires_grad and not any(seen)
    np.testing.assert_allclose(result.x.numpy(), [2, 4], rtol=1e-8)
    assert x0.grad is None and x0.tolist() == [1.0, 1.0]
