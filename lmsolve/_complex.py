"""Complex parameters and residuals as real ones of twice the length.

A complex vector z becomes ``[Re z, Im z]``. A Jacobian J of a holomorphic function becomes
``[[Re J, -Im J], [Im J, Re J]]``; for real parameters only its left half remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._functions import UserFunction
from ._xp import Array, array_namespace


def split(z: Array) -> Array:
    """Real and imaginary parts of z (k,), one after the other: (2 k,)."""
    xp = array_namespace(z)
    return xp.concat([xp.real(z), xp.imag(z)])


def join(x: Array) -> Array:
    """The complex vector (k,) whose parts x (2 k,) holds."""
    k = x.shape[0] // 2
    return x[:k] + 1j * x[k:]


class RealFunction:
    """A complex residual function as a real one."""

    def __init__(self, function: UserFunction, complex_x: bool) -> None:
        self._function, self._complex_x = function, complex_x

    def __call__(self, x: Array) -> Array:
        """Real residuals (2 m,) at real parameters."""
        r = self._function(join(x) if self._complex_x else x)
        xp = array_namespace(r)
        return split(r if xp.isdtype(r.dtype, "complex floating") else r + 0j)


def real_jacobian(jac: Callable[[Array], Any], complex_x: bool) -> Callable[[Array], Array]:
    """A complex Jacobian function as a real one of shape (2 m, 2 n) or (2 m, n)."""

    def real(x: Array) -> Array:
        J = jac(join(x) if complex_x else x)
        xp = array_namespace(J)
        J = xp.asarray(J)
        re, im = (xp.real(J), xp.imag(J)) if xp.isdtype(J.dtype, "complex floating") else (J, 0 * J)
        left = xp.concat([re, im], axis=0)
        if not complex_x:
            return left
        return xp.concat([left, xp.concat([-im, re], axis=0)], axis=1)

    return real


def complex_jacobian(J: Array, complex_x: bool) -> Array:
    """The complex Jacobian (m, n) in a real one; its holomorphic part where x is complex."""
    m = J.shape[0] // 2
    if not complex_x:
        return J[:m, :] + 1j * J[m:, :]
    n = J.shape[1] // 2
    return 0.5 * ((J[:m, :n] + J[m:, n:]) + 1j * (J[m:, :n] - J[:m, n:]))
