"""Many small fits on cuPyNumeric: the answers of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmsolve import curve_fit_many, least_squares_many

pytestmark = pytest.mark.legate

X = np.linspace(0, 4, 30)


@pytest.fixture(scope="module")
def xp() -> Any:
    from lmsolve.legate._start import start

    return start()


@pytest.fixture(scope="module")
def y() -> np.ndarray:
    rng = np.random.default_rng(0)
    a, k, c = rng.uniform([1, 0.5, 0.2], [5, 2, 1], (20, 3)).T[:, :, None]
    return a * np.exp(-k * X) + c + 0.05 * rng.standard_normal((20, 30))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_cupynumeric_gives_the_answers_of_numpy(xp: Any, y: np.ndarray, kind: str) -> None:
    def fit(xp: Any) -> Any:
        options: dict[str, Any] = {}
        if kind == "all":
            options = {
                "bounds": ([0.0, 0.1, 0.4], np.inf),
                "loss": "soft_l1",
                "sigma": xp.asarray(np.linspace(0.04, 0.06, 30)),
                "mask": xp.asarray(np.arange(30) % 5 > 0),
            }

        def model(x: Any, a: Any, k: Any, c: Any) -> Any:
            return a * xp.exp(-k * x) + c

        return curve_fit_many(model, xp.asarray(X), xp.asarray(y), [2.0, 1.0, 0.5], **options)

    expected, result = fit(np), fit(xp)
    assert isinstance(result.x, xp.ndarray)
    np.testing.assert_allclose(np.asarray(result.x), expected.x, rtol=1e-7)
    np.testing.assert_allclose(np.asarray(result.stderr()), expected.stderr(), rtol=1e-5)
    assert np.array_equal(np.asarray(result.active_mask), expected.active_mask)
    assert np.asarray(result.success).all()
    assert all("reached" in message for message in result.message)


def test_residuals_on_cupynumeric(xp: Any) -> None:
    a = xp.asarray([1.0, 2.0])

    def fun(x: Any, a: Any) -> Any:
        return xp.stack([10 * (x[:, 1] - x[:, 0] ** 2), a - x[:, 0]], axis=1)

    result = least_squares_many(fun, xp.asarray([[-1.2, 1.0], [-1.2, 1.0]]), args=(a,))
    np.testing.assert_allclose(np.asarray(result.x), [[1, 1], [2, 4]], rtol=1e-8)
