"""Standard errors, covariance, null directions and profile intervals of a finished fit.

At the solution, with J the Jacobian of the free parameters (m, k) scaled to unit columns,
J = J_h D, and its singular value decomposition J_h = U S V':

    covariance = s2 D^-1 V S^-2 V' D^-1,      s2 = 2 cost / (m - rank)                     (1)

Singular values below `_linalg.negligible` of the largest are zero: their right vectors are the null
directions, along which the data say nothing, and a parameter with a part in one of them has an
infinite standard error. A robust loss gets the sandwich ``H^-1 (J' diag(psi^2) J) H^-1 m / (m -
rank)`` with ``psi = rho' r`` and H the Hessian of the cost in the Gauss-Newton form (P. Huber,
"Robust statistics" (1981), section 6.3). Profile intervals fix one parameter, fit the rest, and
look for the value at which the cost has risen by the quantile (D. Bates, D. Watts, "Nonlinear
regression analysis and its applications" (1988), section 6.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import _qr

#: A parameter with more than this share of a null direction is not determined by the data.
UNDETERMINED = 1e-6
#: Sparse problems of more parameters than this get standard errors, but no covariance matrix.
DENSE_PARAMETERS = 5000


@dataclass(frozen=True)
class Uncertainty:
    """What the curvature at the solution says of the parameters.

    Attributes
    ----------
    covariance : ndarray, shape (n, n)
        Covariance of the parameters; zero rows and columns for those held, infinite entries for
        those that the data do not determine.
    stderr : ndarray, shape (n,)
        Standard errors: the square roots of its diagonal.
    correlation : ndarray, shape (n, n)
        Correlations; zero where a standard error is zero or infinite.
    rank : int
        Numerical rank of the Jacobian of the free parameters.
    null_space : ndarray, shape (n, k - rank)
        Unit directions in parameter space along which the residuals do not change.
    dof : int
        Degrees of freedom, m - rank.
    variance : float
        Residual variance s2 (1 with ``absolute_sigma``).
    held : ndarray of bool, shape (n,)
        Parameters fixed by the caller or pressed against a bound: not estimated.
    """

    covariance: np.ndarray
    stderr: np.ndarray
    correlation: np.ndarray
    rank: int
    null_space: np.ndarray
    dof: int
    variance: float
    held: np.ndarray


@dataclass(frozen=True)
class Curvature:
    """The ingredients: rows or their Gram matrix, and what weighs them.

    rows (m, n) is dense or sparse, or None where only the Gram matrix (n, n) or `Columns` exist.
    With rows already weighted, scores (m,) are psi = rho' r of a robust loss, for the raw rows.
    """

    rows: Any
    gram: np.ndarray | None
    m: int
    cost: float
    held: np.ndarray
    scores: np.ndarray | None = None
    raw_rows: Any = None


class Columns(Protocol):
    """The columns a_j (m,) of rows A (m, n), m < n, which stay where they are."""

    norms: np.ndarray

    def triangle(self, d: np.ndarray) -> np.ndarray:
        """L (m, m) of ``A d = L Q``, where the rows of Q are orthonormal."""
        ...

    def squares(self, B: np.ndarray) -> np.ndarray:
        """``|B a_j|^2`` (n,) for B (k, m)."""
        ...


def of_columns(columns: Columns, c: Curvature, absolute: bool) -> tuple[np.ndarray, int]:
    """Standard errors (n,) and rank of fewer residuals than parameters, without their rows.

    As in (1), with ``V = J_h' U S^-1``: U and S are those of a triangle (m, m), and what is
    wanted of V are sums over its rows. ``c.scores`` are factors of the weighted rows.
    """
    free, epsilon = ~c.held, np.finfo(float).eps
    norms = columns.norms
    d = np.divide(1.0, norms, out=np.zeros_like(norms), where=free & (norms > 0))
    U, s, _ = np.linalg.svd(columns.triangle(d))
    rank = int(np.sum(s > epsilon * max(c.m, np.sum(free)) * s[0]))
    dof = c.m - rank
    unknown = np.where(free, np.inf, 0.0)
    if rank == 0 or (dof == 0 and (c.scores is not None or not absolute)):
        return unknown, rank
    U, s = U[:, :rank], s[:rank]
    B = U.T / s[:, None]
    share = d**2 * columns.squares(B)  # of a parameter that is not in a null direction
    B /= s[:, None]
    variance = 1.0 if absolute else 2.0 * c.cost / dof
    if c.scores is not None:
        B, variance = (c.scores[:, None] * U) @ B, c.m / dof
    errors = d**2 * np.sqrt(variance * columns.squares(B))
    known = 1.0 - share <= max(UNDETERMINED**2, epsilon * c.m * s[0] / s[-1])
    return np.where(free & known, errors, unknown), rank


def uncertainty(c: Curvature, absolute_sigma: bool = False, sandwich: bool = False) -> Uncertainty:
    """Uncertainty of a fit; see the module docstring."""
    n = c.held.shape[0]
    free = np.flatnonzero(~c.held)
    V, s, d = _spectrum(c, free)
    cutoff = _qr.negligible(c.m, free.size, 2.0**-52) * (s.max() if s.size else 0.0)
    if c.rows is None or hasattr(c.rows, "tocsr"):
        cutoff = math.sqrt(np.finfo(float).eps) * (s.max() if s.size else 0.0)
    usable = s > cutoff
    rank = int(usable.sum())
    dof = c.m - rank
    variance = 1.0 if absolute_sigma else (2.0 * c.cost / dof if dof > 0 else math.inf)
    W = (V[:, usable] / s[usable]) * d[:, None]
    inverse, factor = W @ W.T, variance
    if sandwich and c.scores is not None:
        rows, psi = c.raw_rows[:, free], c.scores[:, None]
        P = np.asarray((rows.multiply(psi) if hasattr(rows, "tocsr") else rows * psi) @ inverse)
        inverse, factor = P.T @ P, c.m / dof if dof > 0 else math.inf
    cov = inverse * factor if math.isfinite(factor) else np.full_like(inverse, np.inf)
    null = V[:, ~usable] * d[:, None]
    null = null / np.linalg.norm(null, axis=0) if null.size else null
    undetermined = (np.abs(V[:, ~usable]) > UNDETERMINED).any(axis=1)
    cov[undetermined, :] = np.inf
    cov[:, undetermined] = np.inf
    full = np.zeros((n, n))
    full[np.ix_(free, free)] = cov
    full_null = np.zeros((n, null.shape[1]))
    full_null[free] = null
    stderr = np.sqrt(np.diagonal(full))
    known = np.isfinite(stderr) & (stderr > 0)
    scale = np.where(known, stderr, 1.0)
    correlation = np.where(np.outer(known, known), full, 0.0) / np.outer(scale, scale)
    np.fill_diagonal(correlation, known.astype(float))
    return Uncertainty(full, stderr, correlation, rank, full_null, dof, variance, c.held)


def _spectrum(c: Curvature, free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V (k, k) and s (k,) of the Jacobian with unit columns, and the scales d (k,) that made it."""
    k = free.size
    if k == 0:
        return np.zeros((0, 0)), np.zeros(0), np.zeros(0)
    if c.rows is not None and not hasattr(c.rows, "tocsr"):
        J = np.asarray(c.rows, dtype=float)
        J = J if k == J.shape[1] else J[:, free]
        norms = np.sqrt(np.einsum("ij,ij->j", J, J))
        d = 1.0 / np.where(norms > 0, norms, 1.0)
        R = _qr.triangle(np, J, np.zeros(J.shape[0]), d)[:, :k] if J.shape[0] > k else J * d
        _, s, Vt = np.linalg.svd(R, full_matrices=True)
        return Vt.T, np.concatenate([s, np.zeros(k - s.size)]), d
    G = c.gram if c.rows is None else _sparse_gram(c.rows)
    assert G is not None
    G = np.asarray(G, dtype=float)[np.ix_(free, free)]
    norms = np.sqrt(np.diagonal(G))
    d = 1.0 / np.where(norms > 0, norms, 1.0)
    eigenvalues, V = np.linalg.eigh(G * np.outer(d, d))
    return V, np.sqrt(np.maximum(eigenvalues, 0.0)), d


