"""Networks on Legate, in place: rows of J are computed where their samples are, and added up there.

At a trial each shard returns its part of the cost, one number. At an accepted point

    m >= n   each shard adds up J'J and J'r of its rows, and the shards' sums are summed;
    m < n    each shard makes its rows of K = J J', which needs no J but that of one parameter.

Small matrices are solved on the host, which reads n^2 + n numbers, or m^2, for an accepted step;
large ones stay in bands on the processors (`_bands`), all vectors of a step with them. J never
leaves its device and is never held.
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

from ._bands import BandedTallSubproblem, BandedWideSubproblem
from ._chain import Chain
from ._cluster import Cluster
from ._jacobian import Plan, Point
from ._jobs import CostJob, CoupledSumsJob, Job, KernelJob, RowsJob, SumsJob
from ._network import Batch, Network
from ._problem import COARSE, Evaluation, NetworkProblem, Settings, accumulator
from ._shards import Placed, checksum
from ._subproblems import (
    AHEAD,
    Curved,
    Linearised,
    Products,
    TallSubproblem,
    WideSubproblem,
    factorized,
    second_derivative,
)
from ._vector_jobs import BendJob, CurvatureJob, ProductJob, SlopeJob, TransposedJob
from ._vectors import Stored, combined


class LegateProblem(NetworkProblem):
    """`NetworkProblem` with its rows on Legate's processors.

    With a ``chain`` its second derivatives are exact.
    """

    def __init__(
        self,
        network: Network,
        batch: Batch,
        plan: Plan,
        settings: Settings,
        cluster: Cluster,
        chain: Chain | None = None,
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.cluster = cluster
        self.placed = Placed(network, batch, cluster.processors, cluster.traffic)
        self.placed.chain = chain
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

    @property
    def distributed(self) -> bool:
        """Whether matrix and vectors stay with Legate."""
        form = self.form()
        size = self.network.parameters.n if form == "normal" else self.m
        usable = form != "products" and not self.plan.coupled
        return usable and self.cluster.distributes(size)

    def _evaluate(self, x: Any) -> Evaluation:
        if self.plan.coupled:
            return super()._evaluate(x)
        costs = self.launch(CostJob, x)
        square = x.square if isinstance(x, Stored) else x.to(torch.float64).square().sum()
        cost = 0.5 * self.settings.decay * square + float(costs.sum())
        return Evaluation(torch.as_tensor(cost, dtype=torch.float64), None)

    def _normal(self, x: Any, passes: Any, damping: float = 0.0) -> Any:
        network, n, cluster = self.network, self.network.parameters.n, self.cluster
        decay = self.settings.decay
        table = cluster.table("sums", self.placed.shards, n * n + n)
        coarse = network.parameters.dtype if damping > COARSE else None
        job = CoupledSumsJob if self.plan.coupled else SumsJob
        self.launch(job, x, coarse, table=table)
        if self.distributed:
            bands = cluster.bands("gram", n, cluster.tile(n), torch.float64)
            bands.add_up(table)
            g = combined(cluster, (decay, x), rows=table.columns(n * n, n * n + n))
            return BandedTallSubproblem(
                g, bands, x, StoredProducts(self, x), decay, self._accelerated
            )
        sums = cluster.total(table, "matrix").to(x.device)
        gram, grad = sums[: n * n].view(n, n), sums[n * n :]
        form: type[TallSubproblem] = ShardedTallSubproblem
        r, products = x.new_empty(0), self._products(x)
        if self.plan.coupled:
            form, r = TallSubproblem, self._rows(self._point(x)).to(x.dtype)
        return form(gram, grad, x, r, products, decay, self._curved(x, r, products))

    def _dual(self, x: Any, passes: Any) -> Any:
        if self.plan.coupled:
            return super()._dual(x, None)
        m, tile, dtype = self.m, self.placed.tile * self.plan.k, accumulator(self.network, self.m)
        if self.distributed:
            bands = self.cluster.bands("kernel", m, tile, dtype)
            self.launch(KernelJob, x, self._groups(), outputs=bands.outputs)
            there, decay = StoredProducts(self, x), self.settings.decay
            return BandedWideSubproblem(there.rows(), bands, x, there, decay, self._accelerated)
        r = self.written(RowsJob, x).to(x.dtype)
        store = self.cluster.store("kernel", (m, m), dtype)
        self.launch(KernelJob, x, self._groups(), outputs=(store.partition_by_tiling((tile, m)),))
        kernel = self.cluster.read(store, "matrix").to(x.device)
        rest = self._products(x), self.settings.decay, self._slope(x, r)
        return WideSubproblem(kernel, x, r, *rest)

    def _products(self, x: Tensor) -> Products:
        return super()._products(x) if self.plan.coupled else ShardedProducts(self, x)

    def _rows(self, point: Point) -> Tensor:
        if self.plan.coupled:
            return super()._rows(point)
        x = torch.cat([t.reshape(-1) for t in point.tensors.values()])
        return self.written(RowsJob, x)

    def _curved(self, x: Tensor, r: Tensor, products: Products) -> Curved | None:
        if self.plan.coupled or not self._accelerated:
            return super()._curved(x, r, products)

        def curved(p: Tensor, known: Tensor | None) -> Tensor:
            if known is None or self.placed.chain is not None:
                return self._retry(lambda: self.added(CurvatureJob, x, p))
            slope = self._retry(lambda: self.added(SlopeJob, x, p))
            return second_derivative(slope.to(known), known)

        return curved

    def added(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """Sum (n,) of a job's vectors over the shards."""
        table = self.table(job, x, *arguments)
        return self.cluster.total(table, "vectors").to(x.device)

    def table(self, job: type[Job], x: Tensor | Stored, *arguments: Any) -> Any:
        """A job's vectors (n,), a row for each shard."""
        table = self.cluster.table("vector", self.placed.shards, self.network.parameters.n)
        self.launch(job, x, *arguments, table=table)
        return table

    def written(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """The shards' rows (m,) of a job."""
        store = self.cluster.store("rows", (self.m,), torch.float64)
        tiles = store.partition_by_tiling((self.placed.tile * self.plan.k,))
        self.launch(job, x, *arguments, outputs=(tiles,))
        return self.cluster.read(store, "residuals").to(x.device)

    def launch(
        self,
        job: type[Job],
        x: Tensor | Stored,
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


class StoredProducts:
    """Products with rows that lie in shards, of vectors that lie in stores."""

    def __init__(self, problem: LegateProblem, x: Stored) -> None:
        self._problem, self._x = problem, x

    def transposed(
        self,
        z: Stored,
        term: tuple[float, Stored],
        weight: float = 1.0,
        against: Stored | None = None,
    ) -> Stored:
        """J'z (n,) times its weight, and a term more."""
        return self._added(TransposedJob, z, term, weight, against)

    def product(self, p: Stored) -> tuple[Stored, float]:
        """J p (m,), and its square."""
        return self._written(ProductJob, p)

    def bent(self, p: Stored) -> tuple[Stored, float]:
        """r_pp (m,) of a step, and |J p|^2."""
        return self._written(BendJob, p)

    def curved(self, p: Stored, known: Stored | None) -> Stored:
        """J'r_pp (n,) of a step, from J'J p if that is known."""
        if known is None or self._problem.placed.chain is not None:
            return self._added(CurvatureJob, p, (0.0, p))
        return self._added(SlopeJob, p, (-2 / AHEAD, known), 2 / AHEAD)

    def rows(self) -> Stored:
        """Residuals (m,)."""
        return self._written(RowsJob)[0]

    def _added(
        self,
        job: type[Job],
        v: Stored,
        term: tuple[float, Stored],
        weight: float = 1.0,
        against: Stored | None = None,
    ) -> Stored:
        problem, n = self._problem, self._x.size
        table = problem._retry(lambda: problem.table(job, self._x, v))
        rows = table.columns(0, n)
        return combined(problem.cluster, term, rows=rows, weight=weight, against=against)

    def _written(self, job: type[Job], *arguments: Stored) -> tuple[Stored, float]:
        problem = self._problem
        out = problem.cluster.vector(problem.m, problem.placed.tile * problem.plan.k)
        numbers = problem._retry(
            lambda: problem.launch(job, self._x, *arguments, outputs=(out.tiles,))
        )
        return out, float(numbers.sum())


class ShardedTallSubproblem(TallSubproblem):
    """Normal equations whose matrix Legate factors where that pays."""

    def _factored(self, damping: float) -> Tensor:
        from lmsolve.legate import _cholesky

        if _cholesky.pays(self.gram.shape[0]):
            A = self.gram.clone()
            A.diagonal().add_(damping)
            made = _cholesky.LegateCholesky(A.cpu().numpy())
            if made.reproduces(A.cpu().numpy()):
                return torch.from_numpy(made.factor).to(self.gram.device)
        return factorized(self.gram, damping)
