"""Damped steps of networks in three forms: J'J, the kernel J J', and products alone.

All solve `(J'J + L) p = -(J'r + decay x)` with `L = decay + damping`, a multiple of the identity,
so that the kernel of a wide J is made once for every damping. There, with `c = -decay x / L`, the
step is `c - J'z` where `(J J' + L) z = r + J c`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Products(Protocol):
    """J as an operator."""

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        ...

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        ...


# Share h of a step at which its curvature is looked at, as in Transtrum and Sethna (2012).
AHEAD = 0.1
# Damping, in units of the rounding of J'J, from which on `(J'J) p` will do for `J'(J p)`. With less
# every fifth trial near the end of the sinc problem fails by it.
FAITHFUL = 1e5
#: Slope of the residuals along a step p: (r(x + h p) - r) / h (m,) from p.
Slope = Callable[[Tensor], Tensor]
#: J'r_pp (n,) of a step p, from J'J p if that is known.
Curved = Callable[[Tensor, Tensor | None], Tensor]


class Linearised:
    """What the three forms share."""

    grad: Tensor
    size: float

    def __init__(self, x: Tensor, r: Tensor, products: Products, decay: float) -> None:
        self.x, self.r, self.products, self.decay = x, r, products, decay

    def steepest(self) -> float:
        """Largest magnitude of the gradient's components."""
        return float(self.grad.abs().amax())

    def length(self, v: Tensor) -> float:
        """Norm of a vector (n,)."""
        return float(torch.linalg.vector_norm(v))

    def moved(self, p: Tensor, a: Tensor | None) -> Tensor:
        """The trial point of a step and its acceleration."""
        return self.x + (p if a is None else p + a)

    def reduction(self, p: Tensor) -> Tensor:
        """0-d model decrease by any step p (n,)."""
        Jp = self.products.product(p).to(torch.float64)
        return -(self.grad @ p + 0.5 * (Jp @ Jp) + 0.5 * self.decay * (p @ p))


class TallSubproblem(Linearised):
    """Normal equations from the sums J'J and J'r; without `curved` steps are not bent."""

    def __init__(
        self,
        gram: Tensor,
        grad: Tensor,
        x: Tensor,
        r: Tensor,
        products: Products,
        decay: float,
        curved: Curved | None,
    ) -> None:
        super().__init__(x, r, products, decay)
        self.gram = gram
        self.gram.diagonal().add_(decay)
        self.grad = grad.to(x.dtype) + decay * x
        self.size = float(self.gram.diagonal().mean())  # a host read: it scales the damping
        self._factor: Tensor | None = None
        self._rounding_shows = True
        self._curved = curved

    def solve(self, damping: float) -> Tensor:
        """Step p (n,)."""
        self._factor = None  # before the next factor takes its memory
        self._factor = self._factored(damping)
        n, eps = self.gram.shape[0], torch.finfo(self.gram.dtype).eps
        self._rounding_shows = damping < FAITHFUL * n * eps * self.size
        return -solved(self._factor, self.grad)

    def _factored(self, damping: float) -> Tensor:
        return factorized(self.gram, damping)

    def _curvature(self, p: Tensor) -> Tensor:
        """J'J p (n,)."""
        return (self.gram @ p.to(self.gram.dtype)).to(p.dtype) - self.decay * p

    def reduction(self, p: Tensor) -> Tensor:
        """0-d model decrease by any step p (n,)."""
        return -(self.grad @ p + 0.5 * (p @ (self.gram @ p.to(self.gram.dtype))))

    def acceleration(self, p: Tensor) -> Tensor | None:
        """Geodesic acceleration (n,) of the last step."""
        if self._curved is None:
            return None
        assert self._factor is not None
        known = None if self._rounding_shows else self._curvature(p)
        return -0.5 * solved(self._factor, self._curved(p, known).to(p.dtype))


