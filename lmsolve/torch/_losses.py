"""What a network is judged by: residuals, or a convex loss in generalised Gauss-Newton form.

Both are one thing to the solver, rows that depend on the output `z` of the network:

    residual function    r(z, y)
    convex loss          r(z) = s + S (z - z0),   S'S = H,   S's = g

with `g` and `H` the loss's gradient and Hessian in the outputs at `z0`, both constants. Then
`J'r` is the exact gradient of the loss and `J'J` is its generalised Gauss-Newton matrix, so that
whatever follows sees plain least squares. The cost is the loss itself, never `|s|**2 / 2`.

Where `H` vanishes (a saturated sigmoid) while `g` does not, `s` would be infinite: `H` is bounded
from below, which leaves the gradient exact and the curvature a little larger than the loss's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ResidualFunction = Callable[[Any, Any], Tensor]


class Judged(NamedTuple):
    """A block of samples, judged: rows (B, k) and the cost of each sample (B,) in float64."""

    rows: Tensor
    cost: Tensor


class Expansion(NamedTuple):
    """A pointwise loss at `z`: value, slope and curvature of every element."""

    value: Tensor
    slope: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Objective:
    """Judges outputs against targets.

    A residual whose leading axis is not the batch's does not belong to single samples: its rows
    come back as one row vector (1, m).
    """

    name: str
    judge: Callable[[Any, Any, int], Judged]
    exact: bool  # the rows are the residuals, at every point, and not only an expansion at one

    def __call__(self, output: Any, target: Any, size: int, weights: Tensor | None) -> Judged:
        """Rows and costs of `size` samples, weighted."""
        judged = self.judge(output, target, size)
        if weights is None:
            return judged
        if judged.rows.shape[0] != size:
            raise ValueError(
                f"`weights` need one residual row per sample: expected a leading axis of {size}, "
                f"got {judged.rows.shape[0]}."
            )
        root = weights.sqrt().to(judged.rows.dtype)
        return Judged(judged.rows * root[:, None], judged.cost * weights.to(torch.float64))


def from_residual(residual: ResidualFunction | None) -> Objective:
    """Half the sum of squares of `residual(output, target)`; their difference by default."""
    function = residual if residual is not None else difference

    def judge(output: Any, target: Any, size: int) -> Judged:
        r = function(output, target)
        if not isinstance(r, Tensor):
            raise TypeError(f"`residual` must return a tensor, got {type(r).__name__}.")
        if r.ndim == 0:
            raise ValueError(
                "`residual` must return one value per residual, got a scalar: leave out the "
                "reduction, the solver squares and sums."
            )
        return half_squares(r.reshape(size, -1) if r.shape[0] == size else r.reshape(1, -1))

    return Objective("residual", judge, exact=True)


def half_squares(rows: Tensor) -> Judged:
    """Residuals (B, k) and half the sums of their squares."""
    return Judged(rows, 0.5 * rows.detach().to(torch.float64).square().sum(1))


def _mse(output: Any, target: Any, size: int) -> Judged:
    check_same_shape(output, target)
    r = (output - target.to(output.dtype)).reshape(size, -1)
    return half_squares(r * math.sqrt(2 / r.shape[1]))


def from_loss(name: str) -> Objective:
    """A convex loss by name, averaged as torch's function of that name does."""
    if name == "mse":
        return Objective(name, _mse, exact=True)
    if name == "cross_entropy":
        return Objective(name, _cross_entropy, exact=False)
    if name not in _POINTWISE:
        known = ["mse", "cross_entropy", *_POINTWISE]
        raise ValueError(f"`loss` must be one of {known}, got {name!r}.")
    expand = _POINTWISE[name]

    def judge(output: Any, target: Any, size: int) -> Judged:
        check_same_shape(output, target)
        z = output.reshape(size, -1)
        with torch.no_grad():
            value, slope, curvature = expand(z, target.reshape(size, -1).to(z.dtype))
            root = curvature.sqrt()
            s = slope / root
        each = 1 / z.shape[1]
        rows = (s + root * (z - z.detach())) * math.sqrt(each)
        return Judged(rows, value.to(torch.float64).sum(1) * each)

    return Objective(name, judge, exact=False)


