"""Networks on Legate in two components: torch's devices make rows, Legate's processors add them up.

The batch goes to the model's devices slice by slice, cyclically. A slice's rows of J come to the
host, through pinned memory from a GPU, and Legate's tasks add them to the sums of their processors
while the next slice is computed. It costs a way through the host that `linalg='legate'` does not
have, and serves where the model and the sums must not share a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _jacobian
from ._chain import Chain
from ._chain_problem import ChainProblem
from ._cluster import Cluster
from ._jacobian import Plan, Point
from ._network import Batch, Network
from ._params import quiet_transforms
from ._problem import COARSE, HELD, Evaluation, NetworkProblem, Settings
from ._products import HeldProducts
from ._shards import copied, device_of, moved, stream_of, view_of
from ._subproblems import Curved, Linearised, Products, TallSubproblem
from ._sums import NormalSums

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard


@dataclass(frozen=True)
class Rows:
    """Rows on their way to the host."""

    r: Tensor
    J: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, Tensor]:
        """The rows once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.r, self.J


class AddJob:
    """Adds a processor's share of a slice to its row of the table of sums."""

    def __init__(
        self, r: Tensor, J: Tensor, table: Any, first: bool, block_dtype: torch.dtype | None
    ) -> None:
        shards = table.shards
        self.table = table
        self._r, self._J = r.tensor_split(shards), J.tensor_split(shards)
        self._n = J.shape[1]
        self._first = first
        self._block_dtype = block_dtype

    def __call__(self, shard: Shard) -> Sequence[float]:
        """Nothing to tell."""
        n, device = self._n, device_of(shard.stream)
        with stream_of(shard.stream):
            row = view_of(self.table.row(shard)).reshape(-1)
            if self._first:
                row.zero_()
            sums = NormalSums.into(row[: n * n].view(n, n), row[n * n :], self._block_dtype)
            r, J = (part[shard.index].to(device, non_blocking=True) for part in (self._r, self._J))
            if len(r):
                sums.add(r, J)
        return 0.0, 0.0, 0.0


class SplitProblem(NetworkProblem):
    """`NetworkProblem` with rows from several devices and sums on Legate's processors.

    With a ``chain`` its second derivatives are exact.
    """

    def __init__(
        self,
        network: Network,
        batch: Batch,
        plan: Plan,
        settings: Settings,
        cluster: Cluster,
        devices: Sequence[torch.device],
        chain: Chain | None = None,
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.chain = chain
        self.cluster = cluster
        self.devices = devices
        own = network.parameters.device
        self._replicas = [network if d == own else copied(network, d) for d in devices]
        self._moved: dict[tuple[int, int], Batch] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def linearize(self, x: Tensor, r: Evaluation, damping: float = 0.0) -> Linearised:
        """Subproblem at x (n,); MemoryError where Legate's pool is too small for it."""
        if self.form() == "normal":
            self.cluster.require_sums(self.network.parameters.n)
        return super().linearize(x, r, damping)

    def _evaluate(self, x: Tensor) -> Evaluation:
        # Passes that were kept would make rows on one device only.
        return super()._evaluate(x)._replace(passes=None)

    def _normal(self, x: Tensor, passes: Any, damping: float = 0.0) -> TallSubproblem:
        n, itemsize = self.network.parameters.n, self.network.parameters.dtype.itemsize
        table = self.cluster.table("sums", self.cluster.processors, n * n + n)
        coarse = self.network.parameters.dtype if damping > COARSE else None
        few = self.m * n * itemsize <= min(HELD, self._block_memory())
        r, held, first = [], [], True
        with self.cluster.overlapped() as adding:
            for rows, J in self._slices(x):
                adding.launch(AddJob(rows, J, table, first, coarse))
                first = False
                self.cluster.traffic["jacobian"] += J.nbytes
                self.cluster.traffic["residuals"] += rows.nbytes
                r.append(rows)
                if few:
                    held.append(J)
        sums = self.cluster.total(table, "matrix").to(x.device)
        whole = torch.cat(r).to(x)
        products: Products = self._products(x)
        if few:
            products = HeldProducts(torch.cat(held).to(x.device))
            if x.device.type != "cpu":
                self.cluster.traffic["jacobian"] += products.J.nbytes
        gram, grad = sums[: n * n].view(n, n), sums[n * n :]
        curved = self._curved(x, whole, products)
        return TallSubproblem(gram, grad, x, whole, products, self.settings.decay, curved)

    def _curved(self, x: Tensor, r: Tensor, products: Products) -> Curved | None:
        if self.chain is None or not self._accelerated:
            return super()._curved(x, r, products)
        problem = ChainProblem(self.network, self.batch, self.plan, self.settings, self.chain)
        return lambda p, known: problem.curvature(self._point(x), p)

    def _slices(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows on the host, in order; as many slices under way as there are devices."""
        under_way: deque[Rows] = deque()
        samples = self.batch.size if self.plan.coupled else self.plan.samples
        if len(self.devices) > 1 and not self.plan.coupled:  # each device has something to do
            samples = min(samples, -(-self.batch.size // len(self.devices)))
        for number, block in enumerate(self.batch.blocks(samples)):
            network = self._replicas[number % len(self.devices)]
            for rows in self._rows_of(network, block, x):
                under_way.append(rows)
                if len(under_way) > len(self.devices):
                    yield under_way.popleft().wait()
        while under_way:
            yield under_way.popleft().wait()

    def _moved_once(self, block: Batch, device: torch.device) -> Batch:
        """A slice of the batch on its device, there for all steps on the batch."""
        key = block.start, block.size
        if key not in self._moved:
            self._moved[key] = moved(block, device)
            self.cluster.traffic["samples"] += block.nbytes
        return self._moved[key]

    def _rows_of(self, network: Network, block: Batch, x: Tensor) -> Iterator[Rows]:
        device = network.parameters.device
        point = Point(
            network.parameters.unpack(x.to(device)), self.settings.scale, self.settings.seed
        )
        if device != self.network.parameters.device:
            block = self._moved_once(block, device)
        with quiet_transforms():
            for r, J in _jacobian.stream(network, block, point, self.plan):
                yield self._to_host(r.clone(), J.clone())  # the next slice overwrites them

    def _to_host(self, r: Tensor, J: Tensor) -> Rows:
        """Copies of rows on the host, from a GPU on a stream beside that of the computation."""
        if J.device.type == "cpu":
            return Rows(r, J, None)
        computing = torch.cuda.current_stream(J.device)
        if J.device not in self._streams:
            self._streams[J.device] = torch.cuda.Stream(J.device)  # type: ignore[no-untyped-call]
        copying = self._streams[J.device]
        copying.wait_stream(computing)
        pinned = [torch.empty(a.shape, dtype=a.dtype, pin_memory=True) for a in (r, J)]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(copying):
            for source, target in zip((r, J), pinned, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(copying)  # its memory is free after the copy, not before
            arrived.record(copying)
        return Rows(pinned[0], pinned[1], arrived)
