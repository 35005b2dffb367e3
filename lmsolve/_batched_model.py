"""What one batched fit calls: the user's function, its derivatives, and the normal equations.

Symbols, for b fits of n parameters and m residuals: parameters come as n rows (b,), so that each
is contiguous; model values f, residuals r and every column of the Jacobian are (b, m). With
weights w and a mask, r = w (f - y), zero where masked. Columns may come undivided, as differences
D_j = h_j df/dx_j: the small matrix J'J is divided by h_j h_k in the end, not the long columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._loss import Loss
from ._xp import Array, Namespace, eps, is_numpy, to_floats

#: (rows of n parameters (b,), per-fit arrays) -> values (b, m)
Function = Callable[[Sequence[Array], tuple[Array, ...]], Array]
#: (xp, model, x (n, b), f (b, m), size (n, b)) -> n columns (b, m), and their steps (n, b) or None
Derivative = Callable[..., tuple[list[Array], Array | None]]

# Parameters from which, for NumPy, one stacked product beats n (n + 1) / 2 products of rows: for
# 20, 50 and 200 points the two were measured to cross at 8, 11 and 11. Torch's wins from 3.
MATMUL_FROM = 10

# Share of rho' that the curvature of a loss is kept above.
LEAST_CURVATURE = 0.1


@dataclass(frozen=True)
class Model:
    """A function of the parameters with its data; an array of leading length 1 is shared.

    args are passed to the function; y, weight and keep (b, m) or (1, m) may be None, and so may the
    bounds lower and upper (n, b) or (n, 1). With `elementwise` the function also takes parameters
    of shape (b, m).
    """

    function: Function
    m: int
    name: str
    args: tuple[Array, ...] = ()
    y: Array | None = None
    weight: Array | None = None
    keep: Array | None = None
    lower: Array | None = None
    upper: Array | None = None
    loss: Loss | None = None
    elementwise: bool = False

    def at(self, xp: Namespace, index: Array) -> Model:
        """The model of the fits at `index` (b,)."""

        def pick(a: Array | None, axis: int = 0) -> Array | None:
            return a if a is None or a.shape[axis] == 1 else xp.take(a, index, axis=axis)

        return Model(
            self.function,
            self.m,
            self.name,
            tuple(pick(a) for a in self.args),
            pick(self.y),
            pick(self.weight),
            pick(self.keep),
            pick(self.lower, 1),
            pick(self.upper, 1),
            self.loss,
            self.elementwise,
        )

    def values(self, xp: Namespace, rows: Sequence[Array]) -> Array:
        """f (b, m) at the parameters."""
        shape = (rows[0].shape[0], self.m)
        return _fitted(xp, self.name, self.function(rows, self.args), shape, rows[0])

    def residual(self, xp: Namespace, f: Array) -> Array:
        """r (b, m) of the model values f."""
        return self.weigh(xp, f if self.y is None else f - self.y)

    def weigh(self, xp: Namespace, a: Array) -> Array:
        """`a` (b, m) times the weights, zero where masked."""
        if self.weight is not None:
            a = a * self.weight
        return a if self.keep is None else xp.where(self.keep, a, xp.zeros_like(a))

    def y_size(self, xp: Namespace, f: Array) -> Array:
        """Norms (b,) of the weighted data, whose rounding errors a perfect fit leaves."""
        if self.y is None:
            return xp.zeros_like(f[:, 0])
        y = self.weigh(xp, self.y)
        return xp.sqrt(dot(xp, y, y))

    def cost(self, xp: Namespace, r: Array) -> Array:
        """0.5 sum(rho(r**2)) (b,); NaN where a residual is not finite."""
        if self.loss is None:
            return 0.5 * dot(xp, r, r)
        C = self.loss.f_scale
        cost = 0.5 * C**2 * xp.sum(self.loss.rho(xp, (r / C) ** 2)[0], axis=1)
        return cost + 0.0 * xp.max(xp.abs(r), axis=1)  # see Loss.cost

    def normal(
        self, xp: Namespace, f: Array, columns: list[Array], step: Array | None
    ) -> tuple[Array, Array]:
        """J'J (n, n, b) and J'r (n, b) of the weighted, loss-corrected residuals at f."""
        r = self.residual(xp, f)
        columns = self._weighed(xp, columns)
        if self.loss is not None:
            factor, r = _corrected(xp, self.loss, r)
            columns = [c * factor for c in columns]
        gram, grad = _products(xp, columns, r)
        return _divided(gram, step), grad if step is None else grad / step

    def scatter(
        self, xp: Namespace, f: Array, columns: list[Array], step: Array | None
    ) -> tuple[Array, Array]:
        """Curvature of a robust cost and sum of the squared gradients of its terms (n, n, b)."""
        assert self.loss is not None
        r = self.residual(xp, f)
        columns = self._weighed(xp, columns)
        curved, scored = self.loss.curvature_weights(xp, r), self.loss.scores(xp, r)
        curvature, _ = _products(xp, [c * curved for c in columns], r)
        squares, _ = _products(xp, [c * scored for c in columns], r)
        return _divided(curvature, step), _divided(squares, step)

    def _weighed(self, xp: Namespace, columns: list[Array]) -> list[Array]:
        if self.weight is None and self.keep is None:
            return columns
        return [self.weigh(xp, c) for c in columns]


def device_of(a: Array) -> dict[str, Any]:
    """The device of `a` as a keyword for creation, none where the library knows of no devices."""
    device = getattr(a, "device", None)
    return {} if device is None else {"device": device}


def _fitted(xp: Namespace, name: str, a: Any, shape: tuple[int, ...], like: Array) -> Array:
    """What the user's function `name` returned, in the shape and dtype it must have."""
    if not hasattr(a, "shape"):
        a = xp.asarray(a, dtype=like.dtype)
    if a.dtype != like.dtype:
        if not xp.isdtype(a.dtype, ("real floating", "integral")):
            raise TypeError(f"`{name}` must return real numbers, got {a.dtype}.")
        a = xp.astype(a, like.dtype)
    if tuple(a.shape) == shape:
        return a
    padded = (1,) * (len(shape) - len(a.shape)) + tuple(a.shape)
    if len(padded) > len(shape) or any(k not in (1, s) for k, s in zip(padded, shape)):
        raise ValueError(
            f"`{name}` must return values that broadcast to (b, m) = {shape}, got {tuple(a.shape)}."
        )
    return xp.broadcast_to(a, shape)