def _sparse_gram(A: Any) -> np.ndarray:
    """J'J (n, n) of a sparse J, dense."""
    if A.shape[1] > DENSE_PARAMETERS:
        raise ValueError(
            f"a covariance matrix of {A.shape[1]} parameters is too large to form (at most "
            f"{DENSE_PARAMETERS}); ask for `standard_errors()`."
        )
    return np.asarray((A.T @ A).toarray())


def sparse_standard_errors(
    A: Any, held: np.ndarray, variance: float, block: int = 256
) -> np.ndarray:
    """Standard errors (n,) from a sparse factorisation, a block of unit vectors at a time."""
    from scipy.sparse import csc_array, diags_array
    from scipy.sparse.linalg import splu

    free = np.flatnonzero(~held)
    J = csc_array(A)[:, free]
    G = csc_array(J.T @ J)
    norms = np.sqrt(G.diagonal())
    d = 1.0 / np.where(norms > 0, norms, 1.0)
    D = diags_array(d)
    factor = splu(
        (D @ G @ D).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    inverse = np.empty(free.size)
    for start in range(0, free.size, block):
        stop = min(start + block, free.size)
        units = np.zeros((free.size, stop - start))
        units[np.arange(start, stop), np.arange(stop - start)] = 1.0
        solved = factor.solve(units)
        inverse[start:stop] = solved[np.arange(start, stop), np.arange(stop - start)]
    stderr = np.zeros(held.shape[0])
    stderr[free] = np.sqrt(np.maximum(inverse, 0.0) * variance) * d
    return stderr


def profile_interval(
    cost_at: Callable[[int, float, np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    cost: float,
    u: Uncertainty,
    j: int,
    quantile: float,
    lb: float,
    ub: float,
) -> tuple[float, float]:
    """Interval of parameter j in which the profiled cost stays below the quantile.

    ``cost_at(j, value, start)`` fits the others with parameter j held at a value; the signed root
    of its rise is nearly linear in the value, so a secant finds the ends in a few fits. An end
    that a bound cuts off is that bound; one that is never reached is infinite.
    """
    ends = []
    for sign, limit in ((-1.0, lb), (1.0, ub)):
        ends.append(_profile_end(cost_at, x, cost, u, j, quantile, sign, limit))
    return ends[0], ends[1]


def _profile_end(
    cost_at: Callable[[int, float, np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    cost: float,
    u: Uncertainty,
    j: int,
    quantile: float,
    sign: float,
    limit: float,
) -> float:
    """One end of a profile interval."""
    stderr = float(u.stderr[j])
    if not 0.0 < stderr < math.inf:
        return float(x[j]) if stderr == 0.0 else sign * math.inf
    tangent = u.covariance[:, j] / u.covariance[j, j]
    near, far = 0.0, quantile  # in standard errors from x[j]
    root_near, start = 0.0, x
    low, high = 0.0, math.inf
    for _ in range(30):
        value = float(x[j] + sign * far * stderr)
        outside = sign * (value - limit) >= 0.0
        value = limit if outside else value
        far = sign * (value - float(x[j])) / stderr
        guess = start + tangent * (value - start[j])
        profiled, start_new = cost_at(j, value, guess)
        root = math.sqrt(max(2.0 * (profiled - cost), 0.0) / u.variance)
        if abs(root - quantile) <= 1e-6 * quantile:
            return value
        if root < quantile:
            if outside:
                return limit
            low = far
        else:
            high = far
        slope = (root - root_near) / (far - near) if far != near else 1.0
        near, root_near, start = far, root, start_new
        step = (quantile - root) / slope if slope > 0 else far
        far = near + step
        if not low < far < high:
            far = 2.0 * low + quantile if math.isinf(high) else 0.5 * (low + high)
        if far > 1e4 * quantile:
            return sign * math.inf
    return float(x[j] + sign * near * stderr)
