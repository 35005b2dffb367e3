"""The least-squares problems of More, Garbow and Hillstrom (1981), with exact Jacobians.

All 35 problems of the paper, in its order and by its formulas, those of variable size at every size
for which it quotes a minimum; Gulf's residual with the minus sign that the paper's print lost.
Residuals and Jacobians are silent on overflow, and accept complex points (for complex steps).

Starts are 1, 10 and 100 times the standard one; where that is zero (Watson), the larger starts are
the vectors (10, ..., 10) and (100, ..., 100), as in the paper's own experiments.

A run has solved its problem when its cost is within a relative 1e-6 of a known local minimum, or
for a minimum of zero at most 1e-12 min(1, cost at the standard start). `cost_min` holds the local
minima at finite points, the lowest first; `cost_infinity` holds the values that the cost tends to
along a path to infinity with no minimum on it: they are kept apart and do not count as solved.
The paper lists most of both; the others were found by running SciPy's methods from the starts, and
the minima among them verified (stationary, with a positive definite Hessian). Minima beside a pole
that parts the data points (Meyer, Kowalik-Osborne) are left out: no one would call that a fit.

References
----------
More, Garbow, Hillstrom (1981), "Testing unconstrained optimization software", ACM Transactions on
Mathematical Software 7(1), 17-41.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FACTORS = (1, 10, 100)


@dataclass(frozen=True, eq=False)
class Problem:
    """One problem: `fun` (m,) and `jac` (m, n) at x, the standard start and the known minima."""

    name: str
    fun: Callable[[Array], Array]
    jac: Callable[[Array], Array]
    x0: Array
    cost_min: tuple[float, ...]
    cost_infinity: tuple[float, ...] = ()

    @property
    def m(self) -> int:
        return self.fun(self.x0).shape[0]

    @property
    def n(self) -> int:
        return self.x0.shape[0]

    def cost(self, x: Array) -> float:
        """Half the sum of squares; inf where it overflows or is not a number."""
        with np.errstate(all="ignore"):
            cost = 0.5 * float(np.sum(self.fun(x) ** 2))
        return cost if np.isfinite(cost) else np.inf

    def start(self, factor: float) -> Array:
        if factor != 1 and not np.any(self.x0):
            return np.full(self.n, float(factor))
        return factor * self.x0

    def solved(self, cost: float, minima: tuple[float, ...] | None = None) -> bool:
        """Whether `cost` is that of a known local minimum (or of one of `minima`)."""
        zero = 1e-12 * min(1.0, self.cost(self.x0))
        minima = self.cost_min if minima is None else minima
        return any(abs(cost - c) <= (1e-6 * c if c > 0 else zero) for c in minima)


def _problem(name, fun, jac, x0, squares=(0.0,), at_infinity=()):
    """Wrap a pair of functions; figures as in the paper: sums of squares, twice the cost."""
    quiet = np.errstate(all="ignore")
    return Problem(
        name,
        quiet(fun),
        quiet(jac),
        np.asarray(x0, dtype=float),
        tuple(0.5 * s for s in squares),
        tuple(0.5 * s for s in at_infinity),
    )


def _columns(*columns: Any) -> Array:
    return np.stack(np.broadcast_arrays(*columns), axis=1)


def rosenbrock():
    def fun(x):
        return np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    def jac(x):
        return np.array([[-20 * x[0], 10], [-1, 0]])

    return _problem("rosenbrock", fun, jac, [-1.2, 1])


def freudenstein_roth():
    def fun(x):
        a, b = x
        return np.array([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])

    def jac(x):
        b = x[1]
        return np.array([[1, (10 - 3 * b) * b - 2], [1, (3 * b + 2) * b - 14]])

    return _problem("freudenstein_roth", fun, jac, [0.5, -2], (0.0, 48.98425367924))


def powell_badly_scaled():
    def fun(x):
        return np.array([1e4 * x[0] * x[1] - 1, np.exp(-x[0]) + np.exp(-x[1]) - 1.0001])

    def jac(x):
        return np.array([[1e4 * x[1], 1e4 * x[0]], [-np.exp(-x[0]), -np.exp(-x[1])]])

    return _problem("powell_badly_scaled", fun, jac, [0, 1], at_infinity=(1e-8,))


def brown_badly_scaled():
    def fun(x):
        return np.array([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])

    def jac(x):
        return np.array([[1, 0], [0, 1], [x[1], x[0]]])

    return _problem("brown_badly_scaled", fun, jac, [1, 1])


def beale():
    y, i = np.array([1.5, 2.25, 2.625]), np.arange(1, 4)

    def fun(x):
        return y - x[0] * (1 - x[1] ** i)

    def jac(x):
        return _columns(x[1] ** i - 1, x[0] * i * x[1] ** (i - 1))

    return _problem("beale", fun, jac, [1, 1], at_infinity=(14.203125 - 13.875**2 / 14,))


def jennrich_sampson():
    i = np.arange(1, 11)

    def fun(x):
        return 2 + 2 * i - (np.exp(i * x[0]) + np.exp(i * x[1]))

    def jac(x):
        return _columns(-i * np.exp(i * x[0]), -i * np.exp(i * x[1]))

    return _problem(
        "jennrich_sampson", fun, jac, [0.3, 0.4], (124.362182355615,), (259.580190134253,)
    )


def helical_valley():
    def fun(x):
        a, b, c = x
        turn = np.arctan(b / a) / (2 * np.pi) + 0.5 * (np.real(a) < 0)
        return np.array([10 * (c - 10 * turn), 10 * (np.sqrt(a**2 + b**2) - 1), c])

    def jac(x):
        a, b, _ = x
        square = a**2 + b**2
        k, root = 50 / np.pi / square, np.sqrt(square)
        return np.array([[k * b, -k * a, 10], [10 * a / root, 10 * b / root, 0], [0, 0, 1]])

    return _problem("helical_valley", fun, jac, [-1, 0, 0])


def bard():
    y = np.array(
        [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
    )
    u = np.arange(1.0, 16)
    v = 16 - u
    w = np.minimum(u, v)

    def fun(x):
        return y - (x[0] + u / (v * x[1] + w * x[2]))

    def jac(x):
        slope = u / (v * x[1] + w * x[2]) ** 2
        return _columns(-1, v * slope, w * slope)

    return _problem(
        "bard", fun, jac, [1, 1, 1], (8.21487730657898e-3,), (17.0548857142857, 17.4286933333333)
    )


def gaussian():
    half = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    y = np.array([*half, 0.3989, *half[::-1]])
    t = (8 - np.arange(1, 16)) / 2

    def fun(x):
        return x[0] * np.exp(-x[1] * (t - x[2]) ** 2 / 2) - y

    def jac(x):
        z = t - x[2]
        peak = np.exp(-x[1] * z**2 / 2)
        return _columns(peak, -x[0] * peak * z**2 / 2, x[0] * peak * x[1] * z)

    return _problem("gaussian", fun, jac, [0.4, 1, 0], (1.12793276962e-8,))


def meyer():
    y = np.array(
        [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820,
         3307, 2872]
    )  # fmt: skip
    t = 45.0 + 5 * np.arange(1, 17)

    def fun(x):
        return x[0] * np.exp(x[1] / (t + x[2])) - y

    def jac(x):
        shifted = t + x[2]
        growth = np.exp(x[1] / shifted)
        slope = x[0] * growth / shifted
        return _columns(growth, slope, -slope * x[1] / shifted)

    return _problem("meyer", fun, jac, [0.02, 4000, 250], (87.9458551707,))


def gulf(m=99):
    t = np.arange(1, m + 1) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3)

    def fun(x):
        z = (y - x[1]) * np.sign(np.real(y - x[1]))
        return np.exp(-(z ** x[2]) / x[0]) - t

    def jac(x):
        sign = np.sign(np.real(y - x[1]))
        z = (y - x[1]) * sign
        power = z ** x[2] / x[0]
        fall = np.exp(-power)
        log_z = np.log(z + (z == 0))  # 0 where z is: z**x2 log(z) tends to 0
        return _columns(
            fall * power / x[0], fall * x[2] * z ** (x[2] - 1) * sign / x[0], -fall * power * log_z
        )

    return _problem("gulf", fun, jac, [5, 2.5, 0.15])


def box_3d():
    t = 0.1 * np.arange(1, 11)
    y = np.exp(-t) - np.exp(-10 * t)

    def fun(x):
        return np.exp(-t * x[0]) - np.exp(-t * x[1]) - x[2] * y

    def jac(x):
        return _columns(-t * np.exp(-t * x[0]), t * np.exp(-t * x[1]), -y)

    return _problem("box_3d", fun, jac, [0, 10, 20], at_infinity=(7.55887407549974e-2,))


def powell_singular(n=4, name="powell_singular"):
    def fun(x):
        a, b, c, d = x.reshape(-1, 4).T
        rows = a + 10 * b, np.sqrt(5) * (c - d), (b - 2 * c) ** 2, np.sqrt(10) * (a - d) ** 2
        return np.stack(rows, axis=1).ravel()

    def jac(x):
        J = np.zeros((n, n), dtype=x.dtype)
        for k, (a, b, c, d) in enumerate(x.reshape(-1, 4)):
            J[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = [
                [1, 10, 0, 0],
                [0, 0, np.sqrt(5), -np.sqrt(5)],
                [0, 2 * (b - 2 * c), -4 * (b - 2 * c), 0],
                [2 * np.sqrt(10) * (a - d), 0, 0, -2 * np.sqrt(10) * (a - d)],
            ]
        return J

    return _problem(name, fun, jac, np.tile([3, -1, 0, 1], n // 4))


def wood():
    def fun(x):
        a, b, c, d = x
        return np.array(
            [
                10 * (b - a**2),
                1 - a,
                np.sqrt(90) * (d - c**2),
                1 - c,
                np.sqrt(10) * (b + d - 2),
                (b - d) / np.sqrt(10),
            ]
        )

    def jac(x):
        s10, s90 = np.sqrt(10), np.sqrt(90)
        return np.array(
            [
                [-20 * x[0], 10, 0, 0],
                [-1, 0, 0, 0],
                [0, 0, -2 * s90 * x[2], s90],
                [0, 0, -1, 0],
                [0, s10, 0, s10],
                [0, 1 / s10, 0, -1 / s10],
            ]
        )

    return _problem("wood", fun, jac, [-3, -1, -3, -1])


def kowalik_osborne():
    y = np.array(
        [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
    )
    u = np.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])

    def fun(x):
        return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])

    def jac(x):
        top, bottom = u**2 + u * x[1], u**2 + u * x[2] + x[3]
        slope = x[0] * top / bottom**2
        return _columns(-top / bottom, -x[0] * u / bottom, u * slope, slope)

    return _problem(
        "kowalik_osborne",
        fun,
        jac,
        [0.25, 0.39, 0.415, 0.39],
        (3.07505603849238e-4,),
        (1.02734304869549e-3,),
    )


def brown_dennis():
    t = np.arange(1, 21) / 5

    def fun(x):
        return (x[0] + t * x[1] - np.exp(t)) ** 2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2

    def jac(x):
        line, wave = x[0] + t * x[1] - np.exp(t), x[2] + x[3] * np.sin(t) - np.cos(t)
        return _columns(2 * line, 2 * t * line, 2 * wave, 2 * np.sin(t) * wave)

    return _problem("brown_dennis", fun, jac, [25, 5, -5, -1], (85822.2016263563,))


def osborne_1():
    y = np.array(
        [0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685,
         0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448,
         0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406]
    )  # fmt: skip
    t = 10.0 * np.arange(33)

    def fun(x):
        return y - (x[0] + x[1] * np.exp(-t * x[3]) + x[2] * np.exp(-t * x[4]))

    def jac(x):
        e3, e4 = np.exp(-t * x[3]), np.exp(-t * x[4])
        return _columns(-1, -e3, -e4, t * x[1] * e3, t * x[2] * e4)

    return _problem("osborne_1", fun, jac, [0.5, 1.5, -1, 0.01, 0.02], (5.46489469748e-5,))


def biggs_exp6():
    t = 0.1 * np.arange(1, 14)
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)

    def fun(x):
        return (x[2] * np.exp(-t * x[0]) - x[3] * np.exp(-t * x[1]) + x[5] * np.exp(-t * x[4])) - y

    def jac(x):
        e0, e1, e4 = np.exp(-t * x[0]), np.exp(-t * x[1]), np.exp(-t * x[4])
        return _columns(-t * x[2] * e0, t * x[3] * e1, e0, -e1, -t * x[5] * e4, e4)

    return _problem(
        "biggs_exp6", fun, jac, [1, 2, 1, 1, 1, 1], (0.0, 5.65564992549993e-3), (0.30636677262479,)
    )


def osborne_2():
    y = np.array(
        [1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608,
         0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661,
         0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428,
         0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559,
         0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054]
    )  # fmt: skip
    t = 0.1 * np.arange(65)

    def terms(x):
        z = t - x[8:, None]
        return z, np.exp(-t * x[4]), np.exp(-(z**2) * x[5:8, None])

    def fun(x):
        _, decay, peaks = terms(x)
        return y - (x[0] * decay + x[1:4] @ peaks)

    def jac(x):
        z, decay, peaks = terms(x)
        heights = x[1:4, None] * peaks
        widths, centres = z**2 * heights, -2 * x[5:8, None] * z * heights
        return _columns(-decay, *-peaks, t * x[0] * decay, *widths, *centres)

    return _problem(
        "osborne_2",
        fun,
        jac,
        [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5],
        (4.01377362935478e-2,),
        (1.78981358688109,),
    )


def watson(n, *squares):
    t = np.arange(1, 30)[:, None] / 29
    j = np.arange(n)
    powers = t**j
    slopes = j * t ** np.maximum(j - 1, 0)

    def fun(x):
        return np.concatenate([slopes @ x - (powers @ x) ** 2 - 1, [x[0], x[1] - x[0] ** 2 - 1]])

    def jac(x):
        last = np.zeros((2, n), dtype=x.dtype)
        last[0, 0], last[1, 0], last[1, 1] = 1, -2 * x[0], 1
        return np.concatenate([slopes - 2 * (powers @ x)[:, None] * powers, last])

    return _problem(f"watson_{n}", fun, jac, np.zeros(n), squares)


def extended_rosenbrock(n=10):
    def fun(x):
        odd, even = x[::2], x[1::2]
        return np.stack([10 * (even - odd**2), 1 - odd], axis=1).ravel()

    def jac(x):
        J = np.zeros((n, n), dtype=x.dtype)
        odd = np.arange(0, n, 2)
        J[odd, odd], J[odd, odd + 1], J[odd + 1, odd] = -20 * x[::2], 10, -1
        return J

    return _problem("extended_rosenbrock", fun, jac, np.tile([-1.2, 1], n // 2))


def extended_powell():
    return powell_singular(12, "extended_powell")


def penalty_1(n, *squares):
    root = np.sqrt(1e-5)

    def fun(x):
        return np.concatenate([root * (x - 1), [np.sum(x**2) - 0.25]])

    def jac(x):
        return np.concatenate([root * np.eye(n), 2 * x[None]])

    return _problem(f"penalty_1_{n}", fun, jac, np.arange(1, n + 1), squares)


def penalty_2(n, *squares):
    root = np.sqrt(1e-5)
    i = np.arange(2, n + 1)
    y = np.exp(i / 10) + np.exp((i - 1) / 10)
    weights = np.arange(n, 0, -1)

    def fun(x):
        e = np.exp(x / 10)
        first, last = [x[0] - 0.2], [np.sum(weights * x**2) - 1]
        return np.concatenate(
            [first, root * (e[1:] + e[:-1] - y), root * (e[1:] - np.exp(-0.1)), last]
        )

    def jac(x):
        E = np.diag(np.exp(x / 10)) / 10
        first, last = np.eye(1, n), 2 * (weights * x)[None]
        return np.concatenate([first, root * (E[1:] + E[:-1]), root * E[1:], last])

    return _problem(f"penalty_2_{n}", fun, jac, np.full(n, 0.5), squares)


def variably_dimensioned(n=10):
    j = np.arange(1, n + 1)

    def fun(x):
        total = np.sum(j * (x - 1))
        return np.concatenate([x - 1, [total, total**2]])

    def jac(x):
        total = np.sum(j * (x - 1))
        return np.concatenate([np.eye(n), j[None], 2 * total * j[None]])

    return _problem("variably_dimensioned", fun, jac, 1 - j / n)


def trigonometric(n=10):
    i = np.arange(1, n + 1)

    def fun(x):
        return n - np.sum(np.cos(x)) + i * (1 - np.cos(x)) - np.sin(x)

    def jac(x):
        return np.sin(x) + np.diag(i * np.sin(x) - np.cos(x))

    squares = 0.0, 4.47356581279e-7, 2.79505612188e-5, 4.21863388792e-5, 8.78822521822e-4
    return _problem("trigonometric", fun, jac, np.full(n, 1 / n), squares)


def brown_almost_linear(n=10):
    def fun(x):
        return np.concatenate([x[:-1] + np.sum(x) - (n + 1), [np.prod(x) - 1]])

    def jac(x):
        others = [np.prod(np.delete(x, j)) for j in range(n)]
        return np.concatenate([np.eye(n)[:-1] + 1, [others]])

    return _problem("brown_almost_linear", fun, jac, np.full(n, 0.5), (0.0, 1.0))


def discrete_boundary_value(n=10):
    h = 1 / (n + 1)
    t = h * np.arange(1, n + 1)
    second = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)

    def fun(x):
        return second @ x + h**2 * (x + t + 1) ** 3 / 2

    def jac(x):
        return second + np.diag(1.5 * h**2 * (x + t + 1) ** 2)

    return _problem("discrete_boundary_value", fun, jac, t * (t - 1))


def discrete_integral(n=10):
    h = 1 / (n + 1)
    t = h * np.arange(1, n + 1)
    kernel = h / 2 * np.minimum(np.outer(1 - t, t), np.outer(t, 1 - t))

    def fun(x):
        return x + kernel @ (x + t + 1) ** 3

    def jac(x):
        return np.eye(n) + kernel * (3 * (x + t + 1) ** 2)

    return _problem("discrete_integral", fun, jac, t * (t - 1))


def broyden_tridiagonal(n=10):
    neighbours = np.eye(n, k=-1) + 2 * np.eye(n, k=1)

    def fun(x):
        return (3 - 2 * x) * x - neighbours @ x + 1

    def jac(x):
        return np.diag(3 - 4 * x) - neighbours

    return _problem("broyden_tridiagonal", fun, jac, np.full(n, -1.0))


def broyden_banded(n=10):
    band = np.tri(n, k=1) - np.tri(n, k=-6) - np.eye(n)

    def fun(x):
        return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))

    def jac(x):
        return np.diag(2 + 15 * x**2) - band * (1 + 2 * x)

    return _problem("broyden_banded", fun, jac, np.full(n, -1.0))


def linear_full_rank(n=5, m=10):
    A = np.eye(m, n) - 2 / m
    return _linear("linear_full_rank", A, float(m - n))


def linear_rank_1(n=5, m=10):
    A = np.outer(np.arange(1, m + 1), np.arange(1, n + 1))
    return _linear("linear_rank_1", A, m * (m - 1) / (2 * (2 * m + 1)))


def linear_rank_1_zeros(n=5, m=10):
    rows, columns = np.arange(m), np.arange(1, n + 1)
    rows[-1] = columns[0] = columns[-1] = 0
    A = np.outer(rows, columns)
    return _linear("linear_rank_1_zeros", A, (m**2 + 3 * m - 6) / (2 * (2 * m - 3)))


def _linear(name, A, squares):
    A = A.astype(float)
    return _problem(name, lambda x: A @ x - 1, lambda x: A.copy(), np.ones(A.shape[1]), (squares,))


def chebyquad(n, *squares):
    degrees = np.arange(1, n + 1)
    integrals = np.where(degrees % 2, 0, -1 / (degrees**2 - 1 + degrees % 2))

    def polynomials(x):
        """Shifted Chebyshev polynomials of degrees 1 to n, and their derivatives, (n, n) each."""
        u = 2 * x - 1
        T, dT = [np.ones_like(x), u], [np.zeros_like(x), 2 * np.ones_like(x)]
        for _ in range(n - 1):
            dT.append(4 * T[-1] + 2 * u * dT[-1] - dT[-2])
            T.append(2 * u * T[-1] - T[-2])
        return np.stack(T[1:]), np.stack(dT[1:])

    def fun(x):
        return np.mean(polynomials(x)[0], axis=1) - integrals

    def jac(x):
        return polynomials(x)[1] / n

    return _problem(f"chebyquad_{n}", fun, jac, degrees / (n + 1), squares)


PROBLEMS = {
    problem.name: problem
    for problem in (
        rosenbrock(),
        freudenstein_roth(),
        powell_badly_scaled(),
        brown_badly_scaled(),
        beale(),
        jennrich_sampson(),
        helical_valley(),
        bard(),
        gaussian(),
        meyer(),
        gulf(),
        box_3d(),
        powell_singular(),
        wood(),
        kowalik_osborne(),
        brown_dennis(),
        osborne_1(),
        biggs_exp6(),
        osborne_2(),
        watson(6, 2.28767005355235e-3),
        watson(9, 1.399760138091e-6),
        watson(12, 4.72238110e-10),
        extended_rosenbrock(),
        extended_powell(),
        penalty_1(4, 2.24997750089994e-5),
        penalty_1(10, 7.08765146709037e-5),
        penalty_2(4, 9.37629300735544e-6),
        penalty_2(10, 2.93660537456756e-4),
        variably_dimensioned(),
        trigonometric(),
        brown_almost_linear(),
        discrete_boundary_value(),
        discrete_integral(),
        broyden_tridiagonal(),
        broyden_banded(),
        linear_full_rank(),
        linear_rank_1(),
        linear_rank_1_zeros(),
        chebyquad(8, 3.51687372567793e-3),
        chebyquad(10, 4.77271369637535e-3, 6.50395480088230e-3, 9.50062885022166e-3),
    )
}
CASES = [(name, factor) for name in PROBLEMS for factor in FACTORS]
