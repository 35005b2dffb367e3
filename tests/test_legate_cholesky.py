"""Large normal equations factored by Legate: the same factor as LAPACK's, or LAPACK's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmsolve import least_squares
from lmsolve._linalg import LinAlgError
from lmsolve.legate import _cholesky, rows
from lmsolve.legate._cholesky import LegateCholesky, pays

pytestmark = pytest.mark.legate
N = 200


@pytest.fixture
def matrix() -> np.ndarray:
    B = np.random.default_rng(0).standard_normal((N + 5, N))
    A: np.ndarray = B.T @ B + np.eye(N)
    return A


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every matrix goes to Legate; the sizes of those that did."""
    sizes: list[int] = []
    monkeypatch.setattr(_cholesky, "pays", lambda n: sizes.append(n) or True)
    return sizes


def test_factor_solves_and_knows_its_smallest_pivot(matrix: np.ndarray) -> None:
    factor = LegateCholesky(matrix)
    y = factor.solve(matrix @ np.arange(N))
    np.testing.assert_allclose(y, np.arange(N), atol=1e-9)
    assert factor.pivot == pytest.approx(np.diag(np.linalg.cholesky(matrix)).min() ** 2)
    assert factor.reproduces(matrix)


def test_what_is_not_positive_definite_is_refused(matrix: np.ndarray) -> None:
    for bad in (matrix - 1e4 * np.eye(N), np.full((N, N), np.nan)):
        with pytest.raises(LinAlgError):
            LegateCholesky(bad)


def test_a_wrong_factor_is_noticed_and_lapack_takes_over(
    matrix: np.ndarray, everywhere: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not LegateCholesky(matrix).reproduces(2.0 * matrix)
    monkeypatch.setattr(LegateCholesky, "reproduces", lambda self, A: False)
    sharded = rows(lambda x, A: A @ x - 1.0, lambda x, A: A, n=N, data=(matrix,))
    np.testing.assert_allclose(
        matrix @ least_squares(sharded, np.zeros(N)).x, np.ones(N), atol=1e-8
    )
    assert everywhere


def test_a_fit_whose_matrices_legate_factors(everywhere: list[int]) -> None:
    rng = np.random.default_rng(1)
    A = rng.standard_normal((3 * N, N))
    b = np.tanh(A @ rng.standard_normal(N))

    def fun(x: Any, A: Any, b: Any) -> Any:
        return np.tanh(A @ x) - b

    def jac(x: Any, A: Any, b: Any) -> Any:
        return A * (1.0 - np.tanh(A @ x) ** 2)[:, None]

    x0 = 0.1 * rng.standard_normal(N)
    sharded = rows(fun, jac, n=N, data=(A, b))
    result = least_squares(sharded, x0, max_nfev=6)
    assert everywhere
    assert set(everywhere) == {N}
    expected = least_squares(fun, x0, jac, args=(A, b), max_nfev=6)
    assert result.cost == pytest.approx(expected.cost, rel=1e-6)


def test_small_matrices_stay_with_lapack() -> None:
    assert not pays(1000)
