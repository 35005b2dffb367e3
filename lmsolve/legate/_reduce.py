"""Reductions over row shards in Legate's tasks: cost, normal equations, triangular factor.

Each of them is one launch of a job, whose shards evaluate their rows block by block. At a trial
point a shard returns its part of the cost, one number. At an accepted point it adds up ``J'J``
(n, n) and ``J'r`` (n,) of its rows, and those are added up over the shards. So the host gets one
number per shard and trial, and n^2 + n numbers per accepted step.

Where the sums turn out ill-conditioned, and for standard errors, the triangular factor of the rows
takes their place: each shard reduces its own rows ``[J, r]`` to one triangle (n + 1, n + 1), and
those are stacked and reduced on the host, which keeps all the accuracy (Demmel, Grigori, Hoemmen,
Langou 2012, section 3: the parallel tall-skinny QR).
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np

from lmsolve._factored import Rows
from lmsolve._loss import Loss
from lmsolve._subproblem import NormalEquations
from lmsolve._sums import LOCAL
from lmsolve._xp import Array, Namespace, array_namespace, is_cupynumeric

from . import _memory
from ._blocks import NumpyBlocks, TorchBlocks
from ._cholesky import LegateNormalEquations

if TYPE_CHECKING:
    from . import _tasks


#: Of a loss: (loss, xp, r) -> factors (b,) of the rows of J with residuals r (b,).
Factors: TypeAlias = Callable[[Loss, Namespace, Array], Array]
#: Elements of a block of J: 8 MB of float64, small enough for a core's cache to help.
BLOCK = 2**20


def rows_of_block(n: int) -> int:
    """Rows of a block of J: at n = 20 two CPUs do 1.72, 1.88, 1.80 times one with 2^14 to 2^16.

    Where J'J is far larger than that, each block passes through all of it: so they are fewer.
    """
    return max(256, n // 16, min(2**15, BLOCK // (n + 1)))


def cost_of(r: Array, loss: Loss | None) -> Array:
    """0-d cost of a block of residuals (b,), summed in float64."""
    if loss is None and type(r) is np.ndarray:  # scipy's ddot would hold Python's lock
        r = r.astype(np.float64, copy=False)
        with np.errstate(over="ignore"):
            return 0.5 * r.dot(r)
    return LOCAL.cost(array_namespace(r), r, loss)


class Functions(Protocol):
    """What the jobs evaluate, over one block of b rows of the data."""

    n: int
    blocks: NumpyBlocks | TorchBlocks
    block_rows: int
    numbered: bool  # whether the first part of a block is the numbers of its rows

    def linear(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array, Loss | None]:
        """r (b * k,) and J (b * k, n) of the block, and the loss that is to weigh them."""
        ...


class Costs(Functions, Protocol):
    """Functions whose rows have a cost."""

    def cost(self, x: Array, block: tuple[Any, ...], b: int) -> Array:
        """0-d cost of the block."""
        ...


class RowSums:
    """The reductions of functions over the rows of a layout."""

    def __init__(self, functions: Functions) -> None:
        from . import _tasks

        self.functions = functions
        self.tasks = _tasks
        self.m = 0  # residuals of the last sums: a row of data may have several
        self._tables: dict[int, _tasks.Table] = {}

    def layout(self, m: int, data: tuple[Array, ...]) -> Layout:
        """Rows for the processors that the functions run on."""
        return Layout(m, data, self.functions.blocks.gpu, 8 * self.functions.n**2)

    def subproblem(self, layout: Layout, x: np.ndarray) -> NormalEquations:
        """The sums of J at x (n,): one launch, one read of n^2 + n numbers."""
        n = self.functions.n
        place = self.place(layout, n * (n + 1), "The sums J'J")
        counts = self.launch(SumsJob(self.functions, layout, x, place))
        self.m = int(counts[:, 0].sum())
        sums = place.total().astype(x.dtype, copy=False)
        gram, grad = sums[: n * n].reshape(n, n), sums[n * n :]
        rows = ReducedRows(self, layout, np.array(x))
        return LegateNormalEquations(np, gram, grad, cast(Rows, rows))

    def triangle(self, layout: Layout, x: np.ndarray, factors: Factors | None = None) -> np.ndarray:
        """Triangular factor (n + 1, n + 1) of ``[J, r]`` at x (n,): one launch, one read.

        With a loss its rows are weighted by that, or by the factors.
        """
        n1 = self.functions.n + 1
        place = self.place(layout, n1**2, "The triangular factors")
        self.launch(TriangleJob(self.functions, layout, x, place, factors))
        stacked = place.read().reshape(layout.shards * n1, n1)
        factor: np.ndarray = np.linalg.qr(stacked, mode="r")  # type: ignore[assignment]
        return factor.astype(x.dtype, copy=False)

    def curvature_rows(
        self, layout: Layout, x: np.ndarray, robust: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows (n + 1, n) with the curvature of the cost at x (n,), and its scores if robust.

        In float64, whatever the dtype of x.
        """
        x = x.astype(float)
        rows = self.triangle(layout, x, Loss.curvature_weights)[:, :-1]
        return rows, self.triangle(layout, x, Loss.scores)[:, :-1] if robust else None

    def place(self, layout: Layout, size: int, what: str) -> _tasks.Table | _tasks.HostRows:
        """Where the shards write ``size`` numbers each; MemoryError if there is no room."""
        if layout.ranks == 1:
            # One such matrix is left when the solver makes a second one.
            _memory.require_host(8 * size * max(layout.shards, 2), what)
            return self.tasks.HostRows(layout.shards, size)
        table = self._tables.get(size)
        if table is None or table.shards != layout.shards:
            # The rows of this rank, the columns that it adds up, their total, and that of all.
            need = 8 * size * (2 * layout.local + 2)
            _memory.require(need + layout.resident, layout.option, f"{what} and the data")
            self._tables[size] = table = self.tasks.Table(layout.shards, size, layout.target)
        return table

    def launch(self, job: RowJob) -> np.ndarray:
        """Run a job; what its shards returned."""
        layout, place = job.layout, job.place
        outputs = () if place is None else place.outputs
        status = self.tasks.launch(job, layout.shards, layout.target, layout.parts, outputs)
        if not (status[:, 1] == checksum(job.x)).all():
            raise RuntimeError(
                "The ranks of this run hold different parameters: give every rank the same `x0` "
                "(seed its generator), and let nothing else differ between ranks."
            )
        return status


