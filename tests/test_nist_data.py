"""The NIST sets as `tests/nist.py` reads them agree with what NIST certified."""

import warnings

import numpy as np
import pytest
from scipy.optimize import curve_fit

from tests.nist import CASES, FOLDER, NAMES, digits, load


def complex_step(fun, b):
    """Jacobian with no subtraction, hence exact to rounding, shape (m, n)."""
    step = 1e-30 * np.abs(b)
    points = b + 1j * np.diag(step)
    return np.stack([fun(p).imag / h for p, h in zip(points, step, strict=True)], axis=1)


def test_every_file_is_a_set():
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.dat"))
    assert len(CASES) == 54


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name):
    problem = load(name)
    assert problem.starts.shape == (2, problem.n)
    assert problem.fun(problem.starts[0]).shape == (problem.m,)
    assert problem.jac(problem.starts[0]).shape == (problem.m, problem.n)
    # Rat43's file says 9, but its standard deviation belongs to 11 = 15 - 4.
    assert problem.dof == problem.m - problem.n - 2 * (name == "Rat43")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Lanczos1"])
def test_certified_residual_sum_of_squares(name):
    problem = load(name)
    residual = problem.fun(problem.certified)
    np.testing.assert_allclose(residual @ residual, problem.residual_ss, rtol=1e-9)
    sd = np.sqrt(problem.residual_ss / (problem.m - problem.n))
    np.testing.assert_allclose(sd, problem.residual_sd, rtol=1e-10)


def test_lanczos1_residual_sum_of_squares():
    # Residuals of 1e-13 on data of order 1: the 11 digits certified leave 2e-11, and one
    # Gauss-Newton step from them leaves what double precision can hold.
    problem = load("Lanczos1")
    b = problem.certified
    b = b - np.linalg.lstsq(problem.jac(b), problem.fun(b))[0]
    assert digits(b, problem.certified) >= 10
    residual = problem.fun(b)
    np.testing.assert_allclose(residual @ residual, problem.residual_ss, rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_certified_values_are_stationary(name):
    problem = load(name)
    J, r = problem.jac(problem.certified), problem.fun(problem.certified)
    # A stationary point has r orthogonal to J; moving by the 11 digits' rounding tilts it a little.
    rounding = np.linalg.norm(J * problem.certified, axis=0).sum() * 1e-10 / np.linalg.norm(r)
    cosines = J.T @ r / (np.linalg.norm(J, axis=0) * np.linalg.norm(r))
    assert np.max(np.abs(cosines)) <= 1e-9 + rounding


@pytest.mark.parametrize("name", NAMES)
def test_certified_standard_errors(name):
    problem = load(name)
    J = problem.jac(problem.certified)
    d = 1 / np.linalg.norm(J, axis=0)
    R = np.linalg.qr(J * d, mode="r")
    stderr = d * np.linalg.norm(np.linalg.inv(R), axis=1) * problem.residual_sd
    np.testing.assert_allclose(stderr, problem.certified_stderr, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["start 1", "start 2", "certified"])
def test_jacobian_is_exact(name, where):
    problem = load(name)
    b = dict(
        zip(["start 1", "start 2", "certified"], [*problem.starts, problem.certified], strict=True)
    )[where]
    J = problem.jac(b)
    J_cs = complex_step(problem.fun, b)
    atol = 1e-12 * np.max(np.abs(J_cs), axis=0)
    assert np.all(np.abs(J - J_cs) <= atol + 1e-11 * np.abs(J_cs))


@pytest.mark.parametrize("name", NAMES)
def test_overflow_is_silent(name):
    problem = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for b in (1e200 * problem.certified, -1e6 * problem.certified, 0 * problem.certified):
            problem.fun(b)
            problem.jac(b)
            problem.model(problem.x, *b)


def test_models_name_their_parameters():
    problem = load("Misra1a")
    b, _ = curve_fit(
        problem.model, problem.x, problem.y, p0=problem.starts[1], jac=problem.model_jac
    )
    assert digits(b, problem.certified) > 4


def test_digits():
    certified = np.array([2.0, -4.0])
    assert digits(certified, certified) == 11
    assert digits(np.array([2.0, -4.004]), certified) == pytest.approx(3)
    assert digits(np.array([20.0, -4.0]), certified) == 0
    assert digits(np.array([np.nan, -4.0]), certified) == 0