class WideSubproblem(Linearised):
    """Dual equations in the m residuals, from the lower triangle of the kernel J J'.

    Without `slope` steps are not bent.
    """

    def __init__(
        self,
        kernel: Tensor,
        x: Tensor,
        r: Tensor,
        products: Products,
        decay: float,
        slope: Slope | None,
    ) -> None:
        super().__init__(x, r, products, decay)
        self.kernel, self.slope = kernel, slope
        self.grad = products.transposed(r).to(x.dtype) + decay * x
        self.size = self._trace() / x.numel() + decay
        self._factor: Any = None

    def solve(self, damping: float) -> Tensor:
        """Step p (n,)."""
        total = self.decay + damping
        self._factor = None  # before the next factor takes its memory
        self._factor = self._factored(total)
        r = self.r.to(torch.float64)
        if self.decay == 0.0:
            return -self._back(self._solved(r))
        c = -(self.decay / total) * self.x
        r = r + self.products.product(c).to(torch.float64)
        return c - self._back(self._solved(r))

    def acceleration(self, p: Tensor) -> Tensor | None:
        """Geodesic acceleration (n,) of the last step."""
        if self.slope is None:
            return None
        r_pp = second_derivative(self.slope(p), self.products.product(p).to(p.dtype))
        return -0.5 * self._back(self._solved(r_pp))

    def _trace(self) -> float:
        return float(self.kernel.diagonal().sum())  # a host read

    def _factored(self, shift: float) -> Any:
        return factorized(self.kernel, shift)

    def _solved(self, b: Tensor) -> Tensor:
        return solved(self._factor, b)

    def _back(self, z: Tensor) -> Tensor:
        return self.products.transposed(z).to(self.x.dtype)


class MatrixFreeSubproblem(Linearised):
    """Conjugate gradients, preconditioned, and stopped when the model hardly gains any more.

    The preconditioner is the diagonal of `J'J + L` with an estimate `squares` (n,) of J'J's.

    The stop is by the decrease of the quadratic model (Nash and Sofer 1990, "Assessing a search
    direction within a truncated-Newton method"): iteration i is the last when its decrease is
    below `tolerance / i` of all so far. Early steps need few products.
    """

    tolerance = 0.5
    most = 200

    def __init__(
        self, squares: Tensor, x: Tensor, r: Tensor, products: Products, decay: float
    ) -> None:
        super().__init__(x, r, products, decay)
        self.grad = products.transposed(r).to(x.dtype) + decay * x
        self.squares = squares
        self.size = float(squares.mean()) + decay  # a host read: it scales the damping

    def solve(self, damping: float) -> Tensor:
        """Inexact step p (n,)."""
        J, total = self.products, self.decay + damping
        inverse = 1 / (self.squares + total)
        residual = -self.grad
        direction = inverse * residual
        p = torch.zeros_like(residual)
        rz = float(residual @ direction)  # one host read an iteration: it steers the loop
        gained = 0.0
        for i in range(1, self.most + 1):
            if not rz > 0:
                break
            image = J.transposed(J.product(direction)).to(p.dtype) + total * direction
            curvature = float(direction @ image)
            if not curvature > 0:
                raise np.linalg.LinAlgError("the damped system is not positive definite")
            step = rz / curvature
            gain = 0.5 * step * rz
            p = p + step * direction
            residual = residual - step * image
            gained += gain
            if i > 1 and i * gain <= self.tolerance * gained:
                break
            z = inverse * residual
            rz, previous = float(residual @ z), rz
            direction = z + (rz / previous) * direction
        return p

    def acceleration(self, p: Tensor) -> Tensor | None:
        """None: a second run of conjugate gradients costs more than it gains."""
        return None


def second_derivative(ahead: Tensor, here: Tensor) -> Tensor:
    """r_pp from the slopes of r along p: over the share h of p, J p + h/2 r_pp, and at x, J p.

    So with J' before all three.
    """
    return (2 / AHEAD) * (ahead - here)


def by_slopes(slope: Slope | None, J: Products) -> Curved | None:
    """J'r_pp of a step from the slope of the residuals along it, if that is to be had."""
    if slope is None:
        return None

    def curved(p: Tensor, known: Tensor | None) -> Tensor:
        ahead = slope(p)
        if known is None:
            return J.transposed(second_derivative(ahead, J.product(p).to(p.dtype)))
        return second_derivative(J.transposed(ahead).to(p.dtype), known)

    return curved


def factorized(A: Tensor, shift: float) -> Tensor:
    """Lower factor of `A + shift I` (n, n) from A's lower triangle, or LinAlgError."""
    B = A.clone()
    B.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(B, out=(B, info))
    if int(info) != 0:  # a host read: it decides
        raise np.linalg.LinAlgError("the damped system is not positive definite")
    return B


def solved(factor: Tensor, b: Tensor) -> Tensor:
    """Solution (n,) in the dtype of ``b``."""
    return torch.cholesky_solve(b.to(factor.dtype)[:, None], factor)[:, 0].to(b.dtype)
