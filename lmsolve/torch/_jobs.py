"""What Legate's tasks do with a network, one shard of the samples each: cost, rows and their sums.

A job goes to every shard, computes with torch where the task runs, and leaves its part in a store:
a row of a table that is summed over the shards, or rows of its own. Forward mode belongs to the
whole process, and tasks are its threads, so everything here is reverse mode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _factors, _jacobian
from ._factors import Factor, Pass, Pending
from ._jacobian import Plan, Point
from ._network import Batch, Network
from ._problem import Settings, add_up, holds
from ._products import FactorProducts, GraphProducts, HeldProducts
from ._shards import Placed, device_of, stream_of, view_of
from ._subproblems import Products
from ._sums import DualKernel, NormalSums
from ._vectors import Stored, Weights

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

# Up to so many rows of a sample, products from the factors of a pass are faster than those by
# autograd, which differentiates twice: 0.19 against 0.42 s for one row (1,026 parameters in
# convolutions, 2,000 samples), and each further row costs another backward pass.
FEW_PASSES = 2


@dataclass(frozen=True)
class Here:
    """A task's shard where it runs."""

    index: int
    network: Network
    batch: Batch
    x: Tensor
    point: Point


class Job(ABC):
    """What a task does with its shard at one x, and the table that it writes into, if any."""

    table: Any = None

    def __init__(self, placed: Placed, x: Weights, plan: Plan, settings: Settings) -> None:
        self.placed, self.x, self.plan, self.settings = placed, x, plan, settings
        self.inputs = x.inputs
        self.sent: Counter[str] = Counter()  # bytes that go to the tasks

    def __call__(self, shard: Shard) -> Sequence[float]:
        """A number of the shard's own, and the checksums of parameters and data."""
        device = device_of(shard.stream)
        with stream_of(shard.stream):
            network = self.placed.network_on(device)
            # A copy of a store's: passes that are kept outlive the launch.
            x = self.x.place
            x = view_of(shard.inputs[0]).clone() if isinstance(x, Stored) else x
            point = Point(network.parameters.unpack(x), self.settings.scale, self.settings.seed)
            batch = self.placed.on(device, shard.index)
            here = Here(shard.index, network, batch, x, point)
            return self.compute(here, shard), self.x.fingerprint, self.placed.checksum

    @abstractmethod
    def compute(self, here: Here, shard: Shard) -> float:
        """The work itself."""

    def zeros(self, shard: Shard) -> Tensor:
        """The shard's row of the table, flat, at zero."""
        return view_of(self.table.row(shard)).reshape(-1).zero_()

    @property
    def keeps(self) -> bool:
        """Whether the passes of all the shards may stay in memory between launches."""
        plan = self.plan
        room = plan.activation_bytes * self.placed.batch.size
        return plan.way == "factors" and room <= self.settings.memory // 4

    def evaluation_samples(self) -> int:
        """Samples in a block of a forward pass; as in the Jacobian where masks depend on it."""
        if self.plan.way == "factors" or self.settings.seed is not None:
            return self.plan.samples
        return max(self.plan.samples, 1024)

    def rows(self, here: Here) -> Tensor:
        """The shard's residuals, or rows of its loss, flat."""
        blocks = here.batch.blocks(self.evaluation_samples())
        point = here.point
        judged = [here.network.judge(point.tensors, b, point.scale, point.seed) for b in blocks]
        return torch.cat([j.rows.detach().reshape(-1) for j in judged])

    def linear(self, here: Here) -> Iterator[tuple[Batch, Products, Tensor]]:
        """The shard's samples in parts: each with products with its rows, and its residuals."""
        kept = self.placed.rows(here.index, self.x.token)
        if kept is not None:
            yield here.batch, *kept
            return
        network, point = here.network, here.point
        for block in here.batch.blocks(self.evaluation_samples()):
            if self.plan.way == "factors" and self.plan.k <= FEW_PASSES:
                found = _factors.run(
                    network, point.tensors, block, point.scale, point.seed
                ).backward()
                products = FactorProducts([unfolded(found)], network.parameters.offsets)
                yield block, products, found.rows.reshape(-1)
            else:
                graph = GraphProducts(network, block, point, block.size, _forward_mode=False)
                yield block, graph, self.rows(replace(here, batch=block))


def unfolded(found: Pass) -> Pass:
    """A pass for several products: what a convolution sees at its places is laid out once."""

    def laid_out(use: Factor) -> Factor:
        return use if use.inputs is None else replace(use, inputs=use.a)

    return replace(found, factors=[[laid_out(use) for use in uses] for uses in found.factors])


class CostJob(Job):
    """The shard's part of the cost."""

    def compute(self, here: Here, shard: Shard) -> float:
        """Forward passes; they are kept for the case that the point is accepted."""
        network, point, cost = here.network, here.point, 0.0
        passes: list[Pending] = []
        for block in here.batch.blocks(self.evaluation_samples()):
            if self.keeps:
                passes.append(_factors.run(network, point.tensors, block, point.scale, point.seed))
                cost += float(passes[-1].cost.sum())
            else:
                judged = network.judge(point.tensors, block, point.scale, point.seed)
                cost += float(judged.cost.detach().sum())
        if self.keeps:
            self.placed.keep_pending(here.index, self.x.token, passes)
        return cost


