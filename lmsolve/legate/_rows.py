"""A least-squares problem whose rows are evaluated where the data are, shard by shard.

The m rows are cut into one shard per processor. At a trial point each shard returns its part of
the cost, one number. At an accepted point it adds up ``J'J`` (n, n) and ``J'r`` (n,) of its rows,
block by block, and those are added up over the shards. So J and r exist one block at a time, and
the host gets one number per shard and trial, and n^2 + n numbers per accepted step. The
parameters, the damping and the solve are on the host, alike on every rank.

Where the sums turn out ill-conditioned, the triangular factor of the rows takes their place: each
shard reduces its own rows ``[J, r]`` to one triangle (n + 1, n + 1), and those are stacked and
reduced on the host, which keeps all the accuracy (Demmel, Grigori, Hoemmen, Langou 2012, section
3: the parallel tall-skinny QR).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lmsolve._loss import LOSSES, Loss
from lmsolve._subproblem import NormalEquations, Rows
from lmsolve._xp import Array, Namespace, array_namespace, is_cupynumeric

from . import _memory
from ._blocks import Function, NumpyBlocks, TorchBlocks
from ._cholesky import LegateNormalEquations
from ._start import start

if TYPE_CHECKING:
    from . import _tasks

#: Elements of a block of J: 8 MB of float64, small enough for a core's cache to help.
BLOCK = 2**20


def rows(
    fun_block: Function,
    jac_block: Function,
    *,
    n: int,
    m: int | None = None,
    data: Sequence[Array] = (),
    namespace: str = "numpy",
    dtype: str = "float64",
    loss: str = "linear",
    f_scale: float = 1.0,
    block_rows: int | None = None,
) -> RowProblem:
    """A least-squares problem over row shards, of which J and r never exist in one place.

    Legate starts here if it has not yet, and runs the two functions in its tasks, one shard of
    the rows per processor, on every rank.

    Parameters
    ----------
    fun_block : callable
        ``fun_block(x, *blocks)`` returns the residuals of a block of rows, array, shape (b,) or
        (b, k). ``blocks`` are the rows of each of ``data``; without data there is one argument
        more, ``range(start, stop)``, the numbers of the rows.
    jac_block : callable
        ``jac_block(x, *blocks)`` returns their Jacobian, array, shape (b, n) or (b, k, n), or
        ``(residuals, Jacobian)``, which saves a call of ``fun_block``.
    n : int
        Number of parameters.
    m : int, optional
        Number of rows; needed where there is no data.
    data : sequence of arrays, shape (m, ...)
        cuPyNumeric arrays stay where their shards are. Anything else with a shape and slices
        (NumPy arrays, memory maps, datasets of h5py or Zarr) is read block by block by the tasks,
        on every rank its own rows only.
    namespace : {'numpy', 'torch'}
        What x and the blocks are to the functions. torch computes on GPUs where Legate has
        some. Each thread gets its own deep copy of torch functions, and so of the modules that
        they hold as attributes (those of a closure are shared, and are not safe).
    dtype : str
        The dtype of x that the functions see.
    loss, f_scale : str, float
        As in `least_squares`.
    block_rows : int, optional
        Rows of a block; by default as many as make 8 MB of J, 16384 at most.

    Returns
    -------
    RowProblem
        To be given to `least_squares` in place of ``fun``.

    Raises
    ------
    ImportError, RuntimeError
        Where Legate can't start; the text says why, and what to do.

    Notes
    -----
    An exception of a function is raised on every rank. LinAlgError, and residuals that are not
    finite, reject the trial step instead.
    """
    shapes = [tuple(a.shape) for a in data]
    if m is None and not shapes:
        raise ValueError("`m`, the number of rows, is needed where there is no `data`.")
    if m is None:
        m = shapes[0][0]
    if any(not shape or shape[0] != m for shape in shapes):
        raise ValueError(f"`data` must have m = {m} rows each, got shapes {shapes}.")
    if namespace not in ("numpy", "torch"):
        raise ValueError(f"`namespace` must be 'numpy' or 'torch', got {namespace!r}.")
    if loss not in LOSSES:
        raise ValueError(f"`loss` must be one of {sorted(LOSSES)}, got {loss!r}.")
    if m < 1 or n < 1:
        raise ValueError(f"`m` and `n` must be positive, got {m} and {n}.")
    rho = LOSSES[loss]
    functions = BlockFunctions(
        fun_block,
        jac_block,
        n=n,
        blocks=TorchBlocks(dtype) if namespace == "torch" else NumpyBlocks(dtype),
        loss=None if rho is None else Loss(rho, f_scale),
        block_rows=block_rows or rows_of_block(n),
    )
    return RowProblem(functions, m, tuple(data))


def rows_of_block(n: int) -> int:
    """Rows of a block of J: with 50,000 at n = 20, two CPUs took a fifth longer than with 2^14."""
    return max(256, min(2**14, BLOCK // (n + 1)))


@dataclass(frozen=True)
class Evaluated:
    """What is known of the residuals at a point: their cost."""

    cost: float


class RowProblem:
    """The solver's view of `rows`; see LeastSquaresProblem."""

    xp: Namespace = np

    def __init__(self, functions: BlockFunctions, m: int, data: tuple[Array, ...]) -> None:
        start()
        from . import _tasks

        self.n = functions.n
        self.nfev = self.njev = 0
        self._functions = functions
        self._tasks = _tasks
        self._tables: dict[int, _tasks.Table] = {}
        self.place(m, data)

    def place(self, m: int, data: tuple[Array, ...]) -> None:
        """Go over to other rows."""
        self.m = m
        self._layout = Layout(m, data, self._functions.blocks.gpu, 8 * self.n * (self.n + 1))

    def residual(self, x: np.ndarray) -> Evaluated:
        """The cost at x (n,): one launch, one read."""
        self.nfev += 1
        costs = self._launch(_CostJob(self._functions, self._layout, x), x)
        return Evaluated(float(costs[:, 0].sum()))

    def cost(self, r: Evaluated) -> float:
        """The cost of what `residual` returned."""
        return r.cost

    def linearize(self, x: np.ndarray, r: Evaluated | None = None) -> NormalEquations:
        """The sums of J at x (n,): one launch, one read of n^2 + n numbers."""
        self.njev += 1
        n, layout = self.n, self._layout
        place = self._place(layout, n * (n + 1), "The sums J'J")
        self._launch(_SumsJob(self._functions, layout, x, place), x, place.outputs)
        sums = place.total().astype(x.dtype, copy=False)
        gram, grad = sums[: n * n].reshape(n, n), sums[n * n :]
        rows = ReducedRows(self, layout, np.array(x))
        return LegateNormalEquations(np, gram, grad, cast(Rows, rows))

    def triangle(self, layout: Layout, x: np.ndarray) -> np.ndarray:
        """Triangular factor (n + 1, n + 1) of ``[J, r]`` at x (n,): one launch, one read."""
        place = self._place(layout, (self.n + 1) ** 2, "The triangular factors")
        self._launch(_TriangleJob(self._functions, layout, x, place), x, place.outputs)
        stacked = place.read().reshape(layout.shards * (self.n + 1), self.n + 1)
        factor: np.ndarray = np.linalg.qr(stacked, mode="r")  # type: ignore[assignment]
        return factor.astype(x.dtype, copy=False)

    def _launch(self, job: _RowJob, x: np.ndarray, outputs: tuple[Any, ...] = ()) -> np.ndarray:
        layout = job.layout
        status = self._tasks.launch(job, layout.shards, layout.target, layout.parts, outputs)
        if not (status[:, 1] == _checksum(x)).all():
            raise RuntimeError(
                "The ranks of this run hold different parameters: give every rank the same `x0` "
                "(seed its generator), and let nothing else differ between ranks."
            )
        return status

    def _place(self, layout: Layout, size: int, what: str) -> _tasks.Table | _tasks.HostRows:
        """Where the shards write ``size`` numbers each; MemoryError if there is no room."""
        if layout.ranks == 1:
            _memory.require_host(8 * size * layout.shards, what)
            return self._tasks.HostRows(layout.shards, size)
        table = self._tables.get(size)
        if table is None or table.shards != layout.shards:
            # The rows of this rank, the columns that it adds up, their total, and that of all.
            need = 8 * size * (2 * layout.local + 2)
            _memory.require(need + layout.resident, layout.option, f"{what} and the data")
            self._tables[size] = table = self._tasks.Table(layout.shards, size, layout.target)
        return table


