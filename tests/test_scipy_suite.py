"""SciPy's own tests of `least_squares` and `curve_fit`, with ours in their place.

Each test runs as it stands, and once more with every call forced to ``method='lm'``, whatever
method it names. What differs on purpose is in EXCLUDED, and must go on failing.
"""

import types

import pytest
import scipy.optimize
from scipy.optimize.tests import test_least_squares as lsq_suite
from scipy.optimize.tests import test_minpack as minpack_suite

import lmsolve

#: SciPy's tests that assert a limitation of its own, under the limitation.
EXCLUDED = {
    "'lm' refuses bounds": ["TestLM.test_bounds_not_supported", "TestCurveFit.test_bounds"],
    "'lm' refuses robust losses": ["TestLM.test_loss"],
    "'lm' refuses m < n": [
        "TestLM.test_m_less_n_not_supported",
        "TestLM.test_rosenbrock_cropped",
        "TestCurveFit.test_data_point_number_validation",
    ],
    "'lm' refuses Jacobians that are not dense": [
        "TestLM.test_sparse_not_supported",
        "TestLM.test_jac_sparsity_not_supported",
        "TestLM.test_LinearOperator_not_supported",
    ],
    "'lm' refuses to switch a convergence test off": ["functions.test_small_tolerances_for_lm"],
    "'lm' does not count Jacobians": ["TestLM.test_full_result"],
    "complex parameters are refused": [
        "TestLM.test_x0_complex_scalar",
        "TestLM.test_x0_complex_array",
        "by lm.test_x0_complex_scalar",
        "by lm.test_x0_complex_array",
    ],
    "the loss stays in result.jac": ["TestTRF.test_jac", "TestDogbox.test_jac", "by lm.test_jac"],
    "gtol bounds the gradient itself, whatever its units": ["functions.test_gh_18793_and_19351"],
    "its reference covariance is that of a fit that stopped early": ["TestCurveFit.test_gh4555b"],
}


def forced_lm(function):
    """``function`` with the method of every call replaced by 'lm'."""

    def with_lm(*args, method=None, **kwargs):
        method = "lm" if method in (None, "trf", "dogbox") else method
        return function(*args, method=method, **kwargs)

    return with_lm


def as_it_stands(function):
    """``function`` itself."""
    return function


def reason_to_fail(case, name):
    """The limitation that a test asserts, or None."""
    for reason, tests in EXCLUDED.items():
        if f"{case}.{name}" in tests:
            return reason
    return None


def expected_to_fail(function, reason):
    """A copy of a test function, marked as one that must fail."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return pytest.mark.xfail(strict=True, reason=reason)(copy)


def in_place(suite, case, base, wrap, tests=None):
    """A test class with SciPy's tests, in which its functions are ours."""

    @pytest.fixture(autouse=True)
    def ours(self, monkeypatch):
        for name in ("least_squares", "curve_fit"):
            if hasattr(suite, name):
                monkeypatch.setattr(suite, name, wrap(getattr(lmsolve, name)))
        if hasattr(suite, "optimize"):
            public = types.SimpleNamespace(**vars(scipy.optimize))
            public.curve_fit = wrap(lmsolve.curve_fit)
            monkeypatch.setattr(suite, "optimize", public)

    members = {"ours": ours}
    tests = tests or {name: getattr(base, name) for name in dir(base) if name.startswith("test_")}
    for name, function in tests.items():
        reason = reason_to_fail(case, name)
        member = expected_to_fail(function, reason) if reason else function
        if base is object:
            members[name] = staticmethod(member)
        elif reason:
            members[name] = member
    return type(case, (base,), members)


functions = {name: value for name, value in vars(lsq_suite).items() if name.startswith("test_")}

TestTRFAsItStands = in_place(lsq_suite, "TestTRF", lsq_suite.TestTRF, as_it_stands)
TestDogboxAsItStands = in_place(lsq_suite, "TestDogbox", lsq_suite.TestDogbox, as_it_stands)
TestLMAsItStands = in_place(lsq_suite, "TestLM", lsq_suite.TestLM, as_it_stands)
TestFunctionsAsTheyStand = in_place(lsq_suite, "functions", object, as_it_stands, functions)
TestCurveFitAsItStands = in_place(
    minpack_suite, "TestCurveFit", minpack_suite.TestCurveFit, as_it_stands
)

TestTRFByLM = in_place(lsq_suite, "by lm", lsq_suite.TestTRF, forced_lm)
TestDogboxByLM = in_place(lsq_suite, "by lm", lsq_suite.TestDogbox, forced_lm)
TestFunctionsByLM = in_place(lsq_suite, "functions", object, forced_lm, functions)
TestCurveFitByLM = in_place(minpack_suite, "TestCurveFit", minpack_suite.TestCurveFit, forced_lm)
