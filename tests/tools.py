"""What several tests share: array libraries, counted functions, a few fits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import pytest

from lmsolve import _xp

LIBRARIES = (
    "numpy",
    "array_api_strict",
    "torch:float64",
    "torch:float32",
    pytest.param("cupynumeric", marks=pytest.mark.legate),
)


@dataclass(frozen=True)
class Library:
    """A namespace with the floating dtype to test it in."""

    name: str
    namespace: Any
    dtype: Any
    eps: float

    @classmethod
    def named(cls, name: str) -> Library:
        module, _, dtype = name.partition(":")
        dtype = dtype or "float64"
        probe = getattr(importlib.import_module(module), dtype)
        if module == "torch":
            namespace = importlib.import_module("array_api_compat.torch")
        else:
            namespace = importlib.import_module(module)
        return cls(name, namespace, probe, float(np.finfo(dtype).eps))

    @property
    def is_single(self) -> bool:
        return self.eps > 1e-10

    def array(self, values: Any) -> Any:
        """``values`` as an array of this library, in its dtype."""
        values = np.array(values)
        if values.dtype.kind == "b":
            return self.namespace.asarray(values)
        return self.namespace.asarray(values.astype("f4" if self.is_single else "f8"))

    def host(self, a: Any) -> np.ndarray:
        """``a`` as a NumPy array, after a check that it is of this library and dtype."""
        assert self.owns(a), f"{type(a)} is not an array of {self.name}"
        return _xp.to_numpy(a)

    def owns(self, a: Any) -> bool:
        """Whether ``a`` is an array of this library and dtype."""
        return type(a) is type(self.array([0.0])) and a.dtype == self.dtype

    def hosted(self, function: Any) -> Any:
        """A NumPy function as one of this library, which insists on being called with it."""

        def wrapped(x: Any, *args: Any) -> Any:
            return self.array(function(self.host(x).astype(float), *args))

        return wrapped

    def device(self, a: Any) -> Any:
        return array_api_compat.device(a)


class Counted:
    """A function that counts its calls and keeps the points."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.points: list[np.ndarray] = []

    def __call__(self, x: Any, *args: Any) -> Any:
        self.points.append(np.array(x, copy=True))
        return self.function(x, *args)

    @property
    def calls(self) -> int:
        return len(self.points)


class Decay:
    """``a exp(-b t) + c`` with noise: 40 residuals, 3 parameters."""

    def __init__(self, seed: int = 0, noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        self.t = np.linspace(0.0, 4.0, 40)
        self.y = self.model(self.t, 2.5, 1.3, 0.5) + noise * rng.standard_normal(40)
        self.x0 = np.array([1.0, 0.3, 0.0])

    @staticmethod
    def model(t: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a * np.exp(-b * t) + c

    def fun(self, x: np.ndarray) -> np.ndarray:
        return self.model(self.t, *x) - self.y

    def jac(self, x: np.ndarray) -> np.ndarray:
        e = np.exp(-x[1] * self.t)
        return np.stack([e, -x[0] * self.t * e, np.ones_like(self.t)], axis=1)


def rosenbrock(x: np.ndarray) -> np.ndarray:
    return np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def rosenbrock_jac(x: np.ndarray) -> np.ndarray:
    return np.array([[-20 * x[0], 10.0], [-1.0, 0.0]])