class ReducedRows:
    """n + 1 rows that stand for all m: the same sums and the same least-squares problem.

    They are made when they are first asked for, which is where the sums are ill-conditioned.
    """

    xp: Namespace = np
    weights = None

    def __init__(self, problem: RowProblem, layout: Layout, x: np.ndarray) -> None:
        self._problem, self._layout, self._x = problem, layout, x

    @cached_property
    def _triangle(self) -> np.ndarray:
        return self._problem.triangle(self._layout, self._x)

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
            # Fewer shards where the sums (bytes of one) of all would not fit beside what the
            # solver makes of them, three matrices as large.
            count = max(1, min(count, _memory.fitting_host(sums) - 3))
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


class BlockFunctions:
    """The user's two functions over one block of rows, with the loss."""

    def __init__(
        self,
        fun: Function,
        jac: Function,
        *,
        n: int,
        blocks: NumpyBlocks | TorchBlocks,
        loss: Loss | None,
        block_rows: int,
    ) -> None:
        self.n, self.blocks, self.loss, self.block_rows = n, blocks, loss, block_rows
        self._functions = fun, jac

    def residual(self, x: Array, block: tuple[Any, ...], b: int) -> Array:
        """r (b * k,) of a block of b rows."""
        fun, _ = self.blocks.functions(self._functions)
        return self._checked_residual(fun(x, *block), b)

    def linear(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array]:
        """r (b * k,) and J (b * k, n) of a block of b rows, weighted by the loss."""
        _, jac = self.blocks.functions(self._functions)
        J = jac(x, *block)
        if isinstance(J, tuple):
            r, J = self._checked_residual(J[0], b), J[1]
        else:
            r = self.residual(x, block, b)
        expected = r.shape[0], self.n
        if math.prod(J.shape) != math.prod(expected) or J.shape[-1] != self.n:
            raise ValueError(f"`jac_block` must return {expected} numbers, got {tuple(J.shape)}.")
        J = self.blocks.flat(J, *expected)
        if self.loss is None:
            return r, J
        w, r = self.loss.weights(array_namespace(r), r)
        return r, J * w[:, None]

    def cost(self, r: Array) -> Array:
        """0-d cost of residuals."""
        if self.loss is not None:
            return self.loss.cost(array_namespace(r), r)
        return 0.5 * (r @ r)

    def _checked_residual(self, r: Array, b: int) -> Array:
        if not r.shape or r.shape[0] != b:
            raise ValueError(
                f"`fun_block` must return one residual or more for each of the {b} rows of its "
                f"block, got shape {tuple(r.shape)}."
            )
        return self.blocks.flat(r, -1)


