"""Symmetric matrices in row bands over Legate's processors: filled, factored and solved there.

A band belongs to the processor that fills it; nothing but vectors and numbers comes to the host. Of
cuPyNumeric's solvers only `cholesky` is used, for the reasons in `lmsolve.legate._cholesky`; its
`solve_triangular` would gather the factor on one processor. With band i of the factor as
`[B_i, D_i]`, D_i triangular, and y, x and w on the host of every rank,

    forward   y_i = D_i^-1 (b_i - B_i y_<i),
    backward  x_i = D_i^-T w_i,  w_<i -= B_i' x_i,      w = y at first,

so that a solve is two launches for each band, and band i never leaves its processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmsolve.legate._start import start

from ._shards import view_of
from ._subproblems import FAITHFUL, Linearised, Products, Slope, WideSubproblem

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

    from ._cluster import Cluster

#: Copies of the matrix at a factorisation, all processors together: itself, with its shift, those
#: of cuPyNumeric, and the factor in bands (n = 8,704 on two CPUs took 4.2 GB).
COPIES = 7
#: A store of at most so many bytes is read whole: a part of it is a new store for Legate, for which
#: two ranks take twice the time.
SMALL = 2**20
#: Up to this size cuPyNumeric factors on one processor.
UNTILED = 8192
#: J'r_pp (n,) of a step p, from J'J p if that is known.
Curved = Callable[[Tensor, Tensor | None], Tensor]
#: A step solves its system if the residual is at most this many units of n eps, relatively.
WRONG = 1e3


class Bands:
    """A symmetric matrix (size, size) of which the lower triangle counts, in bands of `tile` rows.

    `kind` says what its vectors are in the cluster's traffic.
    """

    def __init__(
        self, cluster: Cluster, size: int, tile: int, dtype: torch.dtype, kind: str
    ) -> None:
        self.cluster, self.size, self.tile, self.kind = cluster, size, tile, kind
        self.count = -(-size // tile)
        xp = start()
        of = xp.float64 if dtype == torch.float64 else xp.float32
        self._matrix, self._shifted = (xp.empty((size, size), dtype=of) for _ in range(2))
        self._vector = xp.empty((size,), dtype=of)
        self._rows = xp.empty((self.count, size), dtype=of)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What a job that fills the bands is to be launched with."""
        return (self.parts(self._matrix),)

    def parts(self, matrix: Any) -> Any:
        """The bands of an array of the same shape."""
        return self.cluster.store_of(matrix).partition_by_tiling((self.tile, self.size))

    def add_up(self, table: Any) -> None:
        """Fill with the sum over the rows of a table, whose first columns are such matrices."""
        width = self.size * self.size
        columns = table.columns(0, width).partition_by_tiling((table.shards, self.tile * self.size))

        def work(shard: Shard) -> float:
            band = view_of(shard.outputs[0])
            band.copy_(view_of(shard.inputs[0]).sum(0).view_as(band))
            return 0.0

        self.cluster.run(work, self.count, (columns,), self.outputs)

    def trace(self) -> float:
        """Sum of the diagonal."""

        def work(shard: Shard) -> float:
            band = view_of(shard.inputs[0])
            return float(band.diagonal(shard.index * self.tile).sum())

        return float(self.cluster.run(work, self.count, self.outputs).sum())

    def product(self, v: Tensor) -> Tensor:
        """The matrix, if it is full, times v (size,)."""

        def work(shard: Shard) -> float:
            band = view_of(shard.inputs[0])
            view_of(shard.outputs[0]).copy_(band @ v.to(band))
            return 0.0

        out = self.cluster.store_of(self._vector)
        self.cluster.run(work, self.count, self.outputs, (out.partition_by_tiling((self.tile,)),))
        self.cluster.traffic[self.kind] += v.nbytes
        return self.cluster.read(out, self.kind).to(v)

    def factor(self, shift: float) -> BandFactor:
        """Cholesky factor with `shift` on the diagonal, or LinAlgError."""

        def work(shard: Shard) -> float:
            band = view_of(shard.outputs[0])
            band.copy_(view_of(shard.inputs[0]))
            band.diagonal(shard.index * self.tile).add_(shift)
            return float(band.sum())

        outputs = (self.parts(self._shifted),)
        if not np.isfinite(self.cluster.run(work, self.count, self.outputs, outputs)).all():
            raise np.linalg.LinAlgError("the matrix is not finite")  # cuPyNumeric would not say so
        return BandFactor(self, start().linalg.cholesky(self._shifted), self._rows)


