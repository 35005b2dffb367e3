"""A small fit that the tests of Legate share: three parameters of a decay, 1003 rows."""

from __future__ import annotations

from typing import Any

import numpy as np

M = 1003  # uneven for any number of processors up to 16
T = np.linspace(0.0, 2.0, M)
Y = 2.5 * np.exp(-1.3 * T) + 0.5 + 0.01 * np.random.default_rng(0).standard_normal(M)
X0 = np.array([1.0, 1.0, 1.0])


def residual(x: Any, t: Any, y: Any) -> Any:
    """Residuals of a block of rows, shape (b,)."""
    return x[0] * np.exp(-x[1] * t) + x[2] - y


def jacobian(x: Any, t: Any, y: Any) -> Any:
    """Their Jacobian, shape (b, 3)."""
    e = np.exp(-x[1] * t)
    return np.stack([e, -x[0] * t * e, np.ones_like(t)], axis=1)


def nearly_dependent() -> tuple[np.ndarray, np.ndarray]:
    """A (300, 4), two columns equal to 1e-7, and b = A [1, 2, 3, 4]: sums alone lose a column."""
    rng = np.random.default_rng(1)
    A = rng.standard_normal((300, 4))
    A[:, 3] = A[:, 2] + 1e-7 * rng.standard_normal(300)
    return A, A @ np.array([1.0, 2.0, 3.0, 4.0])


def wide(xp: Any, n: int, m: int = 12) -> tuple[Any, Any]:
    """fun and jac of m mildly nonlinear equations for n parameters of very different sizes."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, n)) * 10 ** rng.uniform(-3, 3, n)
    A, b = xp.array(a), xp.array(rng.standard_normal(m))

    def jac(x: Any) -> Any:
        return A * (1.0 + 0.1 * xp.cos(A @ x))[:, None]

    return lambda x: A @ x + 0.1 * xp.sin(A @ x) - b, jac


def curved(xp: Any, n: int, m: int = 12) -> tuple[Any, Any]:
    """fun and jac of m equations for n parameters, from whose start some steps are rejected."""
    rng = np.random.default_rng(0)
    A, b = xp.array(3.0 * rng.standard_normal((m, n)) / n**0.5), xp.array(rng.standard_normal(m))
    return lambda x: xp.exp(A @ x) - xp.exp(b), lambda x: A * xp.exp(A @ x)[:, None]
