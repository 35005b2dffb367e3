"""The linearised problem by QR of its rows: full accuracy, any shape, any rank.

This is the form that the others of `_subproblem` go over to where they lose too many digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _linalg, _qr
from ._xp import Array, Namespace, eps

#: A smaller squared pivot of the scaled normal matrix sends a problem to QR: normal equations
#: lose about eps / pivot of the step, 2e-8 of it at this pivot.
ESCALATE = 1e-8
#: Where the memory of a problem holds that its last step was ill-conditioned.
ILL = "ill-conditioned"


@dataclass(slots=True)
class Rows:
    """J (m, n) as the user gave it, with the weights (m,) of a robust loss, if any.

    ``r`` (m,) are the residuals that go with the weighted rows.
    """

    xp: Namespace
    J: Array
    r: Array
    weights: Array | None = None

    def matvec(self, p: Array) -> Array:
        """Weighted J p (m,)."""
        Jp = self.J @ p
        return Jp if self.weights is None else self.weights * Jp

    def rmatvec(self, u: Array) -> Array:
        """Weighted J'u (n,)."""
        return self.J.T @ (u if self.weights is None else self.weights * u)

    def weighted(self) -> Array:
        """The weighted Jacobian, a copy if there are weights."""
        return self.J if self.weights is None else self.J * self.weights[:, None]

    def shifted(self, start: Array | None) -> Array:
        """Residuals (m,) of the linear model at ``start``."""
        return self.r if start is None else self.r + self.matvec(start)


class Factored:
    """Subproblem by QR of the rows.

    Steps of full rank come from a triangle, in NumPy, all others from singular values, which take
    longer than the triangle at n = 1000. ``escalated`` is whether the last one asked for all this.
    """

    def __init__(
        self,
        xp: Namespace,
        rows: Rows,
        grad: Array,
        norms: Array,
        memory: dict[str, Any] | None = None,
    ) -> None:
        self._xp = xp
        self._rows = rows
        self._memory = {} if memory is None else memory
        self.escalated = True
        self.grad = grad
        self.norms = norms
        self._d: Array | None = None
        self._start: Array | None = None
        self._triangle: Array = None  # (k, n + 1), of [J d, r]
        self._regular: np.ndarray | None = None  # the same, where it has full rank
        self._damped: np.ndarray | None = None  # that of the last solve
        self._svd: tuple[Array, Array, Array] | None = None
        self._mu = 0.0

    def solve(self, mu: float, d: Array, start: Array | None = None) -> Array:
        """Step p (n,), of minimum norm at mu = 0; see Subproblem."""
        if self._d is not d or self._start is not start:
            self._factorize(d, start)
        self._mu, pivot = mu, mu
        n, R = d.shape[0], self._regular
        if R is not None:
            if mu:
                R = _qr.with_diagonal(R, np.full(n, np.sqrt(mu)))
            self._damped = R
            pivot = float(np.abs(R.diagonal()[:n]).min()) ** 2
        self.escalated = self._memory[ILL] = pivot < ESCALATE
        if R is None:
            return -d * (self._singular()[2] @ self._filtered(mu))
        return -d * _qr.back_substituted(R[:n, :n], R[:n, n])

    def secular(self, p: Array, d: Array) -> Array:
        """0-d ``q' (A + mu I)^-1 q`` over the numerical range."""
        with np.errstate(over="ignore"):  # an infinite slope leaves mu as it is
            if self._damped is not None:
                n, q = d.shape[0], unscale(self._xp, p, d)
                w = _qr.back_substituted(self._damped[:n, :n], q, transposed=True)
                return w @ w
            s = self._singular()[1]
            f = self._filtered(self._mu)
            return xp_sum_where(self._xp, s > self._cutoff(s), f * f, s * s + self._mu)

    def reduction(self, p: Array) -> Array:
        """0-d model decrease; see Subproblem."""
        Jp = self._rows.matvec(p)
        return -(self._rows.r @ Jp + 0.5 * (Jp @ Jp))

    def rank(self) -> int | None:
        """Numerical rank of J d."""
        if self._d is None:
            return None
        if self._regular is not None:
            return int(np.count_nonzero(self._d))
        s = self._singular()[1]
        return int(self._xp.sum(self._xp.astype(s > self._cutoff(s), s.dtype)))

    def _factorize(self, d: Array, start: Array | None) -> None:
        rows, xp = self._rows, self._xp
        m, n = rows.J.shape
        r = rows.shifted(start)
        make = _qr.triangle if m >= n else _qr.augmented
        self._triangle = make(xp, rows.J, r, d, rows.weights)
        self._regular = self._damped = self._svd = None
        if xp is np and m >= n:
            # A unit below a held column keeps its parameter at zero.
            R = self._triangle if d.all() else _qr.with_diagonal(self._triangle, d == 0)
            if _qr.has_full_rank(R[:n, :n], self._negligible(R.dtype)):
                self._regular = R
        self._d, self._start = d, start

    def _singular(self) -> tuple[Array, Array, Array]:
        """U'c, the singular values s, and V, of R = U s V'."""
        if self._svd is None:
            R, c = self._triangle[:, :-1], self._triangle[:, -1]
            U, s, Vt = _linalg.svd(self._xp, R)
            self._svd = (U.T @ c, s, Vt.T)
        return self._svd

    def _cutoff(self, s: Array) -> Array:
        """Singular values below this are zero to working accuracy."""
        return self._negligible(s.dtype) * self._xp.max(s)

    def _negligible(self, dtype: Any) -> float:
        m, n = self._rows.J.shape
        return _qr.negligible(m, n, eps(self._xp, dtype))

    def _filtered(self, mu: float) -> Array:
        """``s / (s^2 + mu) * c`` (k,), zero on the numerical null space."""
        xp = self._xp
        c, s, _ = self._singular()
        usable = s > self._cutoff(s)
        safe = xp.where(usable, s, xp.ones_like(s))
        return xp.where(usable, c * (safe / (safe * safe + mu)), xp.zeros_like(s))


def xp_sum_where(xp: Namespace, mask: Array, numerator: Array, denominator: Array) -> Array:
    """0-d sum of ``numerator / denominator`` where the mask holds."""
    one = xp.ones_like(denominator)
    zero = xp.zeros_like(numerator)
    return xp.sum(xp.where(mask, numerator / xp.where(mask, denominator, one), zero))


def unscale(xp: Namespace, p: Array, d: Array) -> Array:
    """q = p / d (n,), zero where d is."""
    if xp is np:
        return p / d if d.all() else np.divide(p, d, out=np.zeros_like(p), where=d != 0)
    zero = d == 0
    return p / xp.where(zero, xp.ones_like(d), d)
