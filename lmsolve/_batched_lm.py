"""One Levenberg-Marquardt loop for many independent fits of one shape, side by side.

All fits of the working set advance together, one trial each per turn. Symbols, for b fits of n
parameters and m residuals, with the fits on the last axis of everything small, so that each
operation runs over b contiguous numbers:

    x (n, b), f (b, m)      parameters, model values (the residuals are a function of f)
    gram (n, n, b), grad (n, b)     J'J and J'r of the residuals after weights and loss
    scale s (n, b), d (n, b)        running maximum of the column norms of J, and 1 / s
    mu (b,)                 damping, relative to s^2

Each turn solves (J'J + mu diag(s^2)) p = -J'r and tries x + p, clipped to the bounds, for every
fit. A parameter at a bound that the gradient pushes outwards is held. With |r| = sqrt(2 cost) and
the size of a parameter, size_j = |x_j| + max(|r|, |y| / 100) / s_j, a fit ends when

    gtol    max_j |grad_j| / (s_j |r|) <= gtol, or r is the rounding errors of y
    ftol    the predicted reduction and the change of the cost are both <= ftol cost
    xtol    max_j |p_j| / size_j <= xtol, for this step or, by the rate of the last two, the next

the last two only for steps that damping has not shortened. Where the predicted reduction is below
the rounding errors of the cost, the step is taken and the cost not asked. Where ftol fires and too
much is left to go, max_j |p_j| / size_j rho / (1 - rho) by the rate rho of the last two steps, the
fit is polished: residuals are large, Gauss-Newton converges linearly, and Anderson mixing of the
last two steps makes the next one. Fits that have ended leave the working set and waiting ones
enter, so that a few slow fits hold up no others.

References: Nielsen (1999), "Damping parameter in Marquardt's method"; More (1978),
"The Levenberg-Marquardt algorithm", the running maximum; Kanzow, Yamashita, Fukushima (2004),
"Levenberg-Marquardt methods ... with convex constraints", the projection; Anderson (1965),
"Iterative procedures for nonlinear integral equations", the mixing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from ._batched_model import Derivative, Model, device_of, rows_of
from ._xp import Array, Namespace, eps, to_floats

RUNNING = -10  # internal: the fit has not ended
NOT_FINITE, STUCK = -3, -5  # as of single fits, whose -4 is a singular system
MU_FIRST = 1e-2  # relative to the diagonal of J'J
# Factors of mu by the gain ratio, above 0.75, above 0.25 and below (More 1978 and Nielsen 1999
# change a radius and mu by less), and after a rejection: of twelve triples measured on five kinds
# of curves, the one with no failures and within 7 % of the fewest trials on four of them.
MU_SHRINK, MU_KEEP, MU_DOUBT, MU_GROW = 0.1, 0.5, 2.0, 5.0
RATIO_ACCEPTED = 1e-4  # More 1978, section 7
# Polishing starts where more is left to go than these shares of the root of ftol and of xtol (1e-9
# of the size of a parameter by the defaults in float64), and ends where a tenth of that is left. A
# larger weight of the last step is not taken.
LEFT_BY_FTOL, LEFT_BY_XTOL, LEFT_BY_POLISH, MOST_MIXED = 1 / 30, 30.0, 0.1, 20.0
# It also ends after so many steps, with one that is longer than the last by so much, or, where
# steps do not halve, below this share of the cost's rounding. All three as in single fits.
POLISH_STEPS, PATIENCE, SPENT = 20, 4.0, 1e-3
REFILL_BELOW = 0.85  # share of the working set that still runs when it is filled up again


class Limits(NamedTuple):
    """Tolerances, and the number of trials after which a fit is given up."""

    ftol: float
    xtol: float
    gtol: float
    max_nit: int


@dataclass(frozen=True)
class Fits:
    """State of fits, which the last axis of every array counts."""

    index: Array
    x: Array
    cost: Array
    gram: Array
    grad: Array
    scale: Array
    d: Array
    mu: Array
    last: Array
    rate: Array
    y_size: Array
    status: Array
    nit: Array
    njev: Array

    def ended(self, nfev: Array, scatter: tuple[Array, Array] | None) -> Ended:
        """What is kept of them."""
        again = int(scatter is not None)  # one linearisation more
        return Ended(
            self.x,
            self.cost,
            self.gram,
            self.grad,
            self.status,
            self.nit,
            self.njev + again,
            nfev + again,
            *(scatter or (self.gram[:0, ...], self.gram[:0, ...])),
        )


class Ended(NamedTuple):
    """What is kept of fits that have ended, as in `Fits`, and the evaluations of the model.

    curvature and squares are those of `Model.scatter`, empty without a loss.
    """

    x: Array
    cost: Array
    gram: Array
    grad: Array
    status: Array
    nit: Array
    njev: Array
    nfev: Array
    curvature: Array
    squares: Array


NAMES = tuple(k.name for k in fields(Fits))


def take(xp: Namespace, fits: Fits, index: Array) -> Fits:
    """The fits at `index`."""
    return Fits(**{k: xp.take(getattr(fits, k), index, axis=-1) for k in NAMES})


def between(fits: Fits, start: int, stop: int) -> Fits:
    """The fits start..stop."""
    return Fits(**{k: getattr(fits, k)[..., start:stop] for k in NAMES})


def join(xp: Namespace, parts: list[Fits]) -> Fits:
    """The fits of all parts, one part after the other."""
    return Fits(**{k: xp.concat([getattr(p, k) for p in parts], axis=-1) for k in NAMES})


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
        rate=zero + 1.0,
        y_size=zero,
        status=none + RUNNING,
        nit=none,
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


class Trial(NamedTuple):
    """A trial: point (n, b); cost, predicted reduction, relative step before mixing and, at x,
    the largest cosine between residuals and free columns of J, and the norm of the residuals
    (b,)."""

    x: Array
    cost: Array
    reduction: Array
    moved: Array
    cosine: Array
    norm_r: Array


class Last(NamedTuple):
    """Polishing steps in a row (b,), and the last steps (n, b) before and after mixing."""

    polished: Array
    step: Array
    way: Array

    def at(self, xp: Namespace, index: Array, more: int) -> Last:
        """Those at `index`, and `more` that enter and are not polished."""
        new = [xp.zeros((*a.shape[:-1], more), dtype=a.dtype, **device_of(a)) for a in self]
        kept = [xp.take(a, index, axis=-1) for a in self]
        return Last(*(xp.concat(both, axis=-1) for both in zip(kept, new)))


class Loop:
    """The loop: a model, its derivative, limits, and the width of the working set."""

    def __init__(
        self, xp: Namespace, model: Model, derivative: Derivative, limits: Limits, width: int
    ) -> None:
        self.xp, self.model, self.derivative = xp, model, derivative
        self.limits, self.width = limits, width

    def run(self, waiting: Fits) -> Fits:
        """The fits of `waiting` brought to their ends, in the order in which they came to them."""
        xp, total = self.xp, waiting.index.shape[0]
        done: list[Fits] = []
        entered = min(self.width, total)
        fits, f, model = self._enter(waiting, 0, entered)
        last: Last | None = None
        while True:
            before = fits.x
            fits, f_new, accepted, polished, step = self._turn(fits, f, model, last)
            running = fits.status == RUNNING
            b = running.shape[0]
            k, moved, polishing = to_floats(
                *(xp.count_nonzero(which) for which in (running, accepted, polished))
            )
            if polishing:
                count = xp.astype(polished, fits.nit.dtype)
                count = count if last is None else count * (last.polished + 1)
                last = Last(count, step, fits.x - before)
            else:
                last = None
            f = f_new if moved == b else xp.where(accepted[:, None], f_new, f)
            left = int(k)
            if left > REFILL_BELOW * b:
                continue
            # Sorted by whether they run instead of picked by a mask: the host knows all shapes.
            order = xp.argsort(xp.astype(running, fits.index.dtype), stable=True)
            out, stay = order[: b - left], order[b - left :]
            done.append(take(xp, fits, out))
            more = min(self.width - left, total - entered)
            if left == 0 and more == 0:
                return join(xp, done)
            fits, f = take(xp, fits, stay), xp.take(f, stay, axis=0)
            last = last and last.at(xp, stay, more)
            if more:
                new, f_new, _ = self._enter(waiting, entered, entered + more)
                fits, f = join(xp, [fits, new]), xp.concat([f, f_new], axis=0)
                entered += more
            model = self.model.at(xp, fits.index)

    def scatter(self, fits: Fits) -> tuple[Array, Array] | None:
        """`Model.scatter` of fits that have ended, where a loss asks for it."""
        if self.model.loss is None:
            return None
        xp, total, parts = self.xp, fits.index.shape[0], []
        for start in range(0, max(total, 1), self.width):
            some = between(fits, start, min(start + self.width, total))
            model = self.model.at(xp, some.index)
            f = model.values(xp, rows_of(some.x))
            columns, step = self.derivative(xp, model, some.x, f, self._size(some))
            parts.append(model.scatter(xp, f, columns, step))
        curvature, squares = (xp.concat(arrays, axis=-1) for arrays in zip(*parts))
        return curvature, squares

    def _size(self, fits: Fits) -> Array:
        """Sizes (n, b) of the parameters; one at zero has its size from what it does."""
        xp = self.xp
        norm_r = xp.sqrt(2 * fits.cost)
        return xp.abs(fits.x) + xp.maximum(norm_r, 0.01 * fits.y_size) * fits.d

    def _enter(self, waiting: Fits, start: int, stop: int) -> tuple[Fits, Array, Model]:
        """Fits start..stop of the queue, their model values and their model."""
        xp = self.xp
        fits = between(waiting, start, stop)
        model = self.model.at(xp, fits.index)
        f = model.values(xp, rows_of(fits.x))
        cost = model.cost(xp, model.residual(xp, f))
        status = xp.where(xp.isfinite(cost), fits.status, NOT_FINITE)
        norm_r = xp.sqrt(2 * cost)
        # Differences start from steps relative to |x|, and to 1 where x is 0.
        bare = (fits.x == 0) & (fits.scale == 0) & (norm_r > 0)
        d = xp.where(bare, 1 / norm_r, fits.d)
        y_size = model.y_size(xp, f)
        fits = replace(fits, cost=cost, status=status, d=d, y_size=y_size)
        return fits, f, model

    def _turn(
        self, fits: Fits, f: Array, model: Model, last: Last | None
    ) -> tuple[Fits, Array, Array, Array, Array]:
        """One linearisation and one trial for every fit.

        Fits, values at the trial, who moved, who is to be polished, and the step before mixing.
        """
        xp, running = self.xp, fits.status == RUNNING
        norm_r, size = xp.sqrt(2 * fits.cost), self._size(fits)
        fits = self._linearise(fits, f, model, size, running)
        free = None if model.lower is None else _free(xp, model, fits)
        slope = fits.grad if free is None else fits.grad * free
        x_new, reduction = self._trial(fits, model, slope, free)
        p = x_new - fits.x
        if last is not None:
            x_new = self._mixed(fits, model, x_new, p, last)
        f_new = model.values(xp, rows_of(x_new))
        cost_new = model.cost(xp, model.residual(xp, f_new))
        trial = Trial(
            x=x_new,
            cost=cost_new,
            reduction=reduction,
            moved=xp.max(xp.abs(p) / size, axis=0),
            cosine=xp.max(xp.abs(slope) * fits.d, axis=0) / norm_r,
            norm_r=norm_r,
        )
        fits, accepted, polished = self._decide(fits, trial, running, last)
        return fits, f_new, accepted, polished, p

    def _linearise(self, fits: Fits, f: Array, model: Model, size: Array, running: Array) -> Fits:
        """The fits with J'J, J'r and scale at x; those that have ended stay as they are."""
        xp = self.xp
        gram, grad = model.normal(xp, f, *self.derivative(xp, model, fits.x, f, size))
        scale = xp.maximum(fits.scale, xp.sqrt(diagonal(xp, gram)))
        return replace(
            fits,
            gram=xp.where(running, gram, fits.gram),
            grad=xp.where(running, grad, fits.grad),
            scale=xp.where(running, scale, fits.scale),
            d=xp.where(running & (scale > 0), 1 / scale, fits.d),
            njev=fits.njev + xp.astype(running, fits.njev.dtype),
        )

    def _trial(
        self, fits: Fits, model: Model, slope: Array, free: Array | None
    ) -> tuple[Array, Array]:
        """Trial points (n, b) and predicted reductions (b,); slope is the free gradient (n, b)."""
        xp, x, gram = self.xp, fits.x, fits.gram
        # The smallest number keeps a column of zeros, whose step is then 0, from dividing 0 by 0.
        damp = fits.mu * (fits.scale * fits.scale) + float(xp.finfo(x.dtype).smallest_normal)
        right = -slope[:, None, :]
        if free is None:
            p = solve_spd(xp, gram, right, damp)[0][:, 0, :]
            return x + p, 0.5 * xp.sum(p * (damp * p - slope), axis=0)
        p = solve_spd(xp, gram * (free[:, None, :] * free[None, :, :]), right, damp)[0][:, 0, :]
        x_new = xp.minimum(xp.maximum(x + p, model.lower), model.upper)
        p = x_new - x
        curved = 0.5 * xp.sum(gram * p[None, :, :], axis=1)
        return x_new, -xp.sum(p * (fits.grad + curved), axis=0)

    def _mixed(self, fits: Fits, model: Model, x_new: Array, p: Array, last: Last) -> Array:
        """Trial points (n, b): by Anderson mixing for the fits that are polished, else x + p."""
        xp, ss = self.xp, fits.scale * fits.scale
        turned = p - last.step
        scaled = ss * turned
        weight = xp.sum(scaled * p, axis=0) / xp.sum(scaled * turned, axis=0)
        mixes = (last.polished > 0) & (xp.abs(weight) <= MOST_MIXED)
        mixed = xp.where(mixes, x_new - weight * (last.way + turned), x_new)
        if model.lower is None:
            return mixed
        bound = (x_new <= model.lower) | (x_new >= model.upper)
        return xp.where(bound, x_new, xp.minimum(xp.maximum(mixed, model.lower), model.upper))

    def _decide(
        self, fits: Fits, trial: Trial, running: Array, last: Last | None
    ) -> tuple[Fits, Array, Array]:
        """The fits after their trials, which of them moved, and which are to be polished."""
        xp, limits = self.xp, self.limits
        small = eps(xp, fits.cost.dtype)
        # A perfect fit leaves the rounding errors of the data.
        perfect = trial.norm_r <= 8 * small * fits.y_size
        at_minimum = running & ((trial.cosine <= limits.gtol) | perfect)
        going = running & ~at_minimum
        change = fits.cost - trial.cost
        ratio = change / trial.reduction
        # A step that damping has shortened says nothing about convergence.
        full = going & (fits.mu <= 1)
        noise = small * (4 * fits.cost + trial.norm_r * fits.y_size)
        still = full & (xp.abs(change) <= xp.maximum(4 * noise, limits.ftol * fits.cost))
        flat = still & (trial.reduction <= noise)
        # NaN fails every comparison, and a negative prediction does not excuse a higher cost.
        accepted = flat | (going & (change > RATIO_ACCEPTED * xp.abs(trial.reduction)))
        good = accepted & (flat | (ratio > 0.25))

        rate = xp.where(fits.last > 0, trial.moved / fits.last, fits.rate)
        x_met = full & (trial.moved <= limits.xtol)
        following = trial.moved * rate
        x_met = x_met | (full & accepted & (following <= limits.xtol))
        ftol = max(limits.ftol, 4 * small)
        f_met = still & accepted & (trial.reduction <= ftol * fits.cost)
        nit = fits.nit + xp.astype(going, fits.nit.dtype)
        late = nit >= limits.max_nit
        enough = max(LEFT_BY_FTOL * ftol**0.5, LEFT_BY_XTOL * limits.xtol)
        far = following > enough * (1 - rate)
        if last is not None:
            spent = (trial.reduction <= SPENT * small * fits.cost) & (rate > 0.5)
            on = ~spent & (rate <= PATIENCE) & (last.polished < POLISH_STEPS)
            on = on & (following > LEFT_BY_POLISH * enough * (1 - rate))
            far = xp.where(last.polished > 0, on, far)
        polished = f_met & far & ~late
        f_met = f_met ^ polished
        status = xp.where(going & late, 0, fits.status)
        stuck = going & ~accepted & ~(trial.moved > small)
        status = xp.where(stuck, STUCK, status)
        status = xp.where(f_met | (stuck & (trial.cosine <= small ** (1 / 3))), 2, status)
        status = xp.where(x_met, 3, status)
        status = xp.where(x_met & f_met, 4, status)
        status = xp.where(at_minimum, 1, status)

        mu = fits.mu
        eased = xp.where(ratio > 0.75, MU_SHRINK * mu, MU_KEEP * mu)
        mu_new = xp.where(accepted, xp.where(good, eased, MU_DOUBT * mu), MU_GROW * mu)
        fits = replace(
            fits,
            x=xp.where(accepted, trial.x, fits.x),
            cost=xp.where(accepted, trial.cost, fits.cost),
            mu=xp.where(going, mu_new, mu),
            last=xp.where(going, xp.where(good, trial.moved, 0.0), fits.last),
            rate=xp.where(going, xp.where(good, rate, 1.0), fits.rate),
            status=status,
            nit=nit,
        )
        return fits, accepted, polished


def _free(xp: Namespace, model: Model, fits: Fits) -> Array:
    """1.0 (n, b), or 0.0 for a parameter at a bound that its gradient pushes outwards."""
    x, grad = fits.x, fits.grad
    held = ((x <= model.lower) & (grad > 0)) | ((x >= model.upper) & (grad < 0))
    return xp.astype(~held, x.dtype)
