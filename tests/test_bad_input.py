"""Wrong calls: the error names the argument, the rule, what was expected and what came."""

import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import aslinearoperator

from lmsolve import curve_fit, least_squares

T = np.linspace(0.0, 1.0, 5)
Y = np.exp(-T)
NAN, INF = np.nan, np.inf


def line(x):
    """Five residuals of two parameters."""
    return x[0] + x[1] * T - Y


def line_jac(x):
    """Its Jacobian."""
    return np.stack([np.ones_like(T), T], axis=1)


def model(t, a, b):
    """The same line as a model."""
    return a + b * t


class Wrong(NamedTuple):
    """A wrong call, the argument it is about, and what its error must say."""

    case: str
    call: object
    name: str
    says: str  # a regular expression: what was expected, and what came
    error: type = ValueError


def fit(case, name, says, error=ValueError, fun=line, x0=(1.0, 1.0), **options):
    """A wrong call of least_squares."""
    return Wrong(case, lambda: least_squares(fun, x0, **options), name, says, error)


def curve(case, name, says, error=ValueError, f=model, x=T, y=Y, **options):
    """A wrong call of curve_fit."""
    return Wrong("curve_fit: " + case, lambda: curve_fit(f, x, y, **options), name, says, error)


def returns(value):
    """A function of anything that returns ``value``."""
    return lambda *args, **kwargs: value


def at_start(value):
    """Residuals that are ``value`` at the start (1, 1) and those of the line elsewhere."""
    return lambda x: value if tuple(x) == (1.0, 1.0) else line(x)


def second_call(first, second):
    """A function that returns one thing at first and then another."""
    values = iter([first])
    return lambda x: next(values, second)


def with_entry(a, index, value):
    """A copy of an array with one entry changed."""
    a = np.array(a, dtype=float)
    a[index] = value
    return a


masked = np.ma.masked_array([1.0, 1.0], mask=[False, True])
masked_residuals = np.ma.masked_array(Y, mask=T > 0.8)
missing = pd.Series([1.0, None], dtype="Float64")

