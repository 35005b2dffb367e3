"""Symmetric matrices in row bands over Legate's processors: filled, factored and solved there.

A band belongs to the processor that fills it, vectors are in stores, and only numbers come to the
host. Of cuPyNumeric's solvers only `cholesky` is used, for the reasons that `legate._cholesky` has;
its `solve_triangular` would gather the factor on one processor. With band i of the factor as
`[B_i, D_i]`, D_i triangular,

    forward   y_i = D_i^-1 (b_i - B_i y_<i),
    backward  x_i = D_i^-T w_i,  w_<i -= B_i' x_i,      w = y at first,

so that a solve is two launches for each band, none of which is waited for, and band i never leaves
its processor. A launch cannot read the whole of a vector that it writes in tiles: two take turns.
Nor may it be given the whole and the tiles of one store: Legate 26.6.1 then read the whole before
the launch that wrote it was done, in several of a dozen runs on two CPUs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmsolve.legate._start import start

from ._shards import view_of
from ._subproblems import FAITHFUL
from ._vectors import Stored, combined

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

    from ._cluster import Cluster
    from ._legate import StoredProducts

#: Copies of the matrix at a factorisation, all processors together: itself, with its shift, those
#: of cuPyNumeric, and the factor in bands (n = 8,704 on two CPUs took 4.2 GB).
COPIES = 7
#: Up to this size cuPyNumeric factors on one processor.
UNTILED = 8192
#: A step solves its system if the residual is at most this many units of n eps, relatively.
WRONG = 1e3


class Bands:
    """A symmetric matrix (size, size), of which the lower triangle counts, in bands of rows."""

    def __init__(self, cluster: Cluster, size: int, tile: int, dtype: torch.dtype) -> None:
        self.cluster, self.size, self.tile = cluster, size, tile
        self.count = -(-size // tile)
        xp = start()
        of = xp.float64 if dtype == torch.float64 else xp.float32
        self._matrix, self._shifted = (xp.empty((size, size), dtype=of) for _ in range(2))
        # Of a solution on its way, and of what its bands tell those before them.
        self.vectors = tuple(cluster.vector(size, tile) for _ in range(2))
        self.images = tuple(xp.empty((self.count, size), dtype=of) for _ in range(2))

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

        def work(shard: Shard) -> Sequence[float]:
            band = view_of(shard.outputs[0])
            band.copy_(view_of(shard.inputs[0]).sum(0).view_as(band))
            return ()

        self.cluster.run(work, self.count, (columns,), self.outputs)

    def trace(self) -> float:
        """Sum of the diagonal."""

        def work(shard: Shard) -> Sequence[Tensor]:
            return (view_of(shard.inputs[0]).diagonal(shard.index * self.tile).sum(),)

        return float(self.cluster.run(work, self.count, self.outputs)[:, 0].sum())

    def product(self, v: Stored, shift: float, b: Stored) -> tuple[Stored, float, float]:
        """`A v` of the matrix A, if it is full, `v'A v`, and the largest of `A v + shift v + b`."""
        out = self.cluster.vector(self.size, self.tile)

        def work(shard: Shard) -> Sequence[Tensor]:
            band, whole, b_own = (view_of(store) for store in shard.inputs)
            image, first = view_of(shard.outputs[0]), shard.index * self.tile
            own = whole[first : first + len(image)]
            image.copy_(band @ whole.to(band))
            return own @ image, (image + shift * own + b_own).abs().max()

        inputs = (*self.outputs, v.store, b.tiles)
        told = self.cluster.run(work, self.count, inputs, (out.tiles,))
        return out, float(told[:, 0].sum()), float(told[:, 1].max())

    def factor(self, shift: float) -> BandFactor:
        """Cholesky factor with `shift` on the diagonal, or LinAlgError."""

        def work(shard: Shard) -> Sequence[Tensor]:
            band = view_of(shard.outputs[0])
            band.copy_(view_of(shard.inputs[0]))
            band.diagonal(shard.index * self.tile).add_(shift)
            return (band.sum(),)

        outputs = (self.parts(self._shifted),)
        if not np.isfinite(self.cluster.run(work, self.count, self.outputs, outputs)).all():
            raise np.linalg.LinAlgError("the matrix is not finite")  # cuPyNumeric would not say so
        return BandFactor(self, start().linalg.cholesky(self._shifted))


class BandFactor:
    """Lower factor in bands."""

    def __init__(self, bands: Bands, factor: Any) -> None:
        self._bands, self._parts = bands, bands.parts(factor)
        self._factor = factor  # keeps it alive

    def solve(self, b: Stored) -> Stored:
        """Solution (size,) for the next launch to read, within `Cluster.chained`."""
        bands, y = self._bands, b
        count, tile, submit = bands.count, bands.tile, bands.cluster.submit
        free, images = itertools.cycle(bands.vectors), itertools.cycle(bands.images)
        for i in range(count):
            old, y = y, next(free)
            submit(partial(forward, i, tile), count, (self._parts, old.store), (y.tiles,))
        last: tuple[Any, ...] = ()
        for i in reversed(range(count)):
            old, y, image = y, next(free), bands.cluster.store_of(next(images))
            inputs = self._parts, old.tiles, *last
            outputs = y.tiles, image.partition_by_tiling((1, bands.size))
            submit(partial(backward, i, tile), count, inputs, outputs)
            last = (image.partition_by_tiling((count, tile)),)
        return y


def forward(i: int, tile: int, shard: Shard) -> Sequence[float]:
    """y_i from b_i and y_<i where band i is; elsewhere y as it was."""
    band, y = (view_of(store) for store in shard.inputs)
    out = view_of(shard.outputs[0])
    own = y[shard.index * tile :][: len(out)]
    out.copy_(own)
    if shard.index == i:
        lo = i * tile
        rest = own.to(band) - band[:, :lo] @ y[:lo].to(band)
        D = band[:, lo : lo + len(band)]
        out.copy_(torch.linalg.solve_triangular(D, rest[:, None], upper=False)[:, 0])
    return ()


def backward(i: int, tile: int, shard: Shard) -> Sequence[float]:
    """x_i from w_i where band i is, and `B_i' x_i` for the next launch, which takes it off w_<i."""
    band, w, *images = (view_of(store) for store in shard.inputs)
    out, image = (view_of(store) for store in shard.outputs)
    out.copy_(w)
    if images and shard.index <= i:
        out.sub_(images[0][i + 1])
    if shard.index == i:
        lo = i * tile
        D = band[:, lo : lo + len(band)]
        x = torch.linalg.solve_triangular(D.mT, out.to(band)[:, None], upper=True)[:, 0]
        out.copy_(x)
        image[0, :lo] = band[:, :lo].mT @ x
    return ()


class StoredSubproblem:
    """A linearisation whose matrix and vectors stay with Legate: the host reads numbers."""

    grad: Stored
    size: float

    def __init__(
        self, bands: Bands, x: Stored, products: StoredProducts, decay: float, accelerated: bool
    ) -> None:
        self.bands, self.x, self.products = bands, x, products
        self.decay, self.accelerated = decay, accelerated
        self._factor: BandFactor | None = None

    def steepest(self) -> float:
        """Largest magnitude of the gradient's components."""
        return self.grad.largest

    def length(self, v: Stored) -> float:
        """Norm of a vector."""
        return math.sqrt(v.square)

    def moved(self, p: Stored, a: Stored | None) -> Stored:
        """The trial point of a step and its acceleration."""
        parts = (self.x, p) if a is None else (self.x, p, a)
        return combined(self.bands.cluster, *((1.0, v) for v in parts))

    def _decrease(self, p: Stored, curvature: float) -> float:
        """Of the model by the step of the last `solve`, whose `p'J'J p` is known."""
        return -(p.along + 0.5 * curvature + 0.5 * self.decay * p.square)

    def _solution(self, b: Stored) -> Stored:
        """Of the damped system, within `Cluster.chained`."""
        assert self._factor is not None
        return self._factor.solve(b)

    def _take_factor(self, shift: float) -> None:
        self._factor = None  # before the next factor takes its memory
        self._factor = self.bands.factor(shift)


