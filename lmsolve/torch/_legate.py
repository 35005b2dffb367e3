"""Networks on Legate, in place: rows of J are computed where their samples are, and added up there.

At a trial each shard returns its part of the cost, one number. At an accepted point

    m >= n   each shard adds up J'J and J'r of its rows, and the shards' sums are summed;
    m < n    each shard makes its rows of K = J J', which needs no J but that of one parameter.

Small matrices are solved on the host, which reads n^2 + n numbers, or m^2, for an accepted step;
large ones stay in bands on the processors (`_bands`). J never leaves its device and is never held.
All ranks make the same launches with the same numbers: whatever decides (memory, the way of
differentiating, a clock) is agreed on first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._bands import BandedTallSubproblem, BandedWideSubproblem, Curved
from ._cluster import Cluster
from ._jacobian import Plan, Point
from ._jobs import CostJob, CoupledSumsJob, Job, KernelJob, RowsJob, SumsJob
from ._network import Batch, Network
from ._problem import COARSE, Evaluation, NetworkProblem, Settings, accumulator
from ._shards import Placed, checksum
from ._subproblems import (
    Linearised,
    Products,
    TallSubproblem,
    WideSubproblem,
    factorized,
    second_derivative,
    solved,
)
from ._vector_jobs import CurvatureJob, ProductJob, SlopeJob, TransposedJob


class LegateProblem(NetworkProblem):
    """`NetworkProblem` with its rows on Legate's processors."""

    def __init__(
        self, network: Network, batch: Batch, plan: Plan, settings: Settings, cluster: Cluster
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.cluster = cluster
        self.placed = Placed(network, batch, cluster.processors, cluster.traffic)
        if cluster.ranks > 1:
            tensors = pytree.tree_leaves((batch.inputs, batch.targets, batch.weights))
            arrays = [a.cpu().numpy() for a in tensors if isinstance(a, Tensor)]
            self.placed.checksum = checksum(*arrays)

    def linearize(self, x: Tensor, r: Evaluation, damping: float = 0.0) -> Linearised:
        """Subproblem at x (n,); MemoryError where Legate's pool is too small for it."""
        n, m, form = self.network.parameters.n, self.m, self.form()
        if form == "normal":
            self.cluster.require_sums(n)
        elif form == "dual":
            self.cluster.require_kernel(m, accumulator(self.network, m).itemsize)
        return super().linearize(x, r, damping)

    def _evaluate(self, x: Tensor) -> Evaluation:
        if self.plan.coupled:
            return super()._evaluate(x)
        costs = self.launch(CostJob, x)
        decay = 0.5 * self.settings.decay * x.to(torch.float64).square().sum()
        return Evaluation(decay + float(costs.sum()), None)

    def _normal(self, x: Tensor, passes: Any, damping: float = 0.0) -> Linearised:
        network, n = self.network, self.network.parameters.n
        table = self.cluster.table("sums", self.placed.shards, n * n + n)
        coarse = network.parameters.dtype if damping > COARSE else None
        job = CoupledSumsJob if self.plan.coupled else SumsJob
        self.launch(job, x, coarse, table=table)
        bent = self.settings.acceleration and network.objective.exact
        curved = self._curved(x) if bent else None
        if self.cluster.distributes(n) and not self.plan.coupled:
            bands = self.cluster.bands(
                "gram", n, -(-n // self.cluster.processors), torch.float64, "vectors"
            )
            bands.add_up(table)
            grad = self.cluster.read(table.columns(n * n, n * n + n), "vectors").sum(0).to(x.device)
            return BandedTallSubproblem(
                bands, grad, x, self._products(x), self.settings.decay, curved
            )
        sums = self.cluster.total(table, "matrix").to(x.device)
        gram, grad = sums[: n * n].view(n, n), sums[n * n :]
        if self.plan.coupled:
            r = self._rows(self._point(x)).to(x.dtype)
            products, slope = self._products(x), self._slope(x, r)
            return TallSubproblem(gram, grad, x, r, products, self.settings.decay, slope)
        return ShardedTallSubproblem(gram, grad, x, self._products(x), self.settings.decay, curved)

    def _dual(self, x: Tensor, passes: Any) -> WideSubproblem:
        if self.plan.coupled:
            return super()._dual(x, None)
        m, tile, dtype = self.m, self.placed.tile * self.plan.k, accumulator(self.network, self.m)
        r = self.written(RowsJob, x).to(x.dtype)
        rest = x, r, self._products(x), self.settings.decay, self._slope(x, r)
        if self.cluster.distributes(m):
            bands = self.cluster.bands("kernel", m, tile, dtype, "residuals")
            self.launch(KernelJob, x, self._groups(), outputs=bands.outputs)
            return BandedWideSubproblem(bands, *rest)
        store = self.cluster.store("kernel", (m, m), dtype)
        self.launch(KernelJob, x, self._groups(), outputs=(store.partition_by_tiling((tile, m)),))
        kernel = self.cluster.read(store, "matrix").to(x.device)
        return WideSubproblem(kernel, *rest)

    def _products(self, x: Tensor) -> Products:
        return super()._products(x) if self.plan.coupled else ShardedProducts(self, x)

    def _rows(self, point: Point) -> Tensor:
        if self.plan.coupled:
            return super()._rows(point)
        x = torch.cat([t.reshape(-1) for t in point.tensors.values()])
        return self.written(RowsJob, x)

    def _curved(self, x: Tensor) -> Curved:
        """J'r_pp (n,) of a step, from J'J p if that is known."""

        def curved(p: Tensor, known: Tensor | None) -> Tensor:
            if known is None:
                return self._retry(lambda: self.added(CurvatureJob, x, p))
            slope = self._retry(lambda: self.added(SlopeJob, x, p))
            return second_derivative(slope.to(known), known)

        return curved

    def added(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """Sum (n,) of a job's vectors over the shards."""
        table = self.cluster.table("vector", self.placed.shards, self.network.parameters.n)
        self.launch(job, x, *arguments, table=table)
        return self.cluster.total(table, "vectors").to(x.device)

    def written(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """The shards' rows (m,) of a job."""
        store = self.cluster.store("rows", (self.m,), torch.float64)
        tiles = store.partition_by_tiling((self.placed.tile * self.plan.k,))
        self.launch(job, x, *arguments, outputs=(tiles,))
        return self.cluster.read(store, "residuals").to(x.device)

    def launch(
        self,
        job: type[Job],
        x: Tensor,
        *arguments: Any,
        table: Any = None,
        outputs: Sequence[Any] = (),
    ) -> np.ndarray:
        """Run a job of this batch at x; each shard's number."""
        with self.cluster.chained():
            made = job(self.placed, self.cluster.sent(x), self.plan, self.settings, *arguments)
            made.table = table
            return self.cluster.launch(made, outputs if table is None else table.outputs)


class ShardedProducts:
    """Products with rows that lie in shards: one launch each."""

    def __init__(self, problem: LegateProblem, x: Tensor) -> None:
        self._problem, self._x = problem, x

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        return self._problem.added(TransposedJob, self._x, z).to(z.dtype)

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        return self._problem.written(ProductJob, self._x, p).to(p.dtype)


class ShardedTallSubproblem(TallSubproblem):
    """Normal equations whose geodesic acceleration is added up in the shards too.

    Legate factors a large matrix where that pays.
    """

    def __init__(
        self,
        gram: Tensor,
        grad: Tensor,
        x: Tensor,
        products: Products,
        decay: float,
        curved: Curved | None,
    ) -> None:
        super().__init__(gram, grad, x, x.new_empty(0), products, decay, None)
        self._curved = curved

    def _factored(self, damping: float) -> Tensor:
        from lmsolve.legate import _cholesky

        if _cholesky.pays(self.gram.shape[0]):
            A = self.gram.clone()
            A.diagonal().add_(damping)
            made = _cholesky.LegateCholesky(A.cpu().numpy())
            if made.reproduces(A.cpu().numpy()):
                return torch.from_numpy(made.factor).to(self.gram.device)
        return factorized(self.gram, damping)

    def acceleration(self, p: Tensor) -> Tensor | None:
        """Geodesic acceleration (n,) of the last step."""
        if self._curved is None:
            return None
        assert self._factor is not None
        known = None if self._rounding_shows else self._curvature(p)
        return -0.5 * solved(self._factor, self._curved(p, known).to(p.dtype))
