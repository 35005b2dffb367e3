"""The problems of `tests/problems.py`: exact Jacobians, and minima that are minima."""

import warnings

import numpy as np
import pytest

from tests.problems import CASES, FACTORS, PROBLEMS, Problem

# One point at each minimum that is not zero, to 7 digits. The minima are computed, not quoted:
# Newton's method takes each point to the stated cost.
MINIMISERS = [
    ("freudenstein_roth", [11.41278, -0.8968053]),
    ("jennrich_sampson", [*2 * [0.2578252]]),
    ("bard", [0.08241056, 1.133036, 2.343695]),
    ("gaussian", [0.3989561, 1.000019, 0]),
    ("meyer", [0.005609636, 6181.346, 345.2236]),
    ("kowalik_osborne", [0.1928069, 0.1912823, 0.1230565, 0.1360623]),
    ("brown_dennis", [-11.59444, 13.20363, -0.4034395, 0.2367788]),
    ("osborne_1", [0.3754101, 1.935847, -1.464687, 0.01286753, 0.0221227]),
    ("biggs_exp6", [1.71141599472, 17.683198181, 3.163143660919, 5.186561552, 1.71141599472,
     -0.836856339081]),
    ("osborne_2", [1.309977, 0.4315538, 0.6336617, 0.5994305, 0.7541832, 0.9042886, 1.365812,
     4.823699, 2.398685, 4.568875, 5.675341]),
    ("watson_6", [-0.01572509, 1.012435, -0.2329916, 1.26043, -1.513729, 0.9929964]),
    ("watson_9", [-1.530704e-05, 0.9997897, 0.01476396, 0.1463423, 1.000821, -2.617731,
     4.104403, -3.143612, 1.052626]),
    ("watson_12", [-6.60266e-09, 1.000002, -0.0005639321, 0.3478205, -0.1567315, 1.052815,
     -3.247271, 7.288435, -10.27185, 9.074114, -4.541375, 1.012012]),
    ("penalty_1_4", [*4 * [0.2500075]]),
    ("penalty_1_10", [*10 * [0.1581223]]),
    ("penalty_2_4", [0.1999993, 0.1913167, 0.4801015, 0.5188454]),
    ("penalty_2_10", [0.1999836, 0.01035065, 0.01960493, 0.03208907, 0.04993268, 0.076514,
     0.1186241, 0.1921449, 0.3473206, 0.3691644]),
    ("trigonometric", [0.05153886, 0.05302136, 0.05469686, 0.05661959, 0.05887065, 0.06157966,
     0.2183767, 0.0695226, 0.1437281, 0.09253123]),
    ("trigonometric", [0.0551509, 0.05684062, 0.058764, 0.06099061, 0.06362621, 0.06684318,
     0.2081615, 0.1643631, 0.0850069, 0.09143145]),
    ("trigonometric", [0.05391293, 0.05549659, 0.05728588, 0.05933665, 0.06173013, 0.257886,
     0.06811418, 0.07262293, 0.0784616, 0.08375386]),
    ("trigonometric", [0.06249185, 0.06447288, 0.06670594, 0.06924456, 0.2753976, 0.07544567,
     0.07903016, 0.08227326, 0.08363928, 0.08208885]),
    ("brown_almost_linear", [*9 * [0], 11]),
    ("linear_full_rank", [*5 * [-1.0]]),
    ("linear_rank_1", [1 / 7, 0, 0, 0, 0]),
    ("linear_rank_1_zeros", [0, 3 / 34, 0, 0, 0]),
    ("chebyquad_8", [0.04315276, 0.1930908, 0.2663287, 0.5, 0.5, 0.7336713, 0.8069092,
     0.9568472]),
    ("chebyquad_10", [0.9670066, 0.8448546, 0.07474817, 0.3596465, 0.1715182, 0.6167383,
     0.6167383, 0.2864342, 0.4707505, 0.7998108]),
    ("chebyquad_10", [0.1667083, 0.2391707, 0.3988843, 0.7608293, 0.3988843, 0.0596199,
     0.9403801, 0.8332917, 0.6011157, 0.6011157]),
    ("chebyquad_10", [0.9728851, 0.207684, 0.792316, 0.6148844, 0.6148844, 0.3851156, 0.1317983,
     0.8682017, 0.3851156, 0.02711494]),
]  # fmt: skip
# Whole curves or planes of minimisers: the Hessian is singular, so the point itself is tested.
NOT_ISOLATED = {"biggs_exp6", "brown_almost_linear", "linear_rank_1", "linear_rank_1_zeros"}
ONES = (
    "rosenbrock", "wood", "extended_rosenbrock", "variably_dimensioned",
    "brown_almost_linear",
)  # fmt: skip
ROOTS = {name: np.ones(PROBLEMS[name].n) for name in ONES} | {
    "freudenstein_roth": [5, 4],
    "beale": [3, 0.5],
    "powell_badly_scaled": [1.0981593297e-5, 9.1061467398],
    "brown_badly_scaled": [1e6, 2e-6],
    "helical_valley": [1, 0, 0],
    "gulf": [50, 25, 1.5],
    "box_3d": [1, 10, 1],
    "powell_singular": np.zeros(4),
    "biggs_exp6": [1, 10, 1, 5, 4, 3],
    "extended_powell": np.zeros(12),
}


