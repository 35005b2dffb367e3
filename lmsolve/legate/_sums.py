"""Costs, J'J and J'r of arrays that exist already, reduced where they are by Legate's tasks.

Residuals r (m,) and a Jacobian J (m, n) of cuPyNumeric stay in Legate's memory; those of NumPy are
read by the tasks in place, block by block. The host gets one row of status numbers for each shard
at a trial, and n^2 + n sums at an accepted point. What comes in blocks, one array after the other,
adds up in the shards, and is read once, at the end.

A loss of the user's may compute with cuPyNumeric, which a task may not: its values are evaluated
outside and go to the tasks with r.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lmsolve._loss import Loss, UserLoss
from lmsolve._subproblem import Subproblem
from lmsolve._sums import LOCAL, BlockCosts, BlockSums, LocalSums
from lmsolve._threads import one_thread
from lmsolve._xp import Array, Namespace, array_namespace, is_cupynumeric, to_numpy

from . import _memory
from ._blocks import NumpyBlocks, TorchBlocks
from ._iterated import IteratedEquations, WideProducts
from ._reduce import CostJob, CostSums, SumsJob, cost_of, rows_of_block
from ._start import check_startable
from ._wide import WideEquations

if TYPE_CHECKING:
    from ._reduce import Layout
    from ._tasks import Shard

#: With fewer multiplications than this in J'J (m n^2) a launch costs more than it saves.
SMALL = 2e8
#: The same for J J' of NumPy's J with m < n (m^2 n): two CPUs take 1.4 to 1.8 times NumPy's time at
#: 2e8, 0.9 at 8e8 and 0.76 at 8e9.
WIDE = 1e9
#: The same for the number of residuals, if they are in Legate's memory.
SHORT = 1_000_000
#: Rows of a block of residuals: 2 MB.
RESIDUALS = 2**18


class ShardedSums(LocalSums):
    """Sums over rows taken by Legate, where that pays."""

    def __init__(self, everything: bool) -> None:
        self._everything = everything
        self._reductions: dict[tuple[int, Any], CostSums] = {}

    def covers(self, m: int, n: int) -> bool:
        """Whether a dense problem is left to NumPy."""
        return not self.pays(m, n)

    def pays(self, m: int, n: int) -> bool:
        """Whether sums over m rows of arrays in Legate's memory are worth a launch."""
        return self._everything or m >= SHORT or m * n * n >= SMALL

    def cost(self, xp: Namespace, r: Array, loss: Loss | None) -> Array:
        """Cost of residuals r (m,): one launch, and one read of some numbers."""
        if not is_cupynumeric(r):
            return LOCAL.cost(xp, r, loss)
        sums = self.reductions(0, loss)
        return sums.cost(sums.layout(r.shape[0], parts(r, loss)), NOWHERE)

    def subproblem(
        self,
        xp: Namespace,
        J: Array,
        r: Array,
        loss: Loss | None,
        memory: dict[str, Any] | None = None,
    ) -> Subproblem:
        """Subproblem of J (m, n) and r (m,): one launch, and one read of the sums."""
        m, n = J.shape
        if not (self.takes(J.T, r, WIDE) if m < n else self.takes(J, r)):
            return LOCAL.subproblem(xp, to_numpy(J), to_numpy(r), loss, memory)
        if m < n:
            return WideEquations(J, *weighted(r, loss), _blocks(), is_cupynumeric(r))
        sums = self.reductions(n, loss)
        return sums.subproblem(sums.layout(m, (J, *parts(r, loss))), np.zeros(1, dtype=r.dtype))

    def iterated(
        self, xp: Namespace, J: Array, r: Array, loss: Loss | None, options: dict[str, Any]
    ) -> Subproblem:
        """Subproblem of J (m, n) to be iterated on: a launch for each product."""
        m, n = J.shape
        if not is_cupynumeric(J):
            return super().iterated(xp, J, to_numpy(r), loss, options)
        if m < n:
            w, r = weighted(r, loss)
            return WideProducts(WideEquations(J, w, r, _blocks(), False), r, options)
        sums = self.reductions(n, loss)
        layout = sums.layout(m, (J, *parts(r, loss)))
        return IteratedEquations(sums, layout, r.dtype, options)

    def curvature_rows(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Of J (m, n) that stayed in Legate's memory: a launch and a read, two with a loss."""
        if not is_cupynumeric(J) or J.shape[0] < J.shape[1]:
            return None
        m, n = J.shape
        sums = self.reductions(n, loss)
        return sums.curvature_rows(sums.layout(m, (J, *parts(r, loss))), NOWHERE, loss is not None)

    def columns(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[WideEquations, np.ndarray | None] | None:
        """Of J (m, n) with m < n that stayed in Legate's memory: see LocalSums."""
        if not is_cupynumeric(J) or J.shape[0] >= J.shape[1]:
            return None
        scores, w = None, np.ones(J.shape[0])
        if loss is not None:
            r = _for_loss(r, loss)
            xp = array_namespace(r)
            w = to_numpy(loss.curvature_weights(xp, r)).astype(float)
            scores = to_numpy(loss.scores(xp, r)) / w
        return WideEquations(J, w, np.zeros(J.shape[0]), _blocks(), False), scores

    def reserve(self, r: Array, n: int) -> None:
        """Raise MemoryError if a Jacobian by differences of residuals r (m,) would not fit."""
        if is_cupynumeric(r):
            layout = self.reductions(n, None).layout(r.shape[0], (r,))
            need = layout.resident * (n + 5)  # beside J what the difference of a column takes
            _memory.require(need, layout.option, "The differences of `fun`")

    def block_costs(self, xp: Namespace, loss: Loss | None) -> BlockCosts:
        """Costs of blocks of residuals, those of Legate read once at the end."""
        return ShardedBlockCosts(self, xp, loss)

    def block_sums(self, xp: Namespace, loss: Loss | None, n: int) -> BlockSums:
        """J'J and J'r of blocks of rows, those of Legate read once at the end."""
        return ShardedBlockSums(self, xp, loss, n)

    def reductions(self, n: int, loss: Loss | None) -> CostSums:
        """The reductions of arrays of n columns."""
        key = n, loss
        if key not in self._reductions:
            self._reductions[key] = CostSums(ArrayFunctions(n, loss))
        return self._reductions[key]

    @cached_property
    def _starts(self) -> bool:
        """Whether Legate runs, or would start: looked at once in a call, which takes 30 ms."""
        try:
            check_startable()
        except (ImportError, RuntimeError):
            return False
        return True

    def takes(self, J: Array, r: Array, small: float = SMALL) -> bool:
        """Whether rows J (k, n) with residuals r (k,) go to Legate; NumPy's from ``small`` on."""
        k, n = J.shape
        if is_cupynumeric(J) or is_cupynumeric(r):
            return self.pays(k, n)
        return (self._everything or k * n * n >= small) and self._starts


#: Parameters of functions that do not depend on them.
NOWHERE = np.zeros(1)


def parts(r: Array, loss: Loss | None) -> tuple[Array, ...]:
    """Residuals, with rho, rho' and rho'' (m,) each where the loss is the user's."""
    if loss is None or not isinstance(loss.rho, UserLoss):
        return (r,)
    return (r, *loss.rho(array_namespace(r), (r / loss.f_scale) ** 2))


def weighted(r: Array, loss: Loss | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (m,) of the rows, and the residuals (m,) that go with them, on the host."""
    if loss is None:
        r = to_numpy(r)
        return np.ones_like(r), r
    r = _for_loss(r, loss)
    w, r = loss.weights(array_namespace(r), r)
    return to_numpy(w), to_numpy(r)


def _for_loss(r: Array, loss: Loss) -> Array:
    """Residuals (m,) where the loss is to be evaluated: a user's may compute with cuPyNumeric."""
    return r if isinstance(loss.rho, UserLoss) else to_numpy(r)


class ArrayFunctions:
    """What the jobs of `_reduce` ask for, from blocks of arrays: see `parts`, with J first."""

    numbered = False

    def __init__(self, n: int, loss: Loss | None) -> None:
        self.n, self._loss = n, loss
        self.blocks = _blocks()
        self.block_rows = rows_of_block(n) if n else RESIDUALS

    def cost(self, x: Array, block: tuple[Any, ...], b: int) -> Array:
        """0-d cost of a block."""
        r, *values = block
        return cost_of(r, self._known(values))

    def linear(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array, Loss | None]:
        """r (b,) and J (b, n) of a block, and the loss."""
        J, r, *values = block
        return r, J, self._known(values)

    def _known(self, values: Sequence[Array]) -> Loss | None:
        """The loss, with its values where those are given."""
        if self._loss is None or not values:
            return self._loss
        rho = values[0], values[1], values[2]
        return self._loss._replace(rho=lambda xp, z: rho)


def _blocks() -> NumpyBlocks | TorchBlocks:
    """torch on GPUs, where its tensors stay; NumPy on CPUs."""
    from legate.core import TaskTarget

    from ._tasks import processors

    if processors(TaskTarget.GPU):
        import torch

        if torch.cuda.is_available():
            return TorchBlocks("float64")
    return NumpyBlocks("float64")


class Kept:
    """What the shards of this rank have added up over several launches.

    Those are awaited one by one, which bounds the memory of blocks that are made on the way. But
    nothing is read of them: an exception waits for the last launch, which tells every rank.
    """

    def __init__(self, sums: CostSums) -> None:
        self.sums = sums
        self.costs: dict[int, float] = {}
        self.rows: dict[int, tuple[np.ndarray, Any]] = {}
        self._failures: list[Exception] = []
        self._lock = threading.Lock()
        self._table: Any = None

    def launch(self, job: CostJob | SumsJob) -> None:
        """Run a job of one block."""
        layout = job.layout
        tasks = self.sums.tasks
        with tasks.no_collection(), one_thread():
            launch = tasks.Launch(job, layout.shards, layout.target, layout.parts)
            self._failures += launch.finish()

    def cost(self) -> float:
        """The cost over all shards and ranks: one launch, one read."""
        return self._total()

    def normal_sums(self, size: int) -> np.ndarray:
        """The sums (size,) over all shards and ranks: one launch, and one read on many ranks."""
        layout = self.sums.layout(1, ())
        if layout.ranks == 1:
            self._total()
            return _added(self.rows, size)[0]
        self._table = self.sums.place(self._everywhere(), size, "The sums J'J")
        self._total()
        total: np.ndarray = self._table.total()
        return total

    def _everywhere(self) -> Layout:
        return self.sums.layout(2**30, ())  # a shard for every processor

    def _total(self) -> float:
        layout = self._everywhere()
        outputs = () if self._table is None else self._table.outputs
        status = self.sums.tasks.launch(self._report, layout.shards, layout.target, (), outputs)
        return float(status[:, 0].sum())

    def _report(self, shard: Shard) -> tuple[float, float, float]:
        """Job: the first shard of a rank to come gives all that the rank has."""
        with self._lock:
            costs, self.costs = self.costs, {}
            failures, self._failures = self._failures, []
            if self._table is not None:
                rows, self.rows = self.rows, {}
        if failures:
            raise failures[0]
        if self._table is not None:
            row = _added(rows, self._table.size)
            self.sums.tasks.write(self._table.row(shard), row, shard.stream)
        return sum(costs[i] for i in sorted(costs)), 0.0, 0.0


def _added(rows: dict[int, tuple[np.ndarray, Any]], size: int) -> np.ndarray:
    """The sums (1, size) of some shards, added up in their order in the first one's memory."""
    total = None
    for index in sorted(rows):
        row, sums = rows[index]
        sums.finish()
        total = row if total is None else np.add(total, row, out=total)
    return np.zeros((1, size)) if total is None else total


class _KeptCost(CostJob):
    """The cost of a shard of a block, added to what was kept."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        costs = self.place.costs
        costs[shard.index] = costs.get(shard.index, 0.0) + super()._evaluate(x, shard)
        return 0.0


class _KeptSums(SumsJob):
    """J'J and J'r of a shard of a block, added to what was kept."""

    def _evaluate(self, x: Array, shard: Shard) -> float:
        rows, n = self.place.rows, self._functions.n
        if shard.index not in rows:
            row = np.empty((1, n * n + n))
            rows[shard.index] = row, self._functions.blocks.sums(row, shard.stream)
        return self._add(rows[shard.index][1], x, shard)


class ShardedBlockCosts(BlockCosts):
    """Running cost over blocks of residuals, of which those of Legate are added up there."""

    def __init__(self, sums: ShardedSums, xp: Namespace, loss: Loss | None) -> None:
        super().__init__(xp, loss)
        self._sums = sums
        self._kept: Kept | None = None

    def _add(self, r: Array) -> None:
        if not is_cupynumeric(r):
            super()._add(r)
            return
        if self._kept is None:
            self._kept = Kept(self._sums.reductions(0, self._loss))
        self._kept.launch(_job(_KeptCost, self._kept, parts(r, self._loss)))

    def result(self) -> float:
        """The cost."""
        return self._cost + (0.0 if self._kept is None else self._kept.cost())


class ShardedBlockSums(BlockSums):
    """Running sums over blocks of rows, of which those of Legate are added up there."""

    def __init__(self, sums: ShardedSums, xp: Namespace, loss: Loss | None, n: int) -> None:
        super().__init__(xp, loss, n)
        self._sums = sums
        self._kept: Kept | None = None

    def _add(self, r: Array, J: Array) -> None:
        if not self._sums.takes(J, r):
            super()._add(to_numpy(r), to_numpy(J))
            return
        if self._kept is None:
            self._kept = Kept(self._sums.reductions(self._n, self._loss))
        self._kept.launch(_job(_KeptSums, self._kept, (J, *parts(r, self._loss))))

    def result(self) -> tuple[Array, Array]:
        """The sums."""
        if self._kept is not None:
            n = self._n
            sums = self._kept.normal_sums(n * n + n)
            self._add_sums(sums[: n * n].reshape(n, n), sums[n * n :])
        return super().result()


def _job(kind: type[_KeptCost | _KeptSums], kept: Kept, data: tuple[Array, ...]) -> Any:
    """The job of one block, whose results are kept."""
    layout = kept.sums.layout(data[0].shape[0], data)
    return kind(kept.sums.functions, layout, NOWHERE, kept)