class CostSums(RowSums):
    """The reductions of functions whose rows have a cost."""

    functions: Costs

    def __init__(self, functions: Costs) -> None:
        super().__init__(functions)

    def cost(self, layout: Layout, x: np.ndarray) -> float:
        """The cost at x (n,): one launch, one read."""
        costs = self.launch(CostJob(self.functions, layout, x))
        return float(costs[:, 0].sum())


class ReducedRows:
    """n + 1 rows that stand for all m: the same sums and the same least-squares problem.

    They are made when they are first asked for, which is where the sums are ill-conditioned.
    """

    xp: Namespace = np
    weights = None

    def __init__(self, sums: RowSums, layout: Layout, x: np.ndarray) -> None:
        self._sums, self._layout, self._x = sums, layout, x

    @cached_property
    def _triangle(self) -> np.ndarray:
        return self._sums.triangle(self._layout, self._x)

    @property
    def J(self) -> np.ndarray:
        """The rows (n + 1, n)."""
        return self._triangle[:, :-1]

    @property
    def r(self) -> np.ndarray:
        """Their residuals (n + 1,)."""
        return self._triangle[:, -1]

    def matvec(self, p: np.ndarray) -> np.ndarray:
        """J p (n + 1,)."""
        return self.J @ p

    def weighted(self) -> np.ndarray:
        """The rows; the loss has been applied before."""
        return self.J

    def shifted(self, start: np.ndarray | None) -> np.ndarray:
        """Residuals (n + 1,) of the linear model at ``start``."""
        return self.r if start is None else self.r + self.J @ start


