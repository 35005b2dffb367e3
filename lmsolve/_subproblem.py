"""The linearised problem at one point, and its damped step: the linear algebra of the solver.

At an accepted x, with J = J(x) (m, n), r = r(x) (m,) and column scales d (n,), a subproblem
answers, for any damping mu,

    min_q  1/2 |J d q + r|^2 + 1/2 mu |q|^2,      p = d * q.                            (1)

Dense forms that give the same p:

    NormalEquations   (d J'J d + mu I) q = -d J'r        tall J; only J'J and J'r are needed
    PackedEquations   the same, without J'J              large J that is not very tall
    DualEquations     ((J d)(J d)' + mu I) z = r,  q = -(J d)' z                 wide J, m < n
    Factored          [R; sqrt(mu) I] q = -[Q'r; 0], J d = Q R, again by QR; at lower rank
                      q = -V (s / (s^2 + mu)) U'r from the SVD of R

The first squares the condition number of J d. Scaling keeps that harmless for most problems; the
smallest pivot of the Cholesky factor tells when it is not, and then the rows of J are factored
once by QR and every further mu is served by the last form (`_factored`). So is the next x, without
J'J, as long as R's own pivots ask for it. At mu = 0 that form gives the minimum-norm step of lower
rank.

A zero in d holds a parameter: its column vanishes and so does its step. A parameter that moves by
a given amount enters as ``start``: (1) is then solved with r + J start in place of r.

References: J. Nocedal, S. Wright, "Numerical Optimization" (2006), section 10.3; J. J. More
(1978), "The Levenberg-Marquardt algorithm: implementation and theory".
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from . import _linalg
from ._factored import ESCALATE, ILL, Factored, Rows, unscale
from ._linalg import Cholesky, LinAlgError
from ._packed import MOST, PackedCholesky
from ._xp import Array, Namespace, diagonal

#: From so many parameters on J'J and its factor share one array, and SciPy's LAPACK factors it in
#: place (see _linalg.THREADED: the wait counts for less than the two copies that NumPy's makes).
LARGE = 1500
#: J'J of so many parameters, and of this part of J's memory, is not formed (see _packed) as long as
#: the memory of a problem does not hold that single precision was too coarse for it.
HEAVY, COARSE = 0.2, "coarse"


class Subproblem(Protocol):
    """What the solver asks of a linearisation; p and d are (n,), scalars 0-d arrays or floats."""

    grad: Array
    norms: Array | None
    escalated: bool

    def solve(self, mu: float, d: Array, start: Array | None = None) -> Array:
        """Step p of (1); LinAlgError where the damped system is not positive definite."""
        ...

    def reduction(self, p: Array) -> Array:
        """Decrease of the model ``-(g'p + |J p|^2 / 2)`` by any step p, optimal or not."""
        ...


def gram(xp: Namespace, rows: Rows) -> tuple[Array, Array]:
    """J'J (n, n) and J'r (n,) of weighted rows; a weighted copy exists one block at a time."""
    J, r, w = rows.J, rows.r, rows.weights
    if w is None:
        if xp is np:
            with np.errstate(over="ignore", invalid="ignore"):  # the run ends, and says why
                return J.T.dot(J), J.T.dot(r)
        return xp.matmul(J.T, J), J.T @ r
    m, n = J.shape
    if xp is np and n >= LARGE:
        with np.errstate(over="ignore", invalid="ignore"):
            return _linalg.weighted_gram(J, w), J.T.dot(w * r)
    block = max(1024, 2**20 // max(n, 1))
    G = g = None
    for i in range(0, m, block):
        k = min(i + block, m)  # the standard leaves slices beyond the end undefined
        B = J[i:k, :] * w[i:k, None]
        Gi, gi = xp.matmul(B.T, B), B.T @ r[i:k]
        if G is None:
            G, g = Gi, gi
        elif xp is np:
            G += Gi
            g += gi
        else:
            G, g = G + Gi, g + gi
        del B, Gi  # before the next are made
    assert G is not None
    return G, g


class NormalEquations:
    """Subproblem of a tall J from the sums J'J (n, n) and J'r (n,); J itself is optional.

    With ``rows`` it goes over to QR when the normal matrix turns out ill-conditioned.
    """

    def __init__(
        self,
        xp: Namespace,
        gram: Array,
        grad: Array,
        rows: Rows | None = None,
        norms: Array | None = None,
        memory: dict[str, Any] | None = None,
    ) -> None:
        self.grad = grad
        self.norms = xp.sqrt(diagonal(xp, gram)) if norms is None else norms
        self.escalated = False
        self.pivot = 0.0
        self._xp = xp
        self._gram = gram
        self._by: Array | None = None  # the scales (n,) that ``_gram`` is multiplied with
        self._halves: _linalg.Halves | None = None  # what ``_gram`` becomes if it is large
        self._rows = rows
        self._memory = memory
        self._d: Array | None = None
        self._scaled: Array | None = None
        self._factor: Any = None  # a Cholesky, or what a subclass makes of one
        self._refined: Factored | None = None

    @property
    def gram(self) -> Array:
        """J'J (n, n); made anew where something else has taken its memory."""
        if self._halves is not None:
            return self._halves.matrix()
        if self._by is None:
            return self._gram
        return _linalg.spd_matrix(self._xp, self._gram, 1.0 / self._by)

    def _times_gram(self, p: Array) -> Array:
        """J'J p (n,)."""
        if self._halves is not None:
            return self._halves.product(p)
        if self._by is None:
            return self._gram @ p
        return self._gram @ (p / self._by) / self._by

    def smallest_pivot(self, d: Array) -> float:
        """Smallest squared pivot of the scaled normal matrix, 0 if it is not positive definite."""
        self._factor = None  # whose memory may be needed
        try:
            return float(self._factored(0.0, d).pivot)
        except LinAlgError:
            return 0.0

    def solve(self, mu: float, d: Array, start: Array | None = None) -> Array:
        """Step p (n,); see Subproblem."""
        if self._refined is not None:
            return self._refined_step(mu, d, start)
        self._factor = None  # before its memory is needed again
        try:
            self._factor = self._factored(mu, d)
        except LinAlgError:
            return self._refined_step(mu, d, start)
        if self._factor.pivot < ESCALATE and self._rows is not None:
            return self._refined_step(mu, d, start)
        self.pivot = self._factor.pivot
        grad = self.grad if start is None else self.grad + self._times_gram(start)
        return -d * self._factor.solve(d * grad)

    def _factored(self, mu: float, d: Array) -> Any:
        """Factor of the scaled normal matrix with mu on its diagonal."""
        xp, n = self._xp, d.shape[0]
        if xp is not np or n < _linalg.THREADED:
            if self._d is not d:
                self._d, self._scaled = d, _held_diagonal(xp, self._gram, d)
            A = _linalg.add_diagonal(xp, self._scaled, mu) if mu else self._scaled
            return self._cholesky(A, overwrite=bool(mu))
        if self._shares_memory(n):
            if self._halves is None:
                self._halves, self._gram = _linalg.Halves(self._gram), None
            return Cholesky(xp, self._halves.scaled(d, mu), overwrite=True)
        if n >= LARGE or not d.all():
            A = _held_diagonal(xp, self.gram, d)
            A.ravel()[:: n + 1] += mu
            return self._cholesky(A, overwrite=n >= LARGE)
        self._scale_in_place(d)
        diagonal = np.einsum("ii->i", self._gram)  # a view
        undamped = diagonal.copy()
        diagonal += mu
        try:
            return self._cholesky(self._gram, overwrite=False)
        finally:
            diagonal[...] = undamped

    def _shares_memory(self, n: int) -> bool:
        """Whether J'J and its factor are to share an array."""
        return n >= LARGE

    def _scale_in_place(self, d: np.ndarray) -> None:
        """Turn J'J into the scaled matrix: at this size another one is a cost."""
        if self._by is not d:
            factor = d if self._by is None else d / self._by
            self._gram *= factor
            self._gram *= factor[:, None]
            self._by = d

    def secular(self, p: Array, d: Array) -> Array:
        """0-d ``q' (A + mu I)^-1 q`` for the step p of the last solve."""
        if self._refined is not None:
            return self._refined.secular(p, d)
        assert self._factor is not None
        q = unscale(self._xp, p, d)
        return q @ self._factor.solve(q)

    def reduction(self, p: Array) -> Array:
        """0-d model decrease; see Subproblem."""
        if self._rows is not None and self._refined is not None:
            Jp = self._rows.matvec(p)
            return -(self._rows.r @ Jp + 0.5 * (Jp @ Jp))
        return -(self.grad @ p + 0.5 * (p @ self._times_gram(p)))

    def rank(self) -> int | None:
        """Numerical rank of J d, where the last solve knows it."""
        return None if self._refined is None else self._refined.rank()

    def _cholesky(self, A: Array, overwrite: bool) -> Any:
        """Factor of the damped matrix."""
        return Cholesky(self._xp, A, overwrite=overwrite)

    def _refined_step(self, mu: float, d: Array, start: Array | None) -> Array:
        """Step p (n,) of the QR form, if the rows are there to form it."""
        if self._refined is None:
            if self._rows is None:
                raise LinAlgError("the normal equations are not positive definite")
            self._refined = Factored(self._xp, self._rows, self.grad, self.norms, self._memory)
        p = self._refined.solve(mu, d, start)
        self.escalated = self._refined.escalated
        return p


class PackedEquations(NormalEquations):
    """Subproblem of a large J that is not very tall, without J'J while single precision will do."""

    def __init__(self, rows: Rows, memory: dict[str, Any]) -> None:
        grad, norms = _gradient(rows)
        super().__init__(np, None, grad, rows, norms, memory)
        self._packed = True

    @property
    def gram(self) -> np.ndarray:
        """J'J (n, n), formed if it was not."""
        assert self._rows is not None
        return gram(np, self._rows)[0] if self._packed else super().gram

    def solve(self, mu: float, d: Array, start: Array | None = None) -> Array:
        """Step p (n,); see Subproblem."""
        try:
            return super().solve(mu, d, start)
        except LinAlgError:
            if not self._packed:
                raise
            self._unpack()
            return super().solve(mu, d, start)

    def secular(self, p: Array, d: Array) -> Array:
        """See NormalEquations. A slope for Newton's method: the digits of the factor will do.

        To solve for all of them may fail where the last solve did not.
        """
        if not self._packed or self._refined is not None:
            return super().secular(p, d)
        q = unscale(np, p, d)
        return q @ self._factor.roughly(q)

    def _factored(self, mu: float, d: Array) -> Any:
        if self._packed:
            assert self._rows is not None
            try:
                return PackedCholesky(self._rows.J, self._rows.weights, d, mu)
            except LinAlgError:
                self._unpack()
        return super()._factored(mu, d)

    def _unpack(self) -> None:
        """Go over to J'J, and stay with it in this problem."""
        assert self._memory is not None
        self._memory[COARSE] = True
        self._gram, self._packed, self._factor = self.gram, False, None

    def _times_gram(self, p: Array) -> Array:
        if not self._packed:
            return super()._times_gram(p)
        assert self._rows is not None
        return self._rows.rmatvec(self._rows.matvec(p))


class DualEquations:
    """Subproblem of a wide J (m < n), solved in the m-dimensional space of residuals."""

    def __init__(self, xp: Namespace, rows: Rows) -> None:
        self._xp = xp
        self._rows = rows
        J = rows.weighted()
        self._J = J
        self.grad = J.T @ rows.r
        self.norms = xp.sqrt(xp.sum(J * J, axis=0))
        self.escalated = False
        self._d: Array | None = None
        self._kernel: Array | None = None
        self._last: tuple[Array, Array, float] | None = None
        self._factor: Cholesky | None = None
        self._refined: Factored | None = None

    def solve(self, mu: float, d: Array, start: Array | None = None) -> Array:
        """Step p (n,); see Subproblem."""
        if self._refined is not None:
            return self._refined.solve(mu, d, start)
        xp = self._xp
        if self._d is not d:
            scaled = self._J * d[None, :]
            self._d, self._kernel = d, xp.matmul(scaled, scaled.T)
        K = _linalg.add_diagonal(xp, self._kernel, mu)
        try:
            # K is not scaled to a unit diagonal: its pivot counts against its largest entry.
            self._factor = Cholesky(xp, K)
            largest = float(xp.max(diagonal(xp, self._kernel)))
            if self._factor.pivot < ESCALATE * largest:
                raise LinAlgError("the dual equations are ill-conditioned")
        except LinAlgError:
            self.escalated = True
            self._refined = Factored(xp, self._rows, self.grad, self.norms)
            return self._refined.solve(mu, d, start)
        r = self._rows.shifted(start)
        z = self._factor.solve(r)
        self._last = (r, z, mu)
        return -d * (d * (self._J.T @ z))

    def secular(self, p: Array, d: Array) -> Array:
        """0-d ``q' (A + mu I)^-1 q``: with ``(K + mu I) z = r``, ``(r - mu z)'(K + mu I)^-1 z``."""
        if self._refined is not None:
            return self._refined.secular(p, d)
        assert self._last is not None and self._factor is not None
        r, z, mu = self._last
        return (r - mu * z) @ self._factor.solve(z)

    def reduction(self, p: Array) -> Array:
        """0-d model decrease; see Subproblem."""
        Jp = self._J @ p
        return -(self._rows.r @ Jp + 0.5 * (Jp @ Jp))

    def rank(self) -> int | None:
        """Numerical rank of J d, where the last solve knows it."""
        return None if self._refined is None else self._refined.rank()


def _held_diagonal(xp: Namespace, gram: Array, d: Array) -> Array:
    """``d gram d`` with a unit on the diagonal where d is zero, so that held columns factor."""
    A = _linalg.spd_matrix(xp, gram, d)
    if xp is np:
        if not d.all():
            A.ravel()[:: A.shape[0] + 1] += d == 0
        return A
    held = xp.astype(d == 0, A.dtype)
    return A + held[:, None] * _linalg.identity(xp, A)


def dense_subproblem(
    xp: Namespace,
    J: Array,
    r: Array,
    weights: Array | None = None,
    memory: dict[str, Any] | None = None,
) -> NormalEquations | DualEquations | Factored:
    """Subproblem of a dense J (m, n): normal equations if tall, their dual if wide.

    QR of tall rows at once, which saves J'J, where the last step by this memory needed that.
    """
    rows = Rows(xp, J, r, weights)
    if J.shape[0] < J.shape[1]:
        return DualEquations(xp, rows)
    if xp is np and memory is not None and memory.get(ILL):
        with np.errstate(over="ignore", invalid="ignore"):
            return Factored(xp, rows, *_gradient(rows), memory)
    if xp is np and memory is not None and _is_heavy(J) and not memory.get(COARSE):
        with np.errstate(over="ignore", invalid="ignore"):
            return PackedEquations(rows, memory)
    G, g = gram(xp, rows)
    return NormalEquations(xp, G, g, rows, memory=memory)


def _is_heavy(J: np.ndarray) -> bool:
    """Whether J'J is large, and large beside J (m, n)."""
    m, n = J.shape
    return LARGE <= n <= MOST and n > HEAVY * m and J.dtype == np.float64


def _gradient(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """J'r and the column norms (n,) of weighted rows of NumPy."""
    J, r, w = rows.J, rows.r, rows.weights
    if w is None:
        return J.T.dot(r), np.sqrt(np.einsum("ij,ij->j", J, J))
    return J.T.dot(w * r), np.sqrt(np.einsum("ij,ij,i->j", J, J, w * w))
