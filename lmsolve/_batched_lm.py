"""One Levenberg-Marquardt loop for many independent fits of one shape, side by side.

All fits of the working set advance together, one trial each per turn. Symbols, for b fits of n
parameters and m residuals, with the fits on the last axis of everything small, so that each
operation runs over b contiguous numbers:

    x (n, b), f (b, m)      parameters, model values (the residuals are a function of f)
    gram (n, n, b), grad (n, b)     J'J and J'r of the residuals after weights and loss
    scale s (n, b)          running maximum of the column norms of J; d = free / s
    mu, nu (b,)             damping and the factor of the next rejection

Each turn solves (d J'J d + mu I) q = -d J'r and tries clip(x + d q) for every fit. Parameters at
a bound that the gradient pushes outwards have d = 0. A fit ends when one of these holds:

    gtol    max_j |grad_j| d_j <= gtol |r|
    ftol    the predicted reduction and the change of the cost are both <= ftol cost
    xtol    |p_j| s_j <= xtol (|x_j| s_j + |r|) for every j

with |r| = sqrt(2 cost). Where the predicted reduction is below the rounding error of the cost,
the cost decides nothing, and the step is taken as it is. Fits that have ended leave the working
set and waiting ones take their places, so that a few slow fits hold up no others.

References: Nielsen (1999), "Damping parameter in Marquardt's method", the damping; More (1978),
"The Levenberg-Marquardt algorithm", the running maximum; Kanzow, Yamashita, Fukushima (2004),
"Levenberg-Marquardt methods ... with convex constraints", the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from ._batched_model import Derivative, Model, device_of, rows_of
from ._xp import Array, Namespace, eps, to_floats

RUNNING = -10  # internal: the fit has not ended
NOT_FINITE, STALLED = -3, -4
MU_FIRST = 1e-2  # relative to the diagonal of J'J
# Factors of mu by the gain ratio, above 0.75, above 0.25 and below (More 1978 and Nielsen 1999
# change a radius and mu by less), and after a rejection: of twelve triples measured on five kinds
# of curves, the one with no failures and within 7 % of the fewest trials on four of them.
MU_SHRINK, MU_KEEP, MU_DOUBT, MU_GROW = 0.1, 0.5, 2.0, 5.0
RATIO_ACCEPTED = 1e-4  # More 1978, section 7
REFILL_BELOW = 0.75  # share of the working set that still runs when it is filled up again


class Limits(NamedTuple):
    """Tolerances, and the number of trials after which a fit is given up."""

    ftol: float
    xtol: float
    gtol: float
    max_nit: int


@dataclass(frozen=True)
class Fits:
    """State of fits; `axis` is the one that counts them."""

    index: Array = field(metadata={"axis": 0})
    x: Array = field(metadata={"axis": 1})
    cost: Array = field(metadata={"axis": 0})
    gram: Array = field(metadata={"axis": 2})
    grad: Array = field(metadata={"axis": 1})
    scale: Array = field(metadata={"axis": 1})
    d: Array = field(metadata={"axis": 1})
    mu: Array = field(metadata={"axis": 0})
    last: Array = field(metadata={"axis": 0})
    y_size: Array = field(metadata={"axis": 0})
    status: Array = field(metadata={"axis": 0})
    nit: Array = field(metadata={"axis": 0})
    nfev: Array = field(metadata={"axis": 0})
    njev: Array = field(metadata={"axis": 0})


AXES = {k.name: int(k.metadata["axis"]) for k in fields(Fits)}


def take(xp: Namespace, fits: Fits, index: Array) -> Fits:
    """The fits at `index`."""
    return Fits(**{k: xp.take(getattr(fits, k), index, axis=axis) for k, axis in AXES.items()})


def join(xp: Namespace, parts: list[Fits]) -> Fits:
    """The fits of all parts, one part after the other."""
    return Fits(**{k: xp.concat([getattr(p, k) for p in parts], axis=a) for k, a in AXES.items()})


def fresh(xp: Namespace, x: Array, index: Array) -> Fits:
    """Fits at the starting points x (n, b), nothing evaluated yet."""
    n = x.shape[0]
    zero = xp.zeros_like(x[0, :])
    none = xp.zeros_like(index)
    return Fits(
        index=index,
        x=x,
        cost=zero,
        gram=xp.stack([xp.zeros_like(x)] * n),
        grad=xp.zeros_like(x),
        scale=xp.zeros_like(x),
        d=xp.zeros_like(x),
        mu=zero + MU_FIRST,
        last=zero,
        y_size=zero,
        status=none + RUNNING,
        nit=none,
        nfev=none,
        njev=none,
    )


def solve_spd(xp: Namespace, A: Array, b: Array, damp: Array) -> tuple[Array, list[Array]]:
    """Solutions (n, k, b) of (A + diag(damp)) p = b for A (n, n, b), and the pivots (b,).

    Elimination without pivoting, stable for positive definite matrices: 3 n calls for all fits
    together, and a singular matrix stops no other fit.
    """
    n, k = b.shape[0], b.shape[1]
    S = xp.concat([A, b], axis=1)
    pivots, rows = [], []
    for j in range(n):
        pivot, row = S[0, 0, :] + damp[j, :], S[0, 1:, :]
        pivots.append(pivot)
        rows.append(row)
        if j < n - 1:
            S = S[1:, 1:, :] - (S[1:, 0, :] / pivot)[:, None, :] * row[None, :, :]
    p: list[Array] = []
    for pivot, row in zip(pivots[::-1], rows[::-1]):
        rest = row[row.shape[0] - k :, :]
        for i, p_i in enumerate(p):
            rest = rest - row[i, :] * p_i
        p.insert(0, rest / pivot)
    return xp.stack(p), pivots


def diagonal(xp: Namespace, A: Array) -> Array:
    """Diagonals (n, b) of A (n, n, b)."""
    return xp.stack([A[j, j, :] for j in range(A.shape[0])])


def invert(xp: Namespace, A: Array) -> tuple[Array, Array]:
    """Inverses (n, n, b) of positive definite A (n, n, b), and where they exist (b,)."""
    n = A.shape[0]
    squares = diagonal(xp, A)
    s = xp.sqrt(xp.where(squares > 0, squares, 1.0))
    ss = s[:, None, :] * s[None, :, :]
    one, zero = xp.ones_like(s[0, :]), xp.zeros_like(s[0, :])
    unit = xp.stack([xp.stack([one if i == j else zero for j in range(n)]) for i in range(n)])
    inverse, pivots = solve_spd(xp, A / ss, unit, xp.zeros_like(s))
    least = xp.min(xp.stack(pivots), axis=0)  # of a matrix with ones on its diagonal
    return inverse / ss, least > 4 * n * eps(xp, A.dtype)


class Loop:
    """The loop: a model, its derivative, limits, and the width of the working set."""

    def __init__(
        self, xp: Namespace, model: Model, derivative: Derivative, limits: Limits, width: int
    ) -> None:
        self.xp, self.model, self.derivative = xp, model, derivative
        self.limits, self.width = limits, width

    def run(self, waiting: Fits, ended: Callable[[int], Any]) -> Fits:
        """The fits of `waiting` brought to their ends; `ended(k)` hears of every k that are."""
        xp, total = self.xp, waiting.index.shape[0]
        done: list[Fits] = []
        entered = min(self.width, total)
        fits, f, model = self._enter(waiting, 0, entered)
        while True:
            fits, f_new, accepted = self._turn(fits, f, model)
            running = fits.status == RUNNING
            b, kind = running.shape[0], fits.cost.dtype
            k, moved = to_floats(*[xp.sum(xp.astype(a, kind)) for a in (running, accepted)])
            f = f_new if moved == b else xp.where(accepted[:, None], f_new, f)
            left = int(k)
            if left > REFILL_BELOW * b:
                continue
            # Sorted by whether they run instead of picked by a mask: the host knows all shapes.
            order = xp.argsort(xp.astype(running, fits.index.dtype), stable=True)
            out, stay = order[: b - left], order[b - left :]
            done.append(take(xp, fits, out))
            ended(b - left)
            more = min(self.width - left, total - entered)
            if left == 0 and more == 0:
                return join(xp, done)
            fits, f = take(xp, fits, stay), xp.take(f, stay, axis=0)
            if more:
                new, f_new, _ = self._enter(waiting, entered, entered + more)
                fits, f = join(xp, [fits, new]), xp.concat([f, f_new], axis=0)
                entered += more
            model = self.model.at(xp, fits.index)

    def _enter(self, waiting: Fits, start: int, stop: int) -> tuple[Fits, Array, Model]:
        """Fits start..stop of the queue, their model values and their model."""
        xp = self.xp
        fits = take(
            xp,
            waiting,
            xp.arange(start, stop, dtype=waiting.index.dtype, **device_of(waiting.index)),
        )
        model = self.model.at(xp, fits.index)
        f = model.values(xp, rows_of(fits.x))
        cost = model.cost(xp, model.residual(xp, f))
        status = xp.where(xp.isfinite(cost), fits.status, NOT_FINITE)
        norm_r = xp.sqrt(2 * cost)
        # Differences start from steps relative to |x|, and to 1 where x is 0.
        bare = (fits.x == 0) & (fits.scale == 0) & (norm_r > 0)
        d = xp.where(bare, 1 / norm_r, fits.d)
        y_size = model.y_size(xp, f)
        fits = replace(fits, cost=cost, status=status, d=d, y_size=y_size, nfev=fits.nfev + 1)
        return fits, f, model

    def _turn(self, fits: Fits, f: Array, model: Model) -> tuple[Fits, Array, Array]:
        """One linearisation and one trial for every fit: fits, values at the trial, who moved."""
        xp, x, running = self.xp, fits.x, fits.status == RUNNING
        norm_r = xp.sqrt(2 * fits.cost)
        # A parameter at zero has its size from what it does to the model.
        size = xp.abs(x) + xp.maximum(norm_r, 0.01 * fits.y_size) * fits.d
        gram, grad = model.normal(xp, f, *self.derivative(xp, model, x, f, size))
        scale = xp.maximum(fits.scale, xp.sqrt(diagonal(xp, gram)))
        fits = replace(
            fits,
            gram=xp.where(running, gram, fits.gram),
            grad=xp.where(running, grad, fits.grad),
            scale=xp.where(running, scale, fits.scale),
            d=xp.where(running & (scale > 0), 1 / scale, fits.d),
        )
        x_new, p, reduction, slope = self._trial(fits, model)
        f_new = model.values(xp, rows_of(x_new))
        cost_new = model.cost(xp, model.residual(xp, f_new))

        cosine = xp.max(xp.abs(slope) * fits.d, axis=0)
        at_minimum = (cosine <= self.limits.gtol * norm_r) | (
            norm_r <= 8 * eps(xp, x.dtype) * fits.y_size
        )
        going = running & ~at_minimum
        change = fits.cost - cost_new
        # A step that damping has shortened says nothing about convergence.
        full = fits.mu <= 1
        accepted, f_met = self._judge(fits.cost, change, reduction, full)
        accepted = accepted & going
        moved = xp.max(xp.abs(p) / size, axis=0)
        ratio = change / reduction
        good = accepted & (ratio > 0.25)
        mu = fits.mu
        eased = xp.where(ratio > 0.75, MU_SHRINK * mu, MU_KEEP * mu)
        mu_new = xp.where(accepted, xp.where(good, eased, MU_DOUBT * mu), MU_GROW * mu)
        turn, trial = [xp.astype(a, fits.nit.dtype) for a in (running, going)]
        nit = fits.nit + trial
        status = xp.where(going & (nit >= self.limits.max_nit), 0, fits.status)
        stuck = going & ~accepted & ~(moved > eps(xp, x.dtype))
        status = xp.where(stuck, STALLED, status)
        level = cosine <= eps(xp, x.dtype) ** (1 / 3) * norm_r
        status = xp.where(stuck & level, 2, status)
        xtol = self.limits.xtol
        x_met = full & ((moved <= xtol) | (accepted & (moved * moved <= xtol * fits.last)))
        status = xp.where(going & x_met, 3, status)
        status = xp.where(accepted & f_met, 2, status)
        status = xp.where(accepted & f_met & x_met, 4, status)
        fits = replace(
            fits,
            x=xp.where(accepted, x_new, x),
            cost=xp.where(accepted, cost_new, fits.cost),
            mu=xp.where(going, mu_new, mu),
            last=xp.where(going, xp.where(good, moved, 0.0), fits.last),
            status=xp.where(running & at_minimum, 1, status),
            nit=nit,
            nfev=fits.nfev + trial,
            njev=fits.njev + turn,
        )
        return fits, f_new, accepted

    def _judge(
        self, cost: Array, change: Array, reduction: Array, full: Array
    ) -> tuple[Array, Array]:
        """Whether to accept trials, and whether they meet `ftol` (b,)."""
        xp, ftol = self.xp, self.limits.ftol
        small = eps(xp, cost.dtype)
        size = xp.abs(change)
        flat = full & (reduction <= 4 * small * cost) & (size <= 16 * small * cost)
        # NaN fails every comparison, and a negative prediction does not excuse a higher cost.
        accepted = flat | (change > RATIO_ACCEPTED * xp.abs(reduction))
        if ftol <= 4 * small:
            return accepted, flat
        return accepted, flat | (full & (reduction <= ftol * cost) & (size <= ftol * cost))

    def _trial(self, fits: Fits, model: Model) -> tuple[Array, Array, Array, Array]:
        """Trial points and steps (n, b), predicted reductions (b,), free gradients (n, b)."""
        xp, x, gram, grad = self.xp, fits.x, fits.gram, fits.grad
        # The smallest number keeps a column of zeros, whose step is then 0, from dividing 0 by 0.
        damp = fits.mu * (fits.scale * fits.scale) + float(xp.finfo(x.dtype).smallest_normal)
        if model.lower is None:
            p = solve_spd(xp, gram, -grad[:, None, :], damp)[0][:, 0, :]
            return x + p, p, 0.5 * xp.sum(p * (damp * p - grad), axis=0), grad
        free = _free(xp, model, x, grad)
        slope = grad * free
        held = gram * (free[:, None, :] * free[None, :, :])
        p = solve_spd(xp, held, -slope[:, None, :], damp)[0][:, 0, :]
        x_new = xp.clip(x + p, model.lower, model.upper)
        p = x_new - x
        curved = 0.5 * xp.sum(gram * p[None, :, :], axis=1)
        return x_new, p, -xp.sum(p * (grad + curved), axis=0), slope


def _free(xp: Namespace, model: Model, x: Array, grad: Array) -> Array:
    """1.0 (n, b), or 0.0 for a parameter at a bound that its gradient pushes outwards."""
    held = ((x <= model.lower) & (grad > 0)) | ((x >= model.upper) & (grad < 0))
    return xp.astype(~held, x.dtype)
