"""Damped steps of networks: normal equations, and J only in products where it is wide or large.

Networks have parameters that do nothing (a bias before batch normalisation, a dead unit) and
combinations that do nothing. Their columns of J are zero or rounding noise, so scales have a floor,
and a system that is positive definite only by its rounding errors counts as singular.

In the wide and the matrix-free form scales are one for each parameter tensor, not one for each
parameter: the Gram matrix of a Linear layer's rows is then a product of two small matrices, and it
is the size of the layers that differs by orders of magnitude.

A quadratic penalty `1/2 decay |x|^2` joins the damping: with `L = decay + mu / d^2` and
`c = -decay x / L`, the step is `c + s` where s solves the penalty-free problem at `r + J c` damped
by L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lmsolve._subproblem import NormalEquations


class NetworkEquations(NormalEquations):
    """Normal equations of a network whose J was computed in ``dtype``."""

    def __init__(self, xp: Any, gram: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
        super().__init__(xp, gram, grad)
        self.norms = floored(self.norms, dtype)
        self._least = smallest_pivot(gram.shape[0], dtype)

    def solve(self, mu: float, d: Tensor, start: Tensor | None = None) -> Tensor:
        """Step p (n,); LinAlgError where the damped matrix is singular to working accuracy."""
        p: Tensor = super().solve(mu, d, start)
        if self.pivot < self._least:
            raise np.linalg.LinAlgError("the normal equations are singular")
        return p


def floored(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Column norms of at least the square root of the precision of the largest."""
    floor = torch.finfo(dtype).eps ** 0.5 * norms.amax()
    return torch.maximum(norms, floor)


def smallest_pivot(size: int, dtype: torch.dtype) -> float:
    """Squared pivot of a matrix of unit diagonal that says more than rounding.

    Rounding of the rows (relative, in their dtype) enters squared, that of their sums as it is.
    """
    return float(max(size * torch.finfo(torch.float64).eps, (10 * torch.finfo(dtype).eps) ** 2))


class Products(Protocol):
    """J as an operator."""

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        ...

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        ...


class Linearised:
    """What wide and matrix-free problems share: gradient, scales and the model's decrease."""

    escalated: bool = False

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        products: Products,
        tensor_norms: Tensor,
        offsets: tuple[int, ...],
        decay: float,
    ) -> None:
        self._x, self._r, self._products, self._decay = x, r, products, decay
        self._sizes = torch.tensor(np.diff(offsets), device=x.device)
        self._first = torch.tensor(offsets[:-1], device=x.device)
        self.grad = products.transposed(r).to(x.dtype) + decay * x
        norms = floored((tensor_norms.to(x) ** 2 + decay).sqrt(), r.dtype)
        self.norms: Any = torch.repeat_interleave(norms, self._sizes)

    def reduction(self, p: Tensor) -> Tensor:
        """0-d model decrease by any step p (n,)."""
        Jp = self._products.product(p).to(torch.float64)
        p = p.to(torch.float64)
        return -(self.grad.to(p) @ p + 0.5 * (Jp @ Jp) + 0.5 * self._decay * (p @ p))


class WideSubproblem(Linearised):
    """Dual equations in the m residuals, from a kernel `K = J diag(c) J'`."""

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        products: Products,
        tensor_norms: Tensor,
        offsets: tuple[int, ...],
        decay: float,
        kernel: Callable[[Sequence[float]], Tensor],
    ) -> None:
        super().__init__(x, r, products, tensor_norms, offsets, decay)
        self._kernel = kernel
        self._cached: tuple[list[float], Tensor] | None = None
        self._last: tuple[Tensor, Tensor, Tensor, float] | None = None
        if decay == 0.0:  # with a penalty the kernel itself changes with mu
            self.secular = self._secular

    def solve(self, mu: float, d: Tensor, start: Tensor | None = None) -> Tensor:
        """Step p (n,); LinAlgError where the damped kernel is not positive definite."""
        if start is not None:
            raise NotImplementedError("bounds are not for networks")
        d_h = d[self._first].to(torch.float64).tolist()  # one host read for each distinct d
        if self._decay == 0.0:
            z = self._solve_kernel([v * v for v in d_h], mu, self._r)
            return -(d * d) * self._products.transposed(z).to(d.dtype)
        c = [1.0 / (self._decay + mu / (v * v)) for v in d_h]
        wide = torch.repeat_interleave(torch.tensor(c, dtype=d.dtype, device=d.device), self._sizes)
        shift = -self._decay * self._x * wide
        r = self._r + self._products.product(shift).to(self._r.dtype)
        z = self._solve_kernel(c, 1.0, r)
        return shift - wide * self._products.transposed(z).to(d.dtype)

    def _solve_kernel(self, c: list[float], shift: float, r: Tensor) -> Tensor:
        """`(K(c) + shift I)^-1 r`."""
        if self._cached is None or self._cached[0] != c:
            self._cached = None  # the old kernel goes before the new one comes
            self._cached = (c, self._kernel(c))
        A = self._cached[1].clone()
        size = A.diagonal().mean()
        A.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(
            A, out=(A, torch.empty((), dtype=torch.int32, device=A.device))
        )
        pivot = factor.diagonal().amin() ** 2 / size
        # Host reads: they decide.
        if int(info) != 0 or not float(pivot) >= smallest_pivot(len(A), self._r.dtype):
            raise np.linalg.LinAlgError("the damped dual equations are singular")
        r = r.to(A.dtype)
        z = torch.cholesky_solve(r[:, None], factor)[:, 0]
        self._last = (factor, r, z, shift)
        return z

    def _secular(self, p: Tensor, d: Tensor) -> Tensor:
        """0-d `q' (A + mu I)^-1 q`, which is `(r - mu z)' (K + mu I)^-1 z`."""
        assert self._last is not None
        factor, r, z, mu = self._last
        return (r - mu * z) @ torch.cholesky_solve(z[:, None], factor)[:, 0]


class MatrixFreeSubproblem(Linearised):
    """Conjugate gradients on `d J'J d + mu`, stopped when the model hardly gains any more.

    The stop is by the decrease of the quadratic model (Nash and Sofer 1990, "Assessing a search
    direction within a truncated-Newton method"): iteration i stops when the last decrease is
    below `tolerance / i` of all so far. Early steps need few products.
    """

    tolerance = 0.5
    most = 200

    def solve(self, mu: float, d: Tensor, start: Tensor | None = None) -> Tensor:
        """Inexact step p (n,)."""
        if start is not None:
            raise NotImplementedError("bounds are not for networks")
        J = self._products
        b = -(d * self.grad)
        q = torch.zeros_like(b)
        residual, direction = b, b
        rr = float(residual @ residual)  # one host read an iteration: it steers the loop
        gained = 0.0
        for i in range(1, self.most + 1):
            if not rr > 0:
                break
            v = d * direction
            Av = d * (J.transposed(J.product(v)).to(d.dtype) + self._decay * v) + mu * direction
            curvature = float(direction @ Av)
            if not curvature > 0:
                raise np.linalg.LinAlgError("the damped system is not positive definite")
            step = rr / curvature
            gain = 0.5 * step * rr
            q = q + step * direction
            residual = residual - step * Av
            gained += gain
            if i * gain <= self.tolerance * gained and i > 1:
                break
            rr, previous = float(residual @ residual), rr
            direction = residual + (rr / previous) * direction
        return d * q
