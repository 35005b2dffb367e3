"""What Legate's tasks do with a network: one shard of the samples each, in a thread of its own.

A job goes to every shard, computes with torch where the task runs, and leaves its part in a store:
a row of a table that is summed over the shards, or rows of its own. Parameters and host data reach
it through the job (every rank makes the same one), so that on CPUs nothing is copied, and on a GPU
the shard's samples are, once for each batch.

Tasks of one process are threads. `functional_call` on a module that two threads share gives
silently wrong results, so each thread has a copy; forward mode belongs to the whole process, so
everything here is reverse mode.
"""

from __future__ import annotations

import copy
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _factors, _jacobian
from ._factors import Factor, Pass, Pending
from ._jacobian import Plan, Point
from ._network import Batch, Network
from ._params import flat
from ._problem import Settings, add_up, holds
from ._products import FactorProducts, GraphProducts, HeldProducts
from ._subproblems import AHEAD, Products, second_derivative
from ._sums import DualKernel, NormalSums

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

Kept = tuple[np.ndarray, Any]  # something made at an x

# Up to so many rows of a sample, products from the factors of a pass are faster than those by
# autograd, which differentiates twice: 0.19 against 0.42 s for one row (1,026 parameters in
# convolutions, 2,000 samples), and each further row costs another backward pass.
FEW_PASSES = 2