class _RowJob:
    """What a task does with its shard, at one x."""

    def __init__(
        self, functions: BlockFunctions, layout: Layout, x: np.ndarray, place: Any = None
    ) -> None:
        self._functions, self.layout, self._x, self.place = functions, layout, x, place

    def __call__(self, shard: _tasks.Shard) -> tuple[float, float, float]:
        """The shard's part of the cost, and a checksum of the parameters it used."""
        with self._functions.blocks.context(shard.stream):
            x = self._functions.blocks.x(self._x, shard.stream)
            return self._evaluate(x, shard), _checksum(self._x), 0.0

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        raise NotImplementedError

    def _blocks(self, shard: _tasks.Shard) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The arguments of the functions for each block of the shard, and its number of rows."""
        blocks, data = self._functions.blocks, self.layout.data
        first, end = self.layout.bounds(shard.index)
        stores = iter(shard.inputs)
        views = [blocks.resident(next(stores)) if is_cupynumeric(a) else None for a in data]
        for i in range(first, end, self._functions.block_rows):
            j = min(i + self._functions.block_rows, end)
            if not data:
                yield (range(i, j),), j - i
                continue
            yield (
                tuple(
                    blocks.host(a[i:j], shard.stream)
                    if view is None
                    else view[i - first : j - first]
                    for a, view in zip(data, views, strict=True)
                ),
                j - i,
            )


class _CostJob(_RowJob):
    """The cost of a shard."""

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        total = 0.0
        try:
            for block, b in self._blocks(shard):
                total += float(self._functions.cost(self._functions.residual(x, block, b)))
        except np.linalg.LinAlgError:
            return math.nan  # a rejected step
        return total


class _SumsJob(_RowJob):
    """J'J and J'r of a shard."""

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        sums = self._functions.blocks.sums(self.place.row(shard), shard.stream)
        for block, b in self._blocks(shard):
            r, J = self._functions.linear(x, block, b)
            sums.add(J, r)
        sums.finish()
        return 0.0


class _TriangleJob(_RowJob):
    """The triangular factor of a shard's rows, with rows of zeros below if it has few."""

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        blocks = self._functions.blocks
        R = None
        for block, b in self._blocks(shard):
            r, J = self._functions.linear(x, block, b)
            R = blocks.triangle(R, J, r)
        assert R is not None
        blocks.write(self.place.row(shard), R)
        return 0.0


def _checksum(x: np.ndarray) -> float:
    """Of the bits of x: ranks whose parameters differ must stop, not wait for each other."""
    return float(zlib.crc32(np.ascontiguousarray(x).tobytes()))