WRONG = [
    # fun
    fit("fun is a string", "fun", r"callable.*got str", TypeError, fun="line"),
    fit("fun is None", "fun", r"callable.*got NoneType", TypeError, fun=None),
    fit("fun returns None", "fun", r"array of residuals.*got None", TypeError, fun=returns(None)),
    fit("fun returns text", "fun", r"numbers.*got.*<U", TypeError, fun=returns(["a", "b"])),
    fit("fun returns a dict", "fun", r"numbers.*got", TypeError, fun=returns({"r": 1})),
    fit("fun returns a matrix", "fun", r"1-d.*got.*\(5, 2\)", fun=returns(np.ones((5, 2)))),
    fit("fun returns ragged lists", "fun", r"numbers.*got", fun=returns([[1.0, 2.0], [3.0]])),
    fit("fun returns objects", "fun", r"numbers.*got.*object", TypeError,
        fun=returns(np.array([line, 1.0]))),
    fit("fun returns a None among numbers", "fun", r"finite.*`x0`.*got nan.*1 of 2",
        fun=returns([None, 1.0])),
    fit("fun returns no residuals", "fun", r"at least one residual.*got none",
        fun=returns(np.zeros(0))),
    fit("fun returns NaN at x0", "fun", r"finite.*`x0`.*got nan.*1 of 5.*indices 2",
        fun=at_start(with_entry(Y, 2, NAN))),
    fit("fun returns inf at x0", "fun", r"finite.*`x0`.*got inf.*1 of 5.*indices 0",
        fun=at_start(with_entry(Y, 0, INF))),
    fit("fun returns only NaN", "fun", r"finite.*`x0`.*5 of 5", fun=returns(Y * NAN)),
    fit("fun's cost overflows at x0", "x0", r"cost.*finite.*got inf",
        fun=lambda x: 1e200 * line(x)),
    fit("fun returns masked residuals", "fun", r"unmasked.*got 1 masked",
        fun=returns(masked_residuals)),
    fit("fun changes its number of residuals", "fun", r"same number.*5.*got 4",
        fun=second_call(Y, Y[1:])),
    # x0
    fit("x0 is empty", "x0", r"at least one element.*got none", x0=[]),
    fit("x0 has NaN", "x0", r"finite.*got nan at index 1", x0=[1.0, NAN]),
    fit("x0 has inf", "x0", r"finite.*got inf at index 0", x0=[INF, 1.0]),
    fit("x0 has -inf and NaN", "x0", r"finite.*got -inf at index 0 and 1 more", x0=[-INF, NAN]),
    fit("x0 is a matrix", "x0", r"1 dimension.*got shape \(2, 2\)", x0=np.ones((2, 2))),
    fit("x0 is text", "x0", r"numbers.*got dtype <U", TypeError, x0=["1", "b"]),
    fit("x0 is None", "x0", r"numbers.*got dtype object", TypeError, x0=None),
    fit("x0 is ragged", "x0", r"numbers.*got", x0=[[1.0], [1.0, 2.0]]),
    fit("x0 holds objects", "x0", r"numbers.*got dtype object", TypeError, x0=[object(), 1.0]),
    fit("x0 holds dates", "x0", r"numbers.*got dtype datetime64", TypeError,
        x0=np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]")),
    fit("x0 is masked", "x0", r"not be masked.*got 1 masked", x0=masked),
    fit("x0 misses a value, in pandas", "x0", r"(finite.*got nan|numbers.*got)",
        (ValueError, TypeError),
        x0=missing),
    # jac
    fit("jac is an unknown word", "jac", r"'2-point', '3-point', 'cs'.*got '4-point'",
        jac="4-point"),
    fit("jac is False", "jac", r"callable.*got False", jac=False),
    fit("jac is a matrix", "jac", r"callable.*got", jac=np.ones((5, 2))),
    fit("jac is None", "jac", r"callable.*got None", jac=None),
    fit("jac returns None", "jac", r"Jacobian.*got None", TypeError, jac=returns(None)),
    fit("jac is transposed", "jac", r"\(5, 2\).*got \(2, 5\)", jac=lambda x: line_jac(x).T),
    fit("jac has a row too few", "jac", r"\(5, 2\).*got \(4, 2\)", jac=lambda x: line_jac(x)[1:]),
    fit("jac is flat", "jac", r"\(5, 2\).*got \(10,\)", jac=lambda x: line_jac(x).ravel()),
    fit("jac is 3-d", "jac", r"\(5, 2\).*got \(5, 2, 1\)", jac=lambda x: line_jac(x)[..., None]),
    fit("jac has NaN at x0", "jac", r"finite.*`x0`.*got 1 ",
        jac=returns(with_entry(line_jac(0), (1, 1), NAN))),
    fit("sparse jac has inf at x0", "jac", r"finite.*`x0`.*got 1 ",
        jac=returns(csr_array(with_entry(line_jac(0), (1, 1), INF)))),
    fit("sparse jac has the wrong shape", "jac", r"\(5, 2\).*got \(2, 2\)",
        jac=returns(eye_array(2))),
    fit("operator has the wrong shape", "jac", r"\(5, 2\).*got \(2, 2\)",
        jac=returns(aslinearoperator(np.eye(2)))),
    fit("jac is text", "jac", r"numbers.*got.*<U", TypeError, jac=returns([["a", "b"]] * 5)),
    fit("jac is complex", "jac", r"real.*got complex", TypeError, jac=lambda x: 1j * line_jac(x)),
    fit("jac is ragged", "jac", r"matrix of numbers.*got", jac=returns([[1.0], [1.0, 2.0]])),
    fit("jac=True and fun returns one array", "fun", r"pair.*got ndarray", TypeError, jac=True),
    fit("jac yields no blocks", "jac", r"5.*got 0", jac=lambda x: iter([])),
    fit("jac yields too few rows", "jac", r"5.*got 2",
        jac=lambda x: iter([(line(x)[:2], line_jac(x)[:2])])),
    fit("jac yields a block of the wrong shape", "jac", r"\(2, 2\).*got \(3, 2\)",
        jac=lambda x: iter([(line(x)[:2], line_jac(x)[:3])])),
    fit("fun yields blocks and jac does not", "jac", r"iterates.*got '2-point'",
        fun=lambda x: iter([line(x)])),
    fit("jac='cs' of complex residuals", "jac", r"complex.*got 'cs'",
        fun=lambda x: line(x) * (1 + 1j), jac="cs"),
    # bounds
    fit("bounds cross", "bounds", r"lb <= ub.*got 2.0 > 0.0 for parameter 1",
        bounds=([0, 2], [1, 0])),
    fit("x0 below the bounds", "x0",
        r"inside `bounds`.*got 1.0 outside \[2.0, 3.0\] for parameter 0",
        bounds=([2, 0], [3, 3])),
    fit("x0 above the bounds", "x0",
        r"inside `bounds`.*got 1.0 outside \[0.0, 0.5\] for parameter 1",
        bounds=([0, 0], [3, 0.5])),
    fit("bounds are NaN", "bounds", r"not be NaN.*got one in lb", bounds=([NAN, 0], [1, 1])),
    fit("bounds are three", "bounds", r"2 elements.*got 3", bounds=(0, 1, 2)),
    fit("bounds are a number", "bounds", r"pair.*got int", TypeError, bounds=3),
    fit("bounds are None", "bounds", r"pair.*got NoneType", TypeError, bounds=None),
    fit("bounds have the wrong length", "bounds", r"\(2,\).*got \(3,\) for lb",
        bounds=([0, 0, 0], [1, 1])),
    fit("bounds are text", "bounds", r"numbers.*got 'a' for lb", TypeError, bounds=("a", 2.0)),
    fit("bounds are complex", "bounds", r"numbers.*got 1j for lb", TypeError, bounds=(1j, 2.0)),
    fit("bounds of complex parameters", "bounds", r"infinite.*`x0` is complex.*got", x0=[1j, 1.0],
        bounds=(-1, 1)),
    # tolerances and limits
    fit("ftol is negative", "ftol", r"at least 0.*got -1e-08", ftol=-1e-8),
    fit("xtol is NaN", "xtol", r"at least 0.*got nan", xtol=NAN),
    fit("gtol is text", "gtol", r"at least 0.*got 'tight'", gtol="tight"),
    fit("xtol is inf", "xtol", r"at least 0.*got inf", xtol=INF),
    fit("all tolerances are None", "ftol", r"at least 2.22e-16.*got None, None and None",
        ftol=None, xtol=None, gtol=None),
    fit("all tolerances are 0", "gtol", r"at least 2.22e-16.*got 0, 0 and 0", ftol=0, xtol=0,
        gtol=0),
    fit("max_nfev is 0", "max_nfev", r"positive integer.*got 0", max_nfev=0),
    fit("max_nfev is negative", "max_nfev", r"positive integer.*got -3", max_nfev=-3),
    fit("max_nfev is text", "max_nfev", r"positive integer.*got '10'", max_nfev="10"),
    fit("max_nfev is NaN", "max_nfev", r"positive integer.*got nan", max_nfev=NAN),
    # scales, loss, steps
    fit("x_scale is an unknown word", "x_scale", r"'jac' or positive.*got 'auto'", x_scale="auto"),
    fit("x_scale is negative", "x_scale", r"positive.*got .*-1", x_scale=[1.0, -1.0]),
    fit("x_scale is 0", "x_scale", r"positive.*got 0", x_scale=0),
    fit("x_scale is NaN", "x_scale", r"positive finite.*got .*nan", x_scale=[1.0, NAN]),
    fit("x_scale is complex", "x_scale", r"positive.*got dtype complex", x_scale=1 + 2j),
    fit("x_scale has the wrong length", "x_scale", r"\(2,\).*got \(3,\)", x_scale=[1.0, 1.0, 1.0]),
    fit("x_scale='jac' of an operator", "x_scale", r"operator.*got", x_scale="jac",
        jac=lambda x: aslinearoperator(line_jac(x))),
    fit("loss is an unknown word", "loss", r"'huber'.*got 'hinge'", loss="hinge"),
    fit("loss is None", "loss", r"'linear'.*got None", loss=None),
    fit("loss returns the wrong shape", "loss", r"\(3, 5\).*got \(2, 5\)",
        loss=lambda z: np.ones((2, z.size))),
    fit("loss returns None", "loss", r"\(3, 5\).*got NoneType", loss=returns(None)),
    fit("f_scale is 0", "f_scale", r"positive and finite.*got 0", loss="huber", f_scale=0.0),
    fit("f_scale is negative", "f_scale", r"positive and finite.*got -1", f_scale=-1),
    fit("f_scale is NaN", "f_scale", r"positive and finite.*got nan", f_scale=NAN),
    fit("f_scale is text", "f_scale", r"positive and finite.*got 'auto'", f_scale="auto"),
    fit("f_scale is a vector", "f_scale", r"a number.*got shape \(5,\)", loss="huber",
        f_scale=np.ones(5)),
    fit("diff_step is 0", "diff_step", r"not zero.*got 0", diff_step=0.0),
    fit("diff_step is NaN", "diff_step", r"finite.*got nan", diff_step=NAN),
    fit("diff_step has the wrong length", "diff_step", r"\(2,\).*got \(3,\)", diff_step=[1e-8] * 3),
    fit("diff_step is text", "diff_step", r"number.*got 'small'", (TypeError, ValueError),
        diff_step="small"),
    # options
    fit("method is unknown", "method", r"'lm', 'trf', 'dogbox'.*got 'newton'", method="newton"),
    fit("method is None", "method", r"'lm', 'trf', 'dogbox'.*got None", method=None),
    fit("tr_solver is unknown", "tr_solver", r"'exact', 'lsmr'.*got 'best'", tr_solver="best"),
    fit("tr_solver='exact' of a sparse jac", "tr_solver", r"'exact'.*sparse.*got csr_array",
        tr_solver="exact", jac=lambda x: csr_array(line_jac(x))),
    fit("tr_options are a list", "tr_options", r"dict.*got list", TypeError, tr_options=["atol"]),
    fit("tr_options are unknown", "tr_options", r"atol, btol, maxiter.*got 'tol'", TypeError,
        tr_solver="lsmr", tr_options={"tol": 1e-8}),
    fit("jac_sparsity has the wrong shape", "jac_sparsity", r"\(5, 2\).*got \(2, 2\)",
        jac_sparsity=np.eye(2)),
    fit("verbose is 3", "verbose", r"0, 1 or 2.*got 3", verbose=3),
    fit("args are a number of the wrong kind", "kwargs", r"dict.*got list", TypeError, kwargs=[1]),
    fit("callback is a number", "callback", r"callable.*got int", TypeError, callback=3),
    fit("workers are 0", "workers", r"positive integer.*got 0", workers=0),
    fit("workers are a float", "workers", r"int or map.*got float", TypeError, workers=2.0),
    fit("workers are True", "workers", r"int or map.*got a bool", TypeError, workers=True),
    fit("fixed has the wrong length", "fixed", r"\(2,\).*got.*\(3,\)", fixed=[True, False, False]),
    fit("fixed holds indices", "fixed", r"bool.*got dtype int64", fixed=[0, 1]),
    fit("fixed is everything", "fixed", r"at least one parameter free.*got none",
        fixed=[True, True]),
    fit("names are too few", "names", r"2 parameters.*got 1", names=["a"]),
    fit("backend is unknown", "backend", r"'auto', 'numpy', 'cupynumeric'.*got 'jax'",
        backend="jax"),
    fit("resume is no state", "resume", r"LMState.*got dict", TypeError, resume={}),
    # curve_fit
    curve("f is no function", "f", r"callable.*got str", TypeError, f="line"),
    curve("method is unknown", "method", r"'lm', 'trf', 'dogbox'.*got 'newton'", method="newton"),
    curve("p0 cannot be told", "p0", r"must be given.*`f`.*got", f=lambda t, *p: p[0] * t),
    curve("p0 has NaN", "p0", r"finite.*got nan", p0=[1.0, NAN]),
    curve("p0 is too long", "p0",
        r"each parameter.*got 3 for \(t, a, b\)", TypeError, p0=[1.0, 1.0, 1.0]),
    curve("p0 is outside the bounds", "p0",
        r"inside `bounds`.*got 1.0 outside \[2.0, 3.0\]", p0=[1, 1], bounds=(2, 3)),
    curve("p0 is empty", "p0", r"at least one element.*got none", p0=[]),
    curve("ydata has NaN", "ydata", r"infs or NaNs.*got 1", y=with_entry(Y, 1, NAN)),
    curve("xdata has inf", "xdata", r"infs or NaNs.*got 1", x=with_entry(T, 1, INF)),
    curve("ydata is empty", "ydata", r"not be empty.*got", x=[], y=[]),
    curve("ydata is all NaN", "ydata", r"not be empty.*got shape \(5,\) of NaN",
        y=[NAN] * 5, nan_policy="omit"),
    curve("ydata is text", "ydata", r"numbers.*got", (ValueError, TypeError), y=["a"] * 5),
    curve("ydata is masked", "ydata", r"not be masked.*got 1", y=masked_residuals),
    curve("xdata is masked", "xdata", r"not be masked.*got 1", x=masked_residuals),
    curve("ydata and f differ in shape", "f", r"\(5,\).*got \(4,\)", f=lambda t, a: a * t[1:]),
    curve("ydata is a column", "f", r"ydata.*\(5, 1\).*got \(5,\)", y=Y[:, None]),
    curve("ydata is a matrix", "ydata", r"1 dimension.*got shape \(5, 5\)",
        x=np.outer(T, T), y=np.outer(Y, Y)),
    curve("f returns None", "f", r"array.*got None", TypeError, f=lambda t, a: None),
    curve("f is NaN at p0", "f", r"finite.*`p0`.*5 of 5", f=lambda t, a: a * t * NAN),
    curve("sigma has the wrong length", "sigma", r"\(5,\) or \(5, 5\).*got \(3,\)",
        sigma=[1, 1, 1]),
    curve("sigma has a zero", "sigma", r"positive.*got", sigma=with_entry(np.ones(5), 1, 0.0)),
    curve("sigma is negative", "sigma", r"positive.*got", sigma=-np.ones(5)),
    curve("sigma has NaN", "sigma", r"positive.*got", sigma=with_entry(np.ones(5), 1, NAN)),
    curve("sigma is not positive definite", "sigma", r"positive definite.*got",
        sigma=np.ones((5, 5))),
    curve("sigma is text", "sigma", r"numbers.*got", TypeError, sigma=["a"] * 5),
    curve("nan_policy is unknown", "nan_policy", r"'raise', 'omit'.*got .*'drop'",
        nan_policy="drop"),
    curve("jac is an unknown word", "jac", r"'2-point'.*got 'exact'", jac="exact"),
    curve("jac has the wrong shape", "jac", r"\(5, 2\).*got \(2, 5\)",
        jac=lambda t, a, b: line_jac(0).T),
    curve("bounds cross", "bounds", r"lb <= ub.*got 2.0 > 0.0", bounds=([2, 2], [0, 3])),
    curve("args are given", "args", r"not.*functools.partial.*got.*\(1,\)", args=(1,)),
    curve("an option is unknown", "typo", r"no argument.*got typo", TypeError, typo=1),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=[w.case for w in WRONG])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_wrong_call(wrong):
    with pytest.raises(wrong.error) as raised:
        wrong.call()
    text = str(raised.value)
    assert re.search(f"`{wrong.name}\\b", text), text
    assert re.search(wrong.says, text), text


def test_each_case_is_there_once():
    assert len({w.case for w in WRONG}) == len(WRONG) >= 60