class Placed:
    """A batch cut into shards, and what this process holds of it between launches."""

    def __init__(
        self, network: Network, batch: Batch, processors: int, traffic: Counter[str]
    ) -> None:
        self.network, self.batch, self.traffic = network, batch, traffic
        self.tile = -(-batch.size // processors)
        self.shards = -(-batch.size // self.tile)
        self.checksum = 0.0  # of the batch, where several ranks hold one
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._data: dict[tuple[int, torch.device], Batch] = {}
        self._pending: dict[int, Kept] = {}
        self._rows: dict[int, Kept] = {}

    def part(self, index: int) -> Batch:
        """A shard's samples, on the host or wherever the user left them."""
        return self.batch.block(index * self.tile, (index + 1) * self.tile)

    def on(self, device: torch.device, index: int) -> Batch:
        """A shard's samples on the device of its task: copied there once."""
        if device == self.network.parameters.device:
            return self.part(index)
        return self._moved_once(index, device, self.part(index))

    def whole_on(self, device: torch.device) -> Batch:
        """All samples on the device of a task, likewise."""
        if device == self.network.parameters.device:
            return self.batch
        return self._moved_once(-1, device, self.batch)

    def _moved_once(self, index: int, device: torch.device, part: Batch) -> Batch:
        if (index, device) not in self._data:
            found = moved(part, device)
            with self._lock:
                self.traffic["samples"] += found.nbytes
            self._data[index, device] = found
        return self._data[index, device]

    def network_on(self, device: torch.device) -> Network:
        """This thread's copy of the network."""
        copies = self._thread.__dict__.setdefault("copies", {})
        if device not in copies:
            with self._lock:
                copies[device] = copied(self.network, device)
        found: Network = copies[device]
        return found

    def keep_pending(self, index: int, x: np.ndarray, passes: list[Pending]) -> None:
        """Hold the forward passes of a trial point: it may be accepted."""
        self._pending[index] = x, passes

    def take_pending(self, index: int, x: np.ndarray) -> list[Pending] | None:
        """The forward passes at x, if this process has them; they serve once."""
        found: list[Pending] | None = _at(x, self._pending.pop(index, None))
        return found

    def keep_rows(self, index: int, x: np.ndarray, products: Products, r: Tensor) -> None:
        """Hold a linearisation's residuals, and products with its rows."""
        self._rows[index] = x, (products, r)

    def drop_rows(self, index: int) -> None:
        """Free what is held of the last linearisation."""
        self._rows.pop(index, None)

    def rows(self, index: int, x: np.ndarray) -> tuple[Products, Tensor] | None:
        """What this process holds of the linearisation at x."""
        found: tuple[Products, Tensor] | None = _at(x, self._rows.get(index))
        return found


def _at(x: np.ndarray, kept: Kept | None) -> Any:
    return kept[1] if kept is not None and np.array_equal(kept[0], x) else None


def copied(network: Network, device: torch.device) -> Network:
    """A network of its own for a thread; on the same device it shares the parameters' memory."""
    own = device == network.parameters.device
    # Their values come with every call, so that only what surrounds them must be separate.
    shared = {id(p): p for p in network.module.parameters()} if own else {}
    module = copy.deepcopy(network.module, shared)
    if own:
        return replace(network, module=module)
    parameters = replace(network.parameters, device=device)
    return replace(network, module=module.to(device), parameters=parameters)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Samples on another device."""

    def move(a: Any) -> Any:
        return a.to(device) if isinstance(a, Tensor) else a

    weights = None if batch.weights is None else batch.weights.to(device)
    inputs, targets = pytree.tree_map(move, (batch.inputs, batch.targets))
    return replace(batch, inputs=inputs, targets=targets, weights=weights)


def checksum(*arrays: np.ndarray) -> float:
    """Of the bits of arrays: ranks that hold different ones must stop, not wait for each other."""
    total = 0
    for a in arrays:
        total = zlib.crc32(np.ascontiguousarray(a).data, total)
    return float(total)


@dataclass(frozen=True)
class Here:
    """A task's shard where it runs."""

    index: int
    network: Network
    batch: Batch
    point: Point


class Job:
    """What a task does with its shard at one x, and the table that it writes into, if any."""

    table: Any = None

    def __init__(self, placed: Placed, x: Tensor, plan: Plan, settings: Settings) -> None:
        self.placed, self.plan, self.settings = placed, plan, settings
        self.x = x.detach().cpu().numpy()
        self._checksum = checksum(self.x)
        self.sent = Counter(vectors=self.x.nbytes)  # bytes that go to the tasks

    def __call__(self, shard: Shard) -> Sequence[float]:
        """A number of the shard's own, and the checksums of parameters and data."""
        device = device_of(shard.stream)
        with stream_of(shard.stream):
            network = self.placed.network_on(device)
            x = torch.from_numpy(self.x).to(device)
            point = Point(network.parameters.unpack(x), self.settings.scale, self.settings.seed)
            batch = self.placed.on(device, shard.index)
            here = Here(shard.index, network, batch, point)
            return self.compute(here, shard), self._checksum, self.placed.checksum

    def compute(self, here: Here, shard: Shard) -> float:
        """The work itself."""
        raise NotImplementedError

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
        kept = self.placed.rows(here.index, self.x)
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
            self.placed.keep_pending(here.index, self.x, passes)
        return cost


class SumsJob(Job):
    """Writes the shard's J'J and J'r into its row of a table, n * n + n numbers."""

    def __init__(
        self,
        placed: Placed,
        x: Tensor,
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
            self.placed.keep_rows(here.index, self.x, HeldProducts(J), r)
        elif done:
            self.placed.keep_rows(here.index, self.x, FactorProducts(done, parameters.offsets), r)
        return 0.0

    def sums(self, here: Here, shard: Shard) -> NormalSums:
        """The sums in the row's memory."""
        n, row = here.network.parameters.n, self.zeros(shard)
        gram, grad = row[: n * n].view(n, n), row[n * n :]
        return NormalSums.into(gram, grad, self._block_dtype)

    def _pending(self, here: Here) -> list[Pending]:
        found = self.placed.take_pending(here.index, self.x)
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


class CurvatureJob(Job):
    """Writes the shard's J'r_pp (n,) into its row of a table: the geodesic acceleration's.

    No number of residuals' size leaves the task.
    """

    def __init__(
        self, placed: Placed, x: Tensor, plan: Plan, settings: Settings, p: Tensor
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._p = p.detach().cpu()
        self.sent["vectors"] += self._p.nbytes

    def compute(self, here: Here, shard: Shard) -> float:
        """Second difference of the residuals along p."""
        out = self.zeros(shard)
        x, p = torch.from_numpy(self.x).to(out.device), self._p.to(out.device)
        ahead = replace(here.point, tensors=here.network.parameters.unpack(x + AHEAD * p))
        for block, products, r in self.linear(here):
            Jp = products.product(p).to(x.dtype)
            r_ahead = self.rows(replace(here, batch=block, point=ahead)).to(x.dtype)
            slope = (r_ahead - r.to(x.dtype)) / AHEAD
            out += products.transposed(second_derivative(slope, Jp))
        return 0.0


class SlopeJob(CurvatureJob):
    """Writes J' times the residuals' slope over a share of the step; J'J p makes J'r_pp of it."""

    def compute(self, here: Here, shard: Shard) -> float:
        """One backward pass for all residuals of a block."""
        out = self.zeros(shard)
        x, p, point = torch.from_numpy(self.x).to(out.device), self._p.to(out.device), here.point
        ahead = replace(point, tensors=here.network.parameters.unpack(x + AHEAD * p))
        kept = self.placed.rows(here.index, self.x)
        if kept is not None:
            products, r = kept
            out += products.transposed((self.rows(replace(here, point=ahead)) - r) / AHEAD)
            return 0.0
        for block in here.batch.blocks(self.evaluation_samples()):
            leaves = {name: t.detach().requires_grad_() for name, t in point.tensors.items()}
            rows = here.network.judge(leaves, block, point.scale, point.seed).rows
            r_ahead = self.rows(replace(here, batch=block, point=ahead)).view_as(rows)
            slope = (r_ahead - rows.detach()) / AHEAD
            wanted = list(leaves.values())
            out += flat(torch.autograd.grad(rows, wanted, slope, allow_unused=True), wanted)
        return 0.0


class RowsJob(Job):
    """Writes the shard's rows r into its part of a store (m,)."""

    def compute(self, here: Here, shard: Shard) -> float:
        """One forward pass."""
        view_of(shard.outputs[0]).copy_(self.rows(here))
        return 0.0


class ProductJob(Job):
    """Writes the shard's part of `J p` into its part of a store (m,)."""

    def __init__(
        self, placed: Placed, x: Tensor, plan: Plan, settings: Settings, p: Tensor
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._p = p.detach().cpu()
        self.sent["vectors"] += self._p.nbytes

    def compute(self, here: Here, shard: Shard) -> float:
        """Twice backward, or from the factors of a pass."""
        out = view_of(shard.outputs[0])
        p = self._p.to(out.device)
        out.copy_(torch.cat([products.product(p) for _, products, _ in self.linear(here)]))
        return 0.0


class TransposedJob(Job):
    """Writes the shard's part of `J'z` (n,) into its row of a table."""

    def __init__(
        self, placed: Placed, x: Tensor, plan: Plan, settings: Settings, z: Tensor
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._z = z.detach().cpu()
        self.sent["residuals"] += self._z.nbytes

    def compute(self, here: Here, shard: Shard) -> float:
        """One backward pass."""
        out = self.zeros(shard)
        first = here.index * self.placed.tile * self.plan.k
        z = self._z[first : first + here.batch.size * self.plan.k].to(out.device)
        for _, products, r in self.linear(here):
            out += products.transposed(z[: len(r)])
            z = z[len(r) :]
        return 0.0


class KernelJob(Job):
    """Writes the shard's rows of `K = J J'`, lower triangle, into its part of a store (m, m).

    A row of K needs all samples: each task runs them all, which costs little beside the m^2 n
    operations of K that are shared out, and J is held for one parameter, or a group of them.
    """

    def __init__(
        self, placed: Placed, x: Tensor, plan: Plan, settings: Settings, groups: list[range]
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


def view_of(store: Any) -> Tensor:
    """A store's, or an array's, memory where it lies."""
    return torch.utils.dlpack.from_dlpack(store)


def device_of(stream: int | None) -> torch.device:
    """Device of a task: CPU tasks have no stream."""
    if stream is None:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def stream_of(stream: int | None) -> AbstractContextManager[Any]:
    """The stream of a task on a GPU; on a CPU one thread, for a task has one processor."""
    if stream is None:
        if torch.get_num_threads() != 1:  # of this thread
            torch.set_num_threads(1)
        return nullcontext()
    context: AbstractContextManager[Any] = torch.cuda.stream(
        torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    )
    return context
