"""The 54 certified runs: digits, honesty of `success`, standard errors, and the price of it all.

Each start is a test on its own. What the runs cost is counted by wrapped functions and compared
with SciPy's `lm` at its tightest tolerances on the runs that it solves too.
"""

from functools import cache

import numpy as np
import pytest
import scipy.optimize

from lmsolve import curve_fit, least_squares
from tests.nist import CASES, NAMES, digits, load
from tests.tools import Counted

TIGHT = {"method": "lm", "ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 100_000}
RUNS = [(name, start, exact) for name, start in CASES for exact in (False, True)]


@cache
def counted_fit(name, start, exact):
    """Result of one run, and how often it called `fun` and `jac`."""
    p = load(name)
    fun, jac = Counted(p.fun), Counted(p.jac)
    result = least_squares(fun, p.starts[start], **({"jac": jac} if exact else {}))
    if exact:
        assert (result.nfev, result.njev) == (fun.calls, jac.calls)
    return result, np.array([fun.calls, jac.calls])


def fit(name, start, exact):
    return counted_fit(name, start, exact)[0]


def run_digits(name, start, exact):
    return digits(fit(name, start, exact).x, load(name).certified)


@pytest.mark.parametrize(("name", "start"), CASES)
def test_digits_with_no_options(name, start):
    assert fit(name, start, False).success
    assert run_digits(name, start, False) >= 6


@pytest.mark.parametrize(("name", "start"), CASES)
def test_digits_with_the_exact_jacobian(name, start):
    assert fit(name, start, True).success
    assert run_digits(name, start, True) >= 9


def test_mean_digits_with_the_exact_jacobian():
    assert np.mean([run_digits(name, start, True) for name, start in CASES]) >= 10.5


@pytest.mark.parametrize("max_nfev", [5, 10, 20])
def test_success_is_never_claimed_below_four_digits(max_nfev):
    for name, start, exact in RUNS:
        p = load(name)
        options = {"jac": p.jac} if exact else {}
        result = least_squares(p.fun, p.starts[start], max_nfev=max_nfev, **options)
        assert not result.success or digits(result.x, p.certified) >= 4, (name, start, exact)
    for run in RUNS:
        assert not fit(*run).success or run_digits(*run) >= 4


@pytest.mark.parametrize("exact", [False, True], ids=["differences", "exact"])
def test_the_price(exact):
    ours, theirs, shared = np.zeros(2, dtype=int), np.zeros(2, dtype=int), 0
    for name, start in CASES:
        p = load(name)
        fun, jac = Counted(p.fun), Counted(p.jac)
        with np.errstate(all="ignore"):
            tight = scipy.optimize.least_squares(
                fun, p.starts[start], jac if exact else "2-point", **TIGHT
            )
        if digits(tight.x, p.certified) < 6:
            continue
        shared += 1
        ours += counted_fit(name, start, exact)[1]
        theirs += [fun.calls, jac.calls]
    assert shared >= 45
    assert ours[0] <= 1.2 * theirs[0], (ours, theirs)  # differences included
    assert ours[1] <= theirs[1], (ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_standard_errors(name):
    p = load(name)
    stderr = fit(name, 1, True).standard_errors()
    assert digits(stderr, p.certified_stderr) >= (3 if name == "Lanczos1" else 6)


@pytest.mark.parametrize("name", NAMES)
def test_curve_fit_is_the_same_fit(name):
    p = load(name)
    popt, pcov = curve_fit(p.model, p.x, p.y, p.starts[1], jac=p.model_jac)
    assert digits(popt, p.certified) >= 9
    expected = fit(name, 1, True).standard_errors()
    np.testing.assert_allclose(np.sqrt(np.diag(pcov)), expected, rtol=1e-9)
