"""Subproblems of sparse Jacobians and of operators, on SciPy.

A sparse J is served by a sparse factorisation of the scaled normal matrix where that stays sparse
(a row with k entries puts k^2 into J'J: the sum over rows is known beforehand). Any other, and an
operator, is only multiplied with: its step is found by conjugate gradients that stop at the edge of
the trust region (T. Steihaug 1983, "The conjugate gradient method and trust regions in large scale
optimization").
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from . import _schur
from ._linalg import LinAlgError
from ._subproblem import Subproblem

#: J'J is formed while it is estimated to hold at most this many entries.
DIRECT_ENTRIES = 30_000_000
#: Relative residual at which conjugate gradients stop: J. Nocedal, S. Wright (2006), eq. 7.3, with
#: a floor that lets a polish reach full accuracy.
FORCING, FINEST = 0.1, 1e-12


def sparse_subproblem(
    J: Any,
    r: np.ndarray,
    weights: np.ndarray | None,
    solver: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    memory: dict[str, Any] | None = None,
) -> Subproblem:
    """Subproblem of a sparse J (m, n): a factorisation where it pays, else conjugate gradients.

    ``memory`` keeps what depends on the pattern alone from one linearisation to the next.
    """
    from scipy.sparse import csr_array, diags_array

    A = csr_array(J)
    if A.dtype != r.dtype:
        A = A.astype(r.dtype)
    if weights is not None:
        A = diags_array(weights) @ A
    if not A.has_canonical_format:  # entries given in several parts count as their sum
        A = A.copy()
        A.sum_duplicates()
    fill = float(np.sum(np.diff(A.indptr).astype(float) ** 2))
    if solver == "lsmr" or (solver is None and fill > DIRECT_ENTRIES):
        norms = np.sqrt(np.asarray(A.multiply(A).sum(axis=0)).ravel())
        return OperatorSubproblem(A, r, norms, **stopping(options))
    return SparseNormalEquations(A, r, {} if memory is None else memory)


def operator_subproblem(
    J: Any,
    r: np.ndarray,
    weights: np.ndarray | None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Subproblem:
    """Subproblem of a LinearOperator J (m, n)."""
    from scipy.sparse.linalg import LinearOperator, aslinearoperator

    A = aslinearoperator(J)
    if weights is not None:
        w = weights
        A = LinearOperator(
            A.shape,
            matvec=lambda p, A=A: w * A.matvec(p).ravel(),
            rmatvec=lambda z, A=A: A.rmatvec(w * z).ravel(),
            dtype=r.dtype,
        )
    return OperatorSubproblem(A, r, None, **stopping(options))


def iterated_subproblem(
    J: np.ndarray, r: np.ndarray, weights: np.ndarray | None, options: Mapping[str, Any]
) -> Subproblem:
    """Subproblem of a dense J (m, n) by iterations, for the caller who asks for them."""
    A = J if weights is None else weights[:, None] * J
    return OperatorSubproblem(A, r, np.sqrt(np.einsum("ij,ij->j", A, A)), **stopping(options))


def stopping(options: Mapping[str, Any]) -> dict[str, Any]:
    """SciPy's options of LSMR as the tolerance and the iterations of conjugate gradients."""
    given = [float(options[name]) for name in ("atol", "btol") if name in options]
    return {"tolerance": max(given) if given else None, "maxiter": options.get("maxiter")}