def dot(xp: Namespace, a: Array, b: Array) -> Array:
    """Row-wise products (b,) of two arrays (b, m)."""
    return xp.vecdot(a, b) if is_numpy(xp) else xp.sum(a * b, axis=1)


def _corrected(xp: Namespace, loss: Loss, r: Array) -> tuple[Array, Array]:
    """Factors (b, m) of the rows of J, and the residuals that go with them.

    The curvature rho' + 2 z rho'' of the loss is negative for outliers. It is kept at or above a
    share of rho', with which each step would be one of iteratively reweighted least squares: a
    curvature of nearly zero, where all residuals are outliers, makes steps and scales of any size.
    """
    z = (r / loss.f_scale) ** 2
    _, rho1, rho2 = loss.rho(xp, z)
    factor = xp.sqrt(xp.maximum(rho1 + 2 * z * rho2, LEAST_CURVATURE * rho1))
    return factor, r * (rho1 / factor)


def _products(xp: Namespace, columns: list[Array], r: Array) -> tuple[Array, Array]:
    """C'C (n, n, b) and C'r (n, b) of columns (b, m)."""
    n = len(columns)
    if n >= MATMUL_FROM or not is_numpy(xp):
        C = xp.stack([*columns, r], axis=1)
        both = xp.permute_dims(C @ xp.permute_dims(C, (0, 2, 1)), (1, 2, 0))
        return both[:n, :n, :], both[:n, n, :]
    lower = [[dot(xp, columns[i], columns[j]) for j in range(i + 1)] for i in range(n)]
    flat = [lower[max(i, j)][min(i, j)] for i in range(n) for j in range(n)]
    gram = xp.reshape(xp.stack(flat), (n, n, r.shape[0]))
    return gram, xp.stack([dot(xp, c, r) for c in columns])


def _divided(gram: Array, step: Array | None) -> Array:
    """Products (n, n, b) of columns that came undivided by their steps (n, b)."""
    if step is None:
        return gram
    inverse = 1 / step
    return gram * (inverse[:, None, :] * inverse[None, :, :])


def forward(
    xp: Namespace, model: Model, x: Array, f: Array, size: Array
) -> tuple[list[Array], Array]:
    """Forward differences (backward where the upper bound is near)."""
    ahead = _away(model, xp, x, eps(xp, x.dtype) ** 0.5 * size)
    rows = rows_of(x)
    columns = [model.values(xp, _moved(rows, j, ahead[j, :])) - f for j in range(len(rows))]
    return columns, ahead - x


def central(
    xp: Namespace, model: Model, x: Array, f: Array, size: Array
) -> tuple[list[Array], Array]:
    """Central differences; one-sided ones, over the step that suits them, next to a bound."""
    h = eps(xp, x.dtype) ** (1 / 3) * size
    ahead, behind = x + h, x - h
    if model.lower is not None:
        inside = (ahead <= model.upper) & (behind >= model.lower)
        ahead = xp.where(inside, ahead, _away(model, xp, x, eps(xp, x.dtype) ** 0.5 * size))
        behind = xp.where(inside, behind, x)
    rows = rows_of(x)
    columns = [
        model.values(xp, _moved(rows, j, ahead[j, :]))
        - model.values(xp, _moved(rows, j, behind[j, :]))
        for j in range(len(rows))
    ]
    return columns, ahead - behind


def _away(model: Model, xp: Namespace, x: Array, h: Array) -> Array:
    """x + h (n, b), x - h where that would pass the upper bound, or the farther bound."""
    ahead = x + h
    if model.upper is None or model.lower is None:
        return ahead
    ahead = xp.where(ahead <= model.upper, ahead, x - h)
    farther = xp.where(model.upper - x >= x - model.lower, model.upper, model.lower)
    return xp.where(ahead >= model.lower, ahead, farther)