class SumsJob(Job):
    """Writes the shard's J'J and J'r into its row of a table, n * n + n numbers."""

    def __init__(
        self,
        placed: Placed,
        x: Weights,
        plan: Plan,
        settings: Settings,
        block_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._block_dtype = block_dtype

    def compute(self, here: Here, shard: Shard) -> float:
        """Rows in blocks, held only where they are few."""
        self.placed.drop_rows(here.index)
        sums, network, done = self.sums(here, shard), here.network, list[Pass]()
        parameters, m = network.parameters, self.plan.k * here.batch.size
        J = None
        if holds(self.plan, self.settings, self.placed.shards * m, parameters, self.keeps):
            J = sums.grad.new_empty((m, parameters.n), dtype=parameters.dtype)
        if self.keeps:
            kept = done if J is None else None
            passes = self._pending(here)
            blocks = _jacobian.rows_of_passes(network, passes, sums.block_dtype, kept)
        else:
            blocks = _jacobian.stream(network, here.batch, here.point, self.plan)
        r = add_up(blocks, sums, J)
        if J is not None:
            self.placed.keep_rows(here.index, self.x.token, HeldProducts(J), r)
        elif done:
            self.placed.keep_rows(
                here.index, self.x.token, FactorProducts(done, parameters.offsets), r
            )
        return 0.0

    def sums(self, here: Here, shard: Shard) -> NormalSums:
        """The sums in the row's memory."""
        n, row = here.network.parameters.n, self.zeros(shard)
        gram, grad = row[: n * n].view(n, n), row[n * n :]
        return NormalSums.into(gram, grad, self._block_dtype)

    def _pending(self, here: Here) -> list[Pending]:
        found = self.placed.take_pending(here.index, self.x.token)
        if found is not None:
            return found
        blocks, point = here.batch.blocks(self.plan.samples), here.point
        return [
            _factors.run(here.network, point.tensors, b, point.scale, point.seed) for b in blocks
        ]


class CoupledSumsJob(SumsJob):
    """J'J and J'r of a batch whose samples see each other: a task takes some of the rows.

    Every task runs the whole batch forward, which is the price of its statistics; the backward
    passes, one a row, are shared out.
    """

    def compute(self, here: Here, shard: Shard) -> float:
        """Backward passes for the rows of this shard."""
        sums, m = self.sums(here, shard), self.plan.k
        tile = -(-m // self.placed.shards)
        some = range(here.index * tile, min((here.index + 1) * tile, m))
        whole = self.placed.whole_on(sums.gram.device)
        rows = _jacobian.coupled_rows(here.network, whole, here.point, self.plan, some)
        for r, J in rows if some else ():
            sums.add(r, J)
        return 0.0


class RowsJob(Job):
    """Writes the shard's rows r into its part of a store (m,)."""

    def compute(self, here: Here, shard: Shard) -> float:
        """One forward pass."""
        view_of(shard.outputs[0]).copy_(self.rows(here))
        return 0.0


class KernelJob(Job):
    """Writes the shard's rows of `K = J J'`, lower triangle, into its part of a store (m, m).

    A row of K needs all samples: each task runs them all, which costs little beside the m^2 n
    operations of K that are shared out, and J is held for one parameter, or a group of them.
    """

    def __init__(
        self, placed: Placed, x: Weights, plan: Plan, settings: Settings, groups: list[range]
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._groups = groups

    def compute(self, here: Here, shard: Shard) -> float:
        """One parameter after another."""
        band = view_of(shard.outputs[0])
        band.zero_()
        lo = here.index * self.placed.tile
        own = range(lo, lo + here.batch.size)
        if self.plan.way == "factors":
            found = _factors.joined([pending.backward() for pending in self._all(here)])
            sizes, k = tuple(here.network.parameters.sizes), self.plan.k
            memory = self.settings.memory // 4 // self.placed.shards
            kernel = DualKernel(found.factors, sizes, self.placed.batch.size, k, memory)
            kernel.add_band(band, own)
            return 0.0
        rows = slice(own.start * self.plan.k, own.stop * self.plan.k)
        for group in self._groups:
            J = torch.cat([J.to(band.dtype) for J in self._columns(here, group)])
            band.addmm_(J[rows], J.T)
        return 0.0

    def _parts(self, here: Here) -> Iterator[Batch]:
        """All samples, cut as at every other launch: dropout masks depend on it."""
        device = here.network.parameters.device
        for index in range(self.placed.shards):
            yield self.placed.on(device, index)

    def _all(self, here: Here) -> list[Pending]:
        point = here.point
        return [
            _factors.run(here.network, point.tensors, block, point.scale, point.seed)
            for part in self._parts(here)
            for block in part.blocks(self.plan.samples)
        ]

    def _columns(self, here: Here, group: range) -> Iterator[Tensor]:
        for part in self._parts(here):
            for _, J in _jacobian.stream(here.network, part, here.point, self.plan, group):
                yield J