class BandFactor:
    """Lower factor in bands."""

    def __init__(self, bands: Bands, factor: Any, rows: Any) -> None:
        self._bands, self._parts = bands, bands.parts(factor)
        self._factor = factor  # keeps it alive
        self._rows = bands.cluster.store_of(rows)

    def solve(self, b: Tensor) -> Tensor:
        """Solution (size,) in the dtype of b."""
        tile, count = self._bands.tile, self._bands.count
        y = b.detach().cpu().clone()
        for i in range(count):
            own = slice(i * tile, (i + 1) * tile)
            y[own] = self._one(i, forward, y)[own]
        for i in reversed(range(count)):
            own, before = slice(i * tile, (i + 1) * tile), slice(0, i * tile)
            found = self._one(i, backward, y)
            y[own] = found[own]
            y[before] -= found[before]
        return y.to(b)

    def _one(self, i: int, step: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
        """A step of the recursion where band i is; a vector of which it fills a part."""
        bands = self._bands

        def work(shard: Shard) -> float:
            if shard.index == i:
                band = view_of(shard.inputs[0])
                lo, out = i * bands.tile, view_of(shard.outputs[0])[0]
                out[: lo + len(band)] = step(band[:, : lo + len(band)], y.to(band))
            return 0.0

        outputs = (self._rows.partition_by_tiling((1, bands.size)),)
        bands.cluster.run(work, bands.count, (self._parts,), outputs)
        bands.cluster.traffic[bands.kind] += y.nbytes
        if bands.count * y.nbytes <= SMALL:
            return bands.cluster.read(self._rows, bands.kind)[i].to(y)
        row = self._rows.slice(0, slice(i, i + 1))
        return bands.cluster.read(row, bands.kind)[0].to(y)


def forward(band: Tensor, y: Tensor) -> Tensor:
    """`[0, y_i]` of a band (b, lo + b), given y_<i and b_i."""
    b, lo = len(band), band.shape[1] - len(band)
    rest = y[lo : lo + b] - band[:, :lo] @ y[:lo]
    own = torch.linalg.solve_triangular(band[:, lo:], rest[:, None], upper=False)[:, 0]
    return torch.cat([torch.zeros_like(y[:lo]), own])


def backward(band: Tensor, w: Tensor) -> Tensor:
    """`[B_i' x_i, x_i]` of a band (b, lo + b), given w_i."""
    b, lo = len(band), band.shape[1] - len(band)
    own = torch.linalg.solve_triangular(band[:, lo:].mT, w[lo : lo + b, None], upper=True)[:, 0]
    return torch.cat([band[:, :lo].mT @ own, own])


class BandedTallSubproblem(Linearised):
    """Normal equations whose matrix stays on Legate's processors."""

    def __init__(
        self,
        bands: Bands,
        grad: Tensor,
        x: Tensor,
        products: Products,
        decay: float,
        curved: Curved | None,
    ) -> None:
        super().__init__(x, x.new_empty(0), products, decay, None)
        self.bands = bands
        self.grad = grad.to(x.dtype) + decay * x
        self.size = bands.trace() / x.numel() + decay
        self._curved = curved
        self._factor: Any = None
        self._image: tuple[Tensor, Tensor] | None = None  # a step and its product
        self._rounding_shows = True

    def solve(self, damping: float) -> Tensor:
        """Step p (n,)."""
        shift = self.decay + damping
        self._factor = None  # before the next factor takes its memory
        self._factor = self.bands.factor(shift)
        p: Tensor = -self._factor.solve(self.grad)
        off = self._times(p) + shift * p + self.grad
        scale = self.grad.abs().max() + (self.size * p.numel() + shift) * p.abs().max()
        rounding = p.numel() * torch.finfo(torch.float64).eps
        self._rounding_shows = damping < FAITHFUL * rounding * self.size
        if not bool(off.abs().max() <= WRONG * rounding * scale):
            raise RuntimeError(
                "Legate's Cholesky factor does not solve the damped system: use `linalg='torch'`, "
                "and report it with the versions of Legate and cuPyNumeric."
            )
        return p

    def reduction(self, p: Tensor) -> Tensor:
        """0-d model decrease by any step p (n,)."""
        return -(self.grad @ p + 0.5 * (p @ self._times(p)) + 0.5 * self.decay * (p @ p))

    def acceleration(self, p: Tensor) -> Tensor | None:
        """Geodesic acceleration (n,) of the last step."""
        if self._curved is None:
            return None
        known = None if self._rounding_shows else self._times(p)
        a: Tensor = -0.5 * self._factor.solve(self._curved(p, known).to(p.dtype))
        return a

    def _times(self, p: Tensor) -> Tensor:
        """J'J p (n,); that of the last step once only."""
        if self._image is None or self._image[0] is not p:
            self._image = p, self.bands.product(p)
        return self._image[1]


class BandedWideSubproblem(WideSubproblem):
    """Dual equations whose kernel stays on Legate's processors."""

    def __init__(
        self,
        bands: Bands,
        x: Tensor,
        r: Tensor,
        products: Products,
        decay: float,
        slope: Slope | None,
    ) -> None:
        self.bands = bands
        super().__init__(x.new_empty((0, 0)), x, r, products, decay, slope)

    def _trace(self) -> float:
        return self.bands.trace()

    def _factored(self, shift: float) -> Any:
        return self.bands.factor(shift)

    def _solved(self, b: Tensor) -> Tensor:
        solution: Tensor = self._factor.solve(b)
        return solution