class Layout:
    """Which rows each processor holds, and the parts of the resident data."""

    def __init__(self, m: int, data: tuple[Array, ...], gpu: bool, sums: int) -> None:
        from legate.core import TaskTarget, get_legate_runtime

        from . import _tasks

        self.target = TaskTarget.CPU
        if gpu and _tasks.processors(TaskTarget.GPU):
            self.target = TaskTarget.GPU
        count = _tasks.processors(self.target)
        if count == 0:
            raise RuntimeError(
                "Legate has no CPU processor for NumPy functions: start with --cpus 1 or more."
            )
        self.ranks = ranks = int(get_legate_runtime().node_count)
        self.option = "fbmem" if self.target == TaskTarget.GPU else "sysmem"
        if ranks == 1:
            # Fewer shards where the sums (bytes of one) of all would not fit beside their panels.
            count = max(1, min(count, _memory.fitting_host(sums) - 1))
        self.tile = -(-m // count)
        self.shards = -(-m // self.tile)
        self.local = -(-self.shards // ranks)
        self.m = m
        self.data = data
        resident = [a for a in data if is_cupynumeric(a)]
        self.resident = sum(a.nbytes for a in resident) // ranks
        self.parts = tuple(
            _tasks.store_of(a).partition_by_tiling((self.tile, *a.shape[1:])) for a in resident
        )

    def bounds(self, index: int) -> tuple[int, int]:
        """First row of a shard, and the first after it."""
        return index * self.tile, min((index + 1) * self.tile, self.m)


class RowJob(ABC):
    """What a task does with its shard, at one x."""

    def __init__(
        self, functions: Functions, layout: Layout, x: np.ndarray, place: Any = None
    ) -> None:
        self._functions, self.layout, self.x, self.place = functions, layout, x, place

    def __call__(self, shard: _tasks.Shard) -> tuple[float, float, float]:
        """The shard's part of the cost, and a checksum of the parameters it used."""
        with self._functions.blocks.context(shard.stream):
            x = self._functions.blocks.x(self.x, shard.stream)
            return self._evaluate(x, shard), checksum(self.x), 0.0

    @abstractmethod
    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        """The shard's number."""

    def _put(self, shard: _tasks.Shard, values: np.ndarray) -> None:
        """Write the shard's numbers to their place."""
        from . import _tasks

        _tasks.write(self.place.row(shard), values.reshape(1, -1), shard.stream)

    def _blocks(self, shard: _tasks.Shard) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The arguments of the functions for each block of the shard, and its number of rows."""
        blocks, data = self._functions.blocks, self.layout.data
        first, end = self.layout.bounds(shard.index)
        stores = iter(shard.inputs)
        views = [blocks.resident(next(stores)) if is_cupynumeric(a) else None for a in data]
        for i in range(first, end, self._functions.block_rows):
            j = min(i + self._functions.block_rows, end)
            numbers = (range(i, j),) if self._functions.numbered else ()
            parts = (
                blocks.host(a[i:j], shard.stream) if view is None else view[i - first : j - first]
                for a, view in zip(data, views, strict=True)
            )
            yield (*numbers, *parts), j - i


class CostJob(RowJob):
    """The cost of a shard."""

    def __init__(self, functions: Costs, layout: Layout, x: np.ndarray, place: Any = None) -> None:
        super().__init__(functions, layout, x, place)
        self._cost = functions.cost

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        total = 0.0
        try:
            for block, b in self._blocks(shard):
                total += float(self._cost(x, block, b))
        except np.linalg.LinAlgError:
            return math.nan  # a rejected step
        return total


class SumsJob(RowJob):
    """J'J and J'r of a shard."""

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        sums = self._functions.blocks.sums(self.place.row(shard), shard.stream)
        count = self._add(sums, x, shard)
        sums.finish()
        return count

    def _add(self, sums: Any, x: Array, shard: _tasks.Shard) -> int:
        """Add the rows of the shard; their number."""
        count = 0
        for J, r in self._weighted_rows(x, shard):
            sums.add(J, r)
            count += r.shape[0]
        return count

    def _weighted_rows(self, x: Array, shard: _tasks.Shard) -> Iterator[tuple[Array, Array]]:
        """J (b, n) and r (b,) of each block, weighted by its loss."""
        for block, b in self._blocks(shard):
            r, J, loss = self._functions.linear(x, block, b)
            if loss is not None:
                w, r = loss.weights(array_namespace(r), r)
                J = J * w[:, None]
            yield J, r


class TriangleJob(RowJob):
    """The triangular factor of a shard's rows, with rows of zeros below if it has few."""

    def __init__(
        self,
        functions: Functions,
        layout: Layout,
        x: np.ndarray,
        place: Any,
        factors: Factors | None,
    ) -> None:
        super().__init__(functions, layout, x, place)
        self._factors = factors

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        blocks = self._functions.blocks
        R = None
        for block, b in self._blocks(shard):
            r, J, loss = self._functions.linear(x, block, b)
            if loss is not None:
                J, r = self._weighted(loss, J, r)
            R = blocks.triangle(R, J, r)
        assert R is not None
        blocks.write(self.place.row(shard), R)
        return 0.0

    def _weighted(self, loss: Loss, J: Array, r: Array) -> tuple[Array, Array]:
        xp = array_namespace(r)
        if self._factors is None:
            w, r = loss.weights(xp, r)
        else:
            w = self._factors(loss, xp, r)
        return J * w[:, None], r


def checksum(x: np.ndarray) -> float:
    """Of the bits of x: ranks whose parameters differ must stop, not wait for each other."""
    return float(zlib.crc32(np.ascontiguousarray(x).tobytes()))
