"""astropy's and lmfit's own fitting tests, and fits by their interfaces, on our `least_squares`."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

import lmsolve
from tests import nist

ROOT = Path(__file__).parents[1]


def run_inside(arguments, folder):
    """Counts of outcomes, and of calls of ours, of pytest with our solver inside."""
    command = [sys.executable, "-m", "pytest", "-p", "inside", "-q", "--no-header",
               "-p", "no:cacheprovider", "-o", "addopts=", "-o", "xfail_strict=false",
               *arguments]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|xfailed)", done.stdout)}
    found = re.search(r"was called (\d+) times", done.stdout)
    assert found, done.stdout[-2000:]
    return counts, int(found[1])


ASTROPY = {
    # module of tests: (a choice among them, how many pass at least, calls of ours at least)
    "test_fitters": ("", 160, 100),
    "test_constraints": ("fitter", 30, 30),
    "test_functional_models": ("fit", 10, 1),
    "test_models": ("fitter", 100, 100),
    "test_models_quantities": ("fit", 100, 100),
    "test_physical_models": ("fit", 6, 5),
}


@pytest.mark.parametrize("name", ASTROPY)
def test_astropy(name, tmp_path):
    pytest.importorskip("astropy")
    chosen, passed, called = ASTROPY[name]
    counts, calls = run_inside(
        ["--pyargs", f"astropy.modeling.tests.{name}", "-k", chosen], tmp_path
    )
    assert counts["passed"] >= passed, (counts, calls)
    assert calls >= called, (counts, calls)


def lmfit_sources():
    """lmfit's source archive, which holds its tests; the wheel does not."""
    given = os.environ.get("LMFIT_SDIST")
    found = [Path(given)] if given else sorted((ROOT / ".venv" / "share").glob("lmfit-*.tar.gz"))
    return found[-1] if found and found[-1].exists() else None


LMFIT = ["least_squares", "itercb", "max_nfev", "minimizer", "jacobian_pickling"]


def test_lmfit(tmp_path):
    pytest.importorskip("lmfit")
    archive = lmfit_sources()
    if archive is None:
        pytest.skip("lmfit's tests are in its source archive: `make test` fetches it, or "
                    "`LMFIT_SDIST` names it")  # fmt: skip
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    files = [f"tests/test_{name}.py" for name in LMFIT]
    counts, calls = run_inside([*files, "-k", "least_squares or jacobian"], folder)
    assert counts["passed"] >= 10, (counts, calls)
    assert calls >= 15, (counts, calls)


@pytest.fixture
def inside(monkeypatch):
    """Our solver inside lmfit and astropy, in this process."""
    count = [0]

    def least_squares(*args, **kwargs):
        count[0] += 1
        return lmsolve.least_squares(*args, **{**kwargs, "method": "lm"})

    minimizer = pytest.importorskip("lmfit").minimizer
    monkeypatch.setattr(minimizer, "least_squares", least_squares)
    monkeypatch.setattr(scipy.optimize, "least_squares", least_squares)
    yield
    assert count[0] > 0


def lmfit_problem(problem, start, **bounds):
    """lmfit's parameters and residual of a NIST set."""
    import lmfit

    parameters = lmfit.Parameters()
    names = [f"b{j}" for j in range(problem.n)]
    for name, value in zip(names, start, strict=True):
        parameters.add(name, value=value, **bounds.get(name, {}))
    return parameters, lambda p: problem.fun(np.array([p[name].value for name in names]))


@pytest.mark.parametrize(("name", "start"), nist.CASES)
def test_lmfit_on_nist(inside, name, start):
    import lmfit

    problem = nist.load(name)
    parameters, residual = lmfit_problem(problem, problem.starts[start])
    # lmfit's own defaults are a fixed scale of 1, and an exception where a trial is not finite.
    result = lmfit.minimize(
        residual, parameters, method="least_squares", x_scale="jac", nan_policy="propagate"
    )
    values = np.array([p.value for p in result.params.values()])
    assert result.success
    assert nist.digits(values, problem.certified) >= 6
    if name.startswith("Lanczos"):
        return  # noise of 1e-6 and below: the covariance is that of rounding
    stderr = np.array([p.stderr for p in result.params.values()])
    np.testing.assert_allclose(stderr, problem.certified_stderr, rtol=2e-3)


def test_lmfit_bounds_and_expressions(inside):
    import lmfit

    t = np.linspace(0, 5, 60)
    y = 3.0 * np.exp(-0.8 * t) + 0.02 * np.random.default_rng(5).standard_normal(60)
    parameters = lmfit.Parameters()
    parameters.add("amplitude", value=1.0, min=0.0, max=2.5)
    parameters.add("rate", value=2.0, min=0.1)
    parameters.add("half_life", expr="log(2) / rate")
    parameters.add("offset", value=0.0, vary=False)

    def residual(p):
        return p["amplitude"] * np.exp(-p["rate"] * t) + p["offset"] - y

    result = lmfit.minimize(residual, parameters, method="least_squares")
    assert result.params["amplitude"].value == pytest.approx(2.5)
    rate = result.params["rate"].value
    assert result.params["half_life"].value == pytest.approx(np.log(2) / rate)
    best = scipy.optimize.minimize_scalar(
        lambda k: np.sum((2.5 * np.exp(-k * t) - y) ** 2), (0.3, 1.0), tol=1e-12
    )
    assert rate == pytest.approx(best.x, rel=1e-6)


@pytest.mark.parametrize("loss", ["linear", "soft_l1", "huber", "cauchy", "arctan"])
def test_lmfit_losses(inside, loss):
    import lmfit

    t = np.linspace(0, 5, 60)
    y = 3.0 * np.exp(-0.8 * t) + 0.02 * np.random.default_rng(5).standard_normal(60)
    y[::9] += 1.0
    model = lmfit.Model(lambda t, amplitude, rate: amplitude * np.exp(-rate * t))
    result = model.fit(
        y, t=t, amplitude=1.0, rate=1.0, method="least_squares",
        fit_kws={"loss": loss, "f_scale": 0.05},
    )  # fmt: skip
    assert result.success
    close = abs(result.params["rate"].value - 0.8) < 0.02
    assert close == (loss != "linear")


@pytest.mark.parametrize("fitter", ["TRFLSQFitter", "DogBoxLSQFitter"])
def test_astropy_models(inside, fitter):
    fitting = pytest.importorskip("astropy.modeling.fitting")
    from astropy.modeling import models

    x = np.linspace(-5, 5, 200)
    truth = (
        models.Gaussian1D(2.0, 0.5, 0.8) + models.Lorentz1D(1.0, -2.0, 0.6) + models.Const1D(0.3)
    )
    y = truth(x) + 0.01 * np.random.default_rng(2).standard_normal(200)
    start = models.Gaussian1D(1.0, 1.0, 1.0) + models.Lorentz1D(0.5, -1.5, 1.0) + models.Const1D(0)
    start.amplitude_0.bounds = (0, 10)
    start.stddev_0.bounds = (0.1, 5)
    start.fwhm_1.bounds = (0, 5)  # its sign changes nothing
    fitted = getattr(fitting, fitter)()(start, x, y)
    np.testing.assert_allclose(fitted.parameters, truth.parameters, rtol=0.05)