def rows_of(x: Array) -> list[Array]:
    """The rows (b,) of x (n, b)."""
    return [x[j, :] for j in range(x.shape[0])]


def _moved(rows: list[Array], j: int, row: Array) -> list[Array]:
    """The rows with row j replaced."""
    return [*rows[:j], row, *rows[j + 1 :]]


def supplied(jac: Function) -> Derivative:
    """The user's derivatives: `jac` as a Function that returns n columns or an array (b, m, n)."""

    def derivative(
        xp: Namespace, model: Model, x: Array, f: Array, size: Array
    ) -> tuple[list[Array], None]:
        J = jac(rows_of(x), model.args)
        n = x.shape[0]
        if isinstance(J, list | tuple):
            if len(J) != n:
                raise ValueError(f"`jac` must return n = {n} columns, got {len(J)}.")
        elif tuple(J.shape) != (*f.shape, n):
            raise ValueError(
                f"`jac` must return an array of shape (b, m, n) = {(*f.shape, n)} or a tuple of "
                f"n columns, got {tuple(J.shape)}."
            )
        else:
            J = [J[..., j] for j in range(n)]
        return [_fitted(xp, "jac", c, tuple(f.shape), f) for c in J], None

    return derivative


class ByTorch:
    """Torch's derivatives: reverse mode for models that work point by point, else forward mode.

    With each parameter spread out to (b, m), one backward pass from the sum of all values gives
    every column at once, provided that a value depends on nothing but its own point. Whether it
    does is tried on the first call, against the exact derivative in one direction. Forward mode
    costs one pass for each parameter, on a CPU four times as much in all (50 points, 3 parameters).
    """

    def __init__(self) -> None:
        self.pointwise: bool | None = None

    def __call__(
        self, xp: Namespace, model: Model, x: Array, f: Array, size: Array
    ) -> tuple[list[Array], None]:
        rows = rows_of(x)
        if self.pointwise is None:
            self.pointwise = model.elementwise and _works_by_points(xp, model, rows, size)
            if not self.pointwise:
                _load_forward_mode()
        if self.pointwise:
            return _reverse(model, rows), None
        return [_forward(xp, model, rows, j) for j in range(len(rows))], None


def _works_by_points(xp: Namespace, model: Model, rows: list[Array], size: Array) -> bool:
    """Whether reverse mode is exact along a direction (n, b) that moves all parameters."""
    direction = [(1 + j / len(rows)) * size[j, :] for j in range(len(rows))]
    try:
        exact = _along(xp, model, rows, direction)
        columns = _reverse(model, rows)
    except (RuntimeError, IndexError, ValueError):
        return False  # the model wants parameters of shape (b, 1), or has no second derivatives
    found = xp.zeros_like(exact)
    for t, column in zip(direction, columns):
        found = found + t[:, None] * column
    known = xp.isfinite(exact)
    wrong = xp.where(known, xp.abs(found - exact), 0.0)
    # NaN, where only one of the two is finite, fails the comparison.
    worst, most = to_floats(xp.max(wrong), xp.max(xp.where(known, xp.abs(exact), 0.0)))
    return worst <= eps(xp, exact.dtype) ** 0.5 * most


def _along(xp: Namespace, model: Model, rows: list[Array], direction: list[Array]) -> Array:
    """Derivative (b, m) along a direction, by reverse mode twice: J't is linear in its weights."""
    import torch

    with torch.enable_grad():
        free = [row.detach().requires_grad_() for row in rows]
        f = model.values(xp, free)
        weights = torch.zeros_like(f, requires_grad=True)
        slopes = torch.autograd.grad(
            f, free, weights, create_graph=True, materialize_grads=True, allow_unused=True
        )
        steep = torch.stack([torch.sum(g * t) for g, t in zip(slopes, direction)]).sum()
        (along,) = torch.autograd.grad(steep, weights, materialize_grads=True, allow_unused=True)
    return along


def _reverse(model: Model, rows: list[Array]) -> list[Array]:
    """Columns (b, m) of a model that works point by point."""
    import torch

    with torch.enable_grad():
        spread = [row[:, None].expand(-1, model.m).detach().requires_grad_() for row in rows]
        total = model.function(spread, model.args).sum()
        return list(torch.autograd.grad(total, spread, materialize_grads=True, allow_unused=True))


def _forward(xp: Namespace, model: Model, rows: list[Array], j: int) -> Array:
    """Column j (b, m) by forward mode, in which the other parameters are constants."""
    from torch.autograd import forward_ad

    fwd: Any = forward_ad  # its functions carry no types
    with fwd.dual_level():
        dual = fwd.make_dual(rows[j], xp.ones_like(rows[j]))
        primal, tangent = fwd.unpack_dual(model.values(xp, _moved(rows, j, dual)))
        return xp.zeros_like(primal) if tangent is None else tangent


def _load_forward_mode() -> None:
    """Have torch load what its forward mode needs, which warns of a deprecation of its own."""
    import torch
    from torch.autograd import forward_ad

    fwd: Any = forward_ad
    with warnings.catch_warnings(), fwd.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        fwd.make_dual(torch.zeros(1), torch.zeros(1))