class BandedTallSubproblem(StoredSubproblem):
    """Normal equations whose matrix stays on Legate's processors."""

    def __init__(self, grad: Stored, *rest: Any) -> None:
        super().__init__(*rest)
        self.grad = grad
        self.size = self.bands.trace() / self.x.size + self.decay
        self._image: Stored | None = None  # J'J p of the last step

    def solve(self, damping: float) -> Stored:
        """Step p (n,)."""
        shift, g = self.decay + damping, self.grad
        self._take_factor(shift)
        p = self._solved(g, -1.0, g)
        image, self._curvature, off = self.bands.product(p, shift, g)
        scale = g.largest + (self.size * p.size + shift) * p.largest
        rounding = p.size * torch.finfo(torch.float64).eps
        self._image = None if damping < FAITHFUL * rounding * self.size else image
        if not off <= WRONG * rounding * scale:
            raise RuntimeError(
                "Legate's Cholesky factor does not solve the damped system: use `linalg='torch'`, "
                "and report it with the versions of Legate and cuPyNumeric."
            )
        return p

    def reduction(self, p: Stored) -> float:
        """Model decrease by the step of the last `solve`."""
        return self._decrease(p, self._curvature)

    def acceleration(self, p: Stored) -> Stored | None:
        """Geodesic acceleration (n,) of the last step."""
        if not self.accelerated:
            return None
        return self._solved(self.products.curved(p, self._image), -0.5)

    def _solved(self, b: Stored, weight: float, against: Stored | None = None) -> Stored:
        cluster = self.bands.cluster
        with cluster.chained():
            return combined(cluster, (weight, self._solution(b)), against=against)


class BandedWideSubproblem(StoredSubproblem):
    """Dual equations whose kernel stays on Legate's processors; r (m,)."""

    def __init__(self, r: Stored, *rest: Any) -> None:
        super().__init__(*rest)
        self.r = r
        self.grad = self.products.transposed(r, (self.decay, self.x))
        self.size = self.bands.trace() / self.x.size + self.decay
        self._Jx = self.products.product(self.x)[0] if self.decay else None
        self._curvature: float | None = None

    def solve(self, damping: float) -> Stored:
        """Step p (n,)."""
        total = self.decay + damping
        self._take_factor(total)
        share, right, self._curvature = -self.decay / total, self.r, None
        if self._Jx is not None:
            right = combined(self.bands.cluster, (1.0, right), (share, self._Jx))
        return self._back(right, -1.0, (share, self.x), self.grad)

    def reduction(self, p: Stored) -> float:
        """Model decrease by the step of the last `solve`."""
        if self._curvature is None:
            self._curvature = self.products.product(p)[1]
        return self._decrease(p, self._curvature)

    def acceleration(self, p: Stored) -> Stored | None:
        """Geodesic acceleration (n,) of the last step."""
        if not self.accelerated:
            return None
        r_pp, self._curvature = self.products.bent(p)
        return self._back(r_pp, -0.5, (0.0, self.x))

    def _back(
        self, b: Stored, weight: float, term: tuple[float, Stored], against: Stored | None = None
    ) -> Stored:
        """J' of a solution, times its weight, and a term more."""
        with self.bands.cluster.chained():
            return self.products.transposed(self._solution(b), term, weight, against)