def complex_step(fun, x):
    """Jacobian with no subtraction, hence exact to rounding, shape (m, n)."""
    h = 1e-30
    return np.stack([fun(x + 1j * h * e).imag / h for e in np.eye(x.shape[0])], axis=1)


def hessian(problem, x):
    return complex_step(lambda z: problem.jac(z).T @ problem.fun(z), x)


def newton(problem, x, steps=6):
    for _ in range(steps):
        J, r = problem.jac(x), problem.fun(x)
        d = 1 / np.linalg.norm(J, axis=0)
        H = d[:, None] * hessian(problem, x) * d
        x = x - d * np.linalg.lstsq(H, d * (J.T @ r), rcond=1e-16)[0]
    return x


def gauss_newton(problem, x, steps=20):
    for _ in range(steps):
        x = x - np.linalg.lstsq(problem.jac(x), problem.fun(x))[0]
    return x


def test_the_collection():
    assert len(PROBLEMS) == 40
    assert len(CASES) == 120
    assert all(problem.m >= problem.n for problem in PROBLEMS.values())


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("seed", range(3))
def test_jacobian_is_exact(name, seed):
    problem = PROBLEMS[name]
    rng = np.random.default_rng(seed)
    x = problem.x0 * (1 + 0.3 * rng.standard_normal(problem.n)) + 0.3 * rng.random(problem.n)
    J, J_cs = problem.jac(x), complex_step(problem.fun, x)
    assert J.shape == (problem.m, problem.n)
    assert np.all(np.isfinite(J))
    np.testing.assert_allclose(J, J_cs, rtol=1e-10, atol=1e-13 * np.max(np.abs(J_cs)))


@pytest.mark.parametrize(("name", "factor"), CASES)
def test_every_start_can_be_evaluated(name, factor):
    problem = PROBLEMS[name]
    x = problem.start(factor)
    assert np.all(np.isfinite(problem.fun(x)))
    assert np.all(np.isfinite(problem.jac(x)))
    # Ten times Gulf's standard start happens to be its solution.
    assert problem.solved(problem.cost(x)) == (name == "gulf" and factor == 10)


def test_starts():
    np.testing.assert_array_equal(PROBLEMS["rosenbrock"].start(10), [-12, 10])
    for factor, start in zip(FACTORS, (0, 10, 100)):
        np.testing.assert_array_equal(PROBLEMS["watson_6"].start(factor), np.full(6, start))


@pytest.mark.parametrize(("name", "x"), MINIMISERS, ids=[name for name, _ in MINIMISERS])
def test_minimum(name, x):
    problem = PROBLEMS[name]
    x = np.array(x)
    near = problem.cost(x)
    if name not in NOT_ISOLATED:
        x = newton(problem, x)
    J, r = problem.jac(x), problem.fun(x)
    lengths = np.linalg.norm(J, axis=0)
    d = 1 / np.where(lengths > 0, lengths, 1.0)
    assert np.max(np.abs(d * (J.T @ r))) <= 1e-7 * np.linalg.norm(r)
    eigenvalues = np.linalg.eigvalsh(d[:, None] * hessian(problem, x) * d)
    floor = -1e-12 if name in NOT_ISOLATED else 0
    assert eigenvalues[0] > floor
    assert problem.cost(x) <= near * (1 + 1e-12)
    closest = min(problem.cost_min, key=lambda cost: abs(cost - problem.cost(x)))
    assert problem.cost(x) == pytest.approx(closest, rel=1e-8)
    assert problem.solved(problem.cost(x))


def test_every_positive_minimum_is_tested():
    stated = sum(cost > 0 for problem in PROBLEMS.values() for cost in problem.cost_min)
    assert stated == len(MINIMISERS)


@pytest.mark.parametrize("name", ROOTS)
def test_root(name):
    problem = PROBLEMS[name]
    x = gauss_newton(problem, np.array(ROOTS[name], dtype=float), steps=3)
    assert problem.cost(x) <= 1e-20
    np.testing.assert_allclose(x, ROOTS[name], rtol=1e-9, atol=1e-9)
    assert problem.solved(problem.cost(x))


@pytest.mark.parametrize(
    "name",
    ["discrete_boundary_value", "discrete_integral", "broyden_tridiagonal", "broyden_banded"],
)
def test_root_from_the_standard_start(name):
    problem = PROBLEMS[name]
    assert problem.cost(gauss_newton(problem, problem.x0)) <= 1e-28


def test_solved():
    positive = Problem("p", lambda x: x, lambda x: np.eye(1), np.array([1.0]), (2.0, 5.0))
    assert positive.solved(2.000001)
    assert positive.solved(4.999996)
    assert not positive.solved(2.00001)
    assert not positive.solved(1.99)
    zero = Problem("z", lambda x: x, lambda x: np.eye(1), np.array([1e-2]), (0.0,))
    assert zero.solved(4e-17)
    assert not zero.solved(6e-17)
    assert not zero.solved(np.inf)


@pytest.mark.parametrize("name", PROBLEMS)
def test_overflow_is_silent(name):
    problem = PROBLEMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (1e160 * np.ones(problem.n), -1e4 * np.arange(problem.n), np.zeros(problem.n)):
            problem.fun(x)
            problem.jac(x)
            problem.cost(x)