def sketched(objective: Objective) -> Objective:
    """Two rows of each sample instead of k; targets come with a number in [0, 1) a sample.

    The rows `s + S (z - z0)` of a sample are projected on `u = s / |s|` and on a random `w` with
    `w'u = 0` and `E ww' = I - uu'`: the gradient `S's` stays exact, `E S'(uu' + ww')S = S'S`.
    """

    def judge(output: Any, target: Any, size: int) -> Judged:
        target, phase = target
        rows, cost = objective.judge(output, target, size)
        if rows.shape[0] != size:
            raise ValueError(
                f"`sketch` needs residuals of single samples: expected a leading axis of {size}, "
                f"got {rows.shape[0]}."
            )
        with torch.no_grad():
            s = rows.detach()
            u = s / torch.linalg.vector_norm(s, dim=1, keepdim=True).clamp_min(_floor(s.dtype))
            # 2 cos(2 pi i t) cos(2 pi j t) has the mean 1 over t if i = j, else 0; i, j >= 1.
            order = torch.arange(1, s.shape[1] + 1, device=s.device)
            w = (2 * math.pi * order * phase[:, None]).cos().to(s.dtype) * math.sqrt(2)
            w = w - (w * u).sum(1, keepdim=True) * u
        return Judged(torch.stack([(u * rows).sum(1), (w * rows).sum(1)], 1), cost)

    return Objective(objective.name, judge, exact=False)


def difference(output: Any, target: Any) -> Tensor:
    """Output minus target, of the same shape."""
    check_same_shape(output, target)
    return output - target  # type: ignore[no-any-return]  # tensors, as just checked


def check_same_shape(output: Any, target: Any) -> None:
    """Refuse what would broadcast: (m, 1) against (m,) makes m * m differences."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise TypeError(
            "`model` must return a tensor and `targets` be one, unless `residual` takes them "
            f"apart; got {type(output).__name__} and {type(target).__name__}."
        )
    if output.shape != target.shape:
        raise ValueError(
            f"`targets` must have the shape of the model's output {tuple(output.shape)}, "
            f"got {tuple(target.shape)}."
        )


def _floor(dtype: torch.dtype) -> float:
    """Smallest curvature, relative to 1, by which a slope is divided."""
    return torch.finfo(dtype).eps


def _bce(z: Tensor, y: Tensor) -> Expansion:
    value = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    p = torch.sigmoid(z)
    return Expansion(value, p - y, (p * (1 - p)).clamp_min(_floor(z.dtype)))


def _poisson(z: Tensor, y: Tensor) -> Expansion:
    rate = z.exp()
    return Expansion(rate - y * z, rate - y, rate.clamp_min(_floor(z.dtype)))


def _huber(z: Tensor, y: Tensor) -> Expansion:
    # The Hessian is zero beyond 1; the curvature of the tangent parabola (Huber's weights) is not.
    value = F.huber_loss(z, y, reduction="none")
    e = z - y
    return Expansion(value, e.clamp(-1, 1), 1 / e.abs().clamp_min(1))


_POINTWISE: dict[str, Callable[[Tensor, Tensor], Expansion]] = {
    "bce": _bce,
    "poisson": _poisson,
    "huber": _huber,
}


def _cross_entropy(output: Any, target: Any, size: int) -> Judged:
    """Classes on axis 1, as in `torch.nn.functional.cross_entropy`.

    With probabilities p and the one-hot (or soft) target y, g = p - y and H = diag(p) - pp' = S'S
    for S = diag(sqrt(p)) (I - 1p'); s = (p - y) / sqrt(p).
    """
    z = output.movedim(1, -1).reshape(size, -1, output.shape[1])
    with torch.no_grad():
        soft = target.is_floating_point()
        if soft:
            check_same_shape(output, target)
            y = target.movedim(1, -1).reshape(z.shape).to(z.dtype)
        else:
            if target.shape != output.shape[:1] + output.shape[2:]:
                raise ValueError(
                    "`targets` must hold one class per output of shape "
                    f"{tuple(output.shape[:1] + output.shape[2:])}, got {tuple(target.shape)}."
                )
            classes = torch.arange(z.shape[-1], device=z.device)
            y = (target.reshape(size, -1, 1) == classes).to(z.dtype)  # one-hot, also under vmap
        logp = F.log_softmax(z, -1)
        p = logp.exp()
        root = p.clamp_min(_floor(z.dtype)).sqrt()
        s = (p - y) / root
    each = 1 / z.shape[1]
    dz = z - z.detach()
    rows = s + root * (dz - (p * dz).sum(-1, keepdim=True))
    cost = -(y.to(torch.float64) * logp.to(torch.float64)).sum((1, 2)) * each
    return Judged(rows.reshape(size, -1) * math.sqrt(each), cost)