class SparseNormalEquations:
    """Subproblem by a factorisation of the sparse, scaled, damped normal matrix.

    Blocks are eliminated where the pattern has them (`_schur`); else a sparse LU is ordered to
    stay sparse.
    """

    def __init__(self, A: Any, r: np.ndarray, memory: dict[str, Any]) -> None:
        self._A, self._r = A, r
        self.grad = A.T @ r
        squares = np.bincount(A.indices, A.data * A.data, A.shape[1])
        self.norms: Any = np.sqrt(squares).astype(A.dtype, copy=False)
        self.escalated = False
        self.pivot = 0.0
        self._factor: Any = None
        self._layout = _schur.remembered(A, memory, "layout", _schur.layout)
        self._d: np.ndarray | None = None
        self._scaled: Any = None

    def smallest_pivot(self, d: np.ndarray) -> float:
        """Smallest squared pivot of the scaled normal matrix, 0 if it is not positive definite."""
        try:
            return float(self._factorized(0.0, d).pivot)
        except LinAlgError:
            return 0.0

    def _factorized(self, mu: float, d: np.ndarray) -> Any:
        """Factor of the scaled, damped normal matrix."""
        if self._d is not d:
            self._d, self._scaled = d, self._scale(d)
        if self._layout is not None:
            return _schur.SchurComplement(self._scaled, mu)
        return SparseCholesky(self._scaled, mu)

    def solve(self, mu: float, d: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Step p (n,); see Subproblem."""
        self._factor = self._factorized(mu, d)
        self.pivot = self._factor.pivot
        if not self.pivot > np.finfo(d.dtype).eps:
            raise LinAlgError("the sparse normal equations are not positive definite")
        grad = self.grad if start is None else self.grad + self._A.T @ (self._A @ start)
        return -d * self._factor.solve(d * grad)

    def _scale(self, d: np.ndarray) -> Any:
        """The scaled normal matrix as the factorisation takes it; held columns get a unit."""
        from scipy.sparse import csr_array, diags_array

        A = self._A
        data = A.data * d[A.indices]
        held = None if d.all() else d == 0
        if self._layout is not None:
            return _schur.Eliminated(data, self._layout, held)
        scaled = csr_array((data, A.indices, A.indptr), shape=A.shape)
        gram = scaled.T @ scaled
        return gram if held is None else gram + diags_array(held.astype(d.dtype))

    def secular(self, p: np.ndarray, d: np.ndarray) -> float:
        """``q' (A + mu I)^-1 q`` for the step p of the last solve."""
        q = np.divide(p, d, out=np.zeros_like(p), where=d != 0)
        return float(q @ self._factor.solve(q))

    def reduction(self, p: np.ndarray) -> float:
        """Model decrease; see Subproblem."""
        Jp = self._A @ p
        return -float(self._r @ Jp + 0.5 * (Jp @ Jp))


class SparseCholesky:
    """Factor of M + mu I, M sparse and symmetric, by SuperLU with diagonal pivots."""

    def __init__(self, M: Any, mu: float) -> None:
        from scipy.sparse import diags_array
        from scipy.sparse.linalg import splu

        shift = diags_array(np.full(M.shape[0], mu, dtype=M.dtype))
        try:
            self._lu = splu(
                (M + shift).tocsc(),
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0.0,
                options={"SymmetricMode": True},
            )
        except RuntimeError as error:  # SuperLU's word for an exactly singular matrix
            raise LinAlgError(str(error)) from error
        self.pivot = float(self._lu.U.diagonal().min())

    def solve(self, b: np.ndarray) -> np.ndarray:
        """Solution (n,) of M x = b."""
        return np.asarray(self._lu.solve(b))


class OperatorSubproblem:
    """Subproblem of anything with products A p and A' z, by truncated conjugate gradients.

    A subclass may take the products elsewhere, and vectors of m entries need not be arrays.
    """

    def __init__(
        self,
        A: Any,
        r: Any,
        norms: np.ndarray | None,
        tolerance: float | None = None,
        maxiter: int | None = None,
    ) -> None:
        self._A, self._r = A, r
        self._tolerance, self._maxiter = tolerance, maxiter
        self.grad = self._back(r)
        self.norms = norms
        self.escalated = False
        self.iterations = 0

    def truncated(
        self, radius: float, d: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Step p (n,) with |p / d| <= radius: CG on the normal equations, cut at the radius."""
        return d * self._conjugate_gradients(0.0, radius, d, start)

    def solve(self, mu: float, d: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Step p (n,); see Subproblem."""
        return d * self._conjugate_gradients(mu, np.inf, d, start)

    def reduction(self, p: np.ndarray) -> float:
        """Model decrease; see Subproblem."""
        Jp = self._times(p)
        return -float(self._r @ Jp + 0.5 * (Jp @ Jp))

    def _times(self, p: np.ndarray) -> Any:
        """A p (m,)."""
        return np.asarray(self._A @ p).ravel()

    def _back(self, z: Any) -> np.ndarray:
        """A' z (n,)."""
        A = self._A
        return np.asarray((A.H if hasattr(A, "rmatvec") else A.T) @ z).ravel()

    def _size(self, z: Any) -> float:
        """|z|; unlike z'z it does not overflow."""
        return float(np.linalg.norm(z))

    def _conjugate_gradients(
        self, mu: float, radius: float, d: np.ndarray, start: np.ndarray | None
    ) -> np.ndarray:
        """q (n,) by CGLS (Bjorck 1996, "Numerical Methods for Least Squares Problems", 7.4)."""
        z = self._r if start is None else self._r + self._times(start)
        size = self._size(z)
        if size == 0.0 or not np.isfinite(size):
            return np.zeros_like(d)
        z, radius = (-1.0 / size) * z, radius / size
        s = d * self._back(z)
        q, v = np.zeros_like(s), s.copy()
        gamma = first = float(s @ s)
        if first == 0.0 or not np.isfinite(first):
            return q
        rnorm2 = float(z @ z)
        tolerance = self._tolerance
        if tolerance is None:
            tolerance = max(FINEST, min(FORCING, np.sqrt(first / rnorm2) if rnorm2 else 0.0) ** 2)
        steepest, rounding = 0.0, (8.0 * float(np.finfo(q.dtype).eps)) ** 2
        limit = 2 * q.shape[0] + 20 if self._maxiter is None else self._maxiter + 1
        for self.iterations in range(1, limit):
            w = self._times(d * v)
            v2 = float(v @ v)
            curvature = float(w @ w) + mu * v2
            steepest = max(steepest, curvature / v2)
            if curvature <= rounding * steepest * v2:
                break
            alpha = gamma / curvature
            longer = q + alpha * v
            if float(longer @ longer) >= radius * radius:
                return size * (q + _to_boundary(q, v, radius) * v)
            q = longer
            z = z + (-alpha) * w
            s = d * self._back(z) - mu * q
            new = float(s @ s)
            if new <= max(tolerance**2 * first, rounding * steepest * float(z @ z)):
                break
            v = s + (new / gamma) * v
            gamma = new
        return size * q


def _to_boundary(q: np.ndarray, v: np.ndarray, radius: float) -> float:
    """The positive t with |q + t v| = radius."""
    a, b, c = float(v @ v), float(q @ v), float(q @ q) - radius * radius
    root = np.sqrt(max(b * b - a * c, 0.0))
    return float(-c / (b + root)) if b > 0 else float((root - b) / a)
