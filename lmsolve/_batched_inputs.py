"""What the front doors of many fits are given: checked, and in one namespace, dtype and device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._batched_lm import Limits
from ._batched_model import device_of
from ._loss import LOSSES, Loss
from ._xp import Array, Namespace, array_namespace, eps, is_array, is_numpy, is_torch, to_floats


class Options(NamedTuple):
    """The options that both front doors take, checked."""

    limits: Limits
    jac: str | None  # None where the user supplies derivatives
    memory: int | None
    workers: int
    progress: bool


def data_and_start(ydata: Array, p0: Any) -> tuple[Namespace, Array, Array, Array]:
    """Namespace, y (B, m), and the starting points as (B or 1, n) and as (n, B), of one dtype."""
    y = plain(ydata) if is_array(ydata) else np.asarray(ydata)
    xp = array_namespace(y, p0) if is_array(p0) else array_namespace(y)
    if y.ndim != 2 or y.shape[1] == 0:
        raise ValueError(f"`ydata` must have shape (B, m), m >= 1, got {tuple(y.shape)}.")
    dtype = p0.dtype if is_array(p0) else y.dtype
    if not xp.isdtype(dtype, "real floating"):
        dtype = y.dtype if xp.isdtype(y.dtype, "real floating") else xp.float64
    if not xp.isdtype(y.dtype, ("real floating", "integral")):
        raise TypeError(f"`ydata` must hold real numbers, got {y.dtype}.")
    B = y.shape[0]
    x0 = xp.asarray(plain(p0), dtype=dtype, **device_of(y))
    if x0.ndim not in (1, 2) or x0.shape[-1] == 0 or (x0.ndim == 2 and x0.shape[0] != B):
        raise ValueError(
            f"`p0` must have shape (n,) or (B, n) = ({B}, n), n >= 1, got {tuple(x0.shape)}."
        )
    x0 = x0 if x0.ndim == 2 else x0[None, :]
    start = fits_last(xp, xp.broadcast_to(x0, (B, x0.shape[1])))
    return xp, xp.astype(y, dtype, copy=False), x0, start


def rows(xp: Namespace, name: str, a: Any, like: Array, shape: tuple[int, int]) -> Array:
    """`a` of shape (m,) or (B, m) as (1, m) or (B, m), in dtype and device of `like`."""
    a = xp.asarray(plain(a), dtype=like.dtype, **device_of(like))
    B, m = shape
    if tuple(a.shape) not in ((m,), (B, m)):
        raise ValueError(
            f"`{name}` must have shape (m,) = ({m},) or (B, m) = ({B}, {m}), got {tuple(a.shape)}."
        )
    return a if a.ndim == 2 else a[None, :]


def positive(xp: Namespace, sigma: Array, keep: Array | None) -> Array:
    """sigma, positive where it is used; NaN of single fits is their own matter."""
    used = xp.ones_like(sigma, dtype=xp.bool) if keep is None else keep
    if sigma.shape[0] > 1:
        used = used & ~xp.isnan(sigma)
    (least,) = to_floats(xp.min(xp.where(used, sigma, xp.ones_like(sigma))))
    if not least > 0:
        raise ValueError(f"`sigma` must be positive, got {least}.")
    return sigma


def mask(xp: Namespace, mask: Any, like: Array, shape: tuple[int, int]) -> Array:
    """The mask as (1, m) or (B, m)."""
    mask = xp.asarray(mask, **device_of(like))
    B, m = shape
    if mask.dtype != xp.bool:
        raise TypeError(f"`mask` must hold booleans, True for data to use, got {mask.dtype}.")
    if tuple(mask.shape) not in ((m,), (B, m)):
        raise ValueError(
            f"`mask` must have shape (m,) = ({m},) or (B, m) = ({B}, {m}), got {tuple(mask.shape)}."
        )
    return mask if mask.ndim == 2 else mask[None, :]


def bounds(xp: Namespace, bounds: Any, start: Array) -> tuple[Array | None, Array | None]:
    """Lower and upper bounds (n, 1) or (n, B), or None twice where there are none."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError("`bounds` must be a pair (lower, upper).")
    n, B = start.shape
    sides = []
    for name, side in zip(("lower", "upper"), bounds):
        a = xp.asarray(plain(side), dtype=start.dtype, **device_of(start))
        if tuple(a.shape) not in ((), (n,), (B, n)):
            raise ValueError(
                f"`bounds`: the {name} one must be a number or have shape (n,) = ({n},) or "
                f"(B, n) = ({B}, {n}), got {tuple(a.shape)}."
            )
        a = a if a.ndim == 2 else xp.broadcast_to(a, (n,))[None, :]
        sides.append(fits_last(xp, a))
    lower, upper = sides
    free, crossed, outside = to_floats(
        *[
            xp.astype(test, start.dtype)
            for test in (
                xp.all(lower == -xp.inf) & xp.all(upper == xp.inf),
                xp.any(lower >= upper),
                xp.any((start < lower) | (start > upper)),
            )
        ]
    )
    if free:
        return None, None
    if crossed:
        raise ValueError("`bounds`: each lower bound must be less than its upper bound.")
    if outside:
        raise ValueError("The starting points must lie within `bounds`.")
    return lower, upper


def loss(loss: str, f_scale: float) -> Loss | None:
    """The robust loss, None for 'linear'."""
    if loss not in LOSSES:
        raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, got {loss!r}.")
    if not f_scale > 0:
        raise ValueError(f"`f_scale` must be positive, got {f_scale}.")
    rho = LOSSES[loss]
    return None if rho is None else Loss(rho, float(f_scale))


def options(
    xp: Namespace,
    like: Array,
    jac: Any,
    ftol: float | None,
    xtol: float | None,
    gtol: float | None,
    max_nit: int,
    memory: int | None,
    workers: int,
    progress: bool,
) -> Options:
    """The options both front doors take, checked, defaults filled in."""
    if not (jac is None or callable(jac) or jac in ("2-point", "3-point")):
        raise ValueError(f"`jac` must be callable, '2-point', '3-point' or None, got {jac!r}.")
    small = eps(xp, like.dtype) if xp.isdtype(like.dtype, "real floating") else eps(xp, xp.float64)
    tolerances = {}
    for name, value, default in (
        ("ftol", ftol, 4 * small),
        ("xtol", xtol, small ** (2 / 3)),
        ("gtol", gtol, small ** (2 / 3)),
    ):
        if value is not None and not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
        tolerances[name] = default if value is None else float(value)
    for name, count in (("max_nit", max_nit), ("workers", workers), ("memory", memory)):
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if workers > 1 and not is_numpy(xp):
        raise ValueError("`workers` > 1 needs NumPy arrays; other libraries run their own threads.")
    limits = Limits(**tolerances, max_nit=max_nit)
    return Options(limits, jac if isinstance(jac, str) else None, memory, workers, progress)


def fits_last(xp: Namespace, a: Array) -> Array:
    """(B, n) as (n, B), contiguous."""
    a = plain(a)
    return xp.stack([a[:, j] for j in range(a.shape[1])])


def plain(a: Any) -> Any:
    """`a` off torch's graph."""
    return a.detach() if is_torch(a) else a


def shape_of(a: Any) -> str:
    """Shape of an array, or the type of anything else."""
    return str(tuple(a.shape)) if is_array(a) else type(a).__name__
