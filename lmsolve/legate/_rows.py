"""A least-squares problem whose rows are evaluated where the data are, shard by shard.

The m rows are cut into one shard per processor. At a trial point each shard returns its part of
the cost, one number. At an accepted point it adds ``J'J`` (n, n) and ``J'r`` (n,) of its rows,
block by block, to one sum over all shards. So J and r exist one block at a time, and what reaches
the host is one number per shard and trial, and n^2 + n numbers per accepted step. The parameters,
the damping and the solve are on the host, alike on every rank.

Sums are in float64 whatever the dtype of the blocks. NumPy's ``J.T @ J`` is a syrk that lets go
of Python's lock; scipy's dsyrk holds it and would keep the shards of a process waiting in turn.
"""

from __future__ import annotations

import copy
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmsolve._loss import LOSSES, Loss
from lmsolve._subproblem import NormalEquations
from lmsolve._xp import Array, Namespace, array_namespace, is_cupynumeric
from . import _memory
from ._start import start

if TYPE_CHECKING:
    from . import _tasks

#: Elements of a block of J: 8 MB of float64, small enough for a core's cache to help.
BLOCK = 2**20
Function = Callable[..., Any]


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
        Rows of a block; by default as many as make 8 MB of J.

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
    functions = _Functions(
        fun_block,
        jac_block,
        n=n,
        blocks=_TorchBlocks(dtype) if namespace == "torch" else _NumpyBlocks(dtype),
        loss=None if rho is None else Loss(rho, f_scale),
        block_rows=block_rows or max(256, min(2**16, BLOCK // (n + 1))),
    )
    return RowProblem(functions, m, tuple(data))


@dataclass(frozen=True)
class Evaluated:
    """What is known of the residuals at a point: their cost."""

    cost: float


class RowProblem:
    """The solver's view of `rows`; see LeastSquaresProblem."""

    xp: Namespace = np

    def __init__(self, functions: _Functions, m: int, data: tuple[Array, ...]) -> None:
        start()
        from . import _tasks

        self.m, self.n = m, functions.n
        self.nfev = self.njev = 0
        self._functions = functions
        self._tasks = _tasks
        self._layout = _Layout(m, data, functions.blocks.gpu)
        self._sums: Any = None

    def residual(self, x: np.ndarray) -> Evaluated:
        """The cost at x (n,): one launch, one read."""
        self.nfev += 1
        costs = self._launch(_CostJob(self._functions, self._layout, x), x, ())
        return Evaluated(float(costs[:, 0].sum()))

    def cost(self, r: Evaluated) -> float:
        """The cost of what `residual` returned."""
        return r.cost

    def linearize(self, x: np.ndarray, r: Evaluated) -> NormalEquations:
        """The sums of J at x (n,): one launch, one read of n^2 + n numbers."""
        self.njev += 1
        n = self.n
        self._launch(_SumsJob(self._functions, self._layout, x), x, (self._sum_store(),))
        sums = self._tasks.read(self._sum_store())
        return NormalEquations(np, sums[: n * n].reshape(n, n), sums[n * n :])

    def _launch(self, job: _RowJob, x: np.ndarray, sums: tuple[Any, ...]) -> np.ndarray:
        layout = self._layout
        status = self._tasks.launch(
            job, layout.shards, layout.target, inputs=layout.parts, sums=sums
        )
        if not (status[:, 1] == _checksum(x)).all():
            raise RuntimeError(
                "The ranks of this run hold different parameters: give every rank the same `x0` "
                "(seed its generator), and let nothing else differ between ranks."
            )
        return status

    def _sum_store(self) -> Any:
        """The store of J'J and J'r, row by row; made once."""
        if self._sums is None:
            from legate.core import get_legate_runtime, types

            size = self.n * (self.n + 1)
            # One instance per processor of this process, and the sum itself.
            _memory.require(
                8 * size * (self._layout.local + 1) + self._layout.resident,
                self._layout.option,
                "J'J and the data",
            )
            self._sums = get_legate_runtime().create_store(types.float64, (size,))
        return self._sums


class _Layout:
    """Which rows each processor holds, and the parts of the resident data."""

    def __init__(self, m: int, data: tuple[Array, ...], gpu: bool) -> None:
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
        ranks = get_legate_runtime().node_count
        self.tile = -(-m // count)
        self.shards = -(-m // self.tile)
        self.local = -(-self.shards // ranks)
        self.m = m
        self.data = data
        self.option = "fbmem" if self.target == TaskTarget.GPU else "sysmem"
        resident = [a for a in data if is_cupynumeric(a)]
        self.resident = sum(a.nbytes for a in resident) // ranks
        self.parts = tuple(
            _tasks.store_of(a).partition_by_tiling((self.tile, *a.shape[1:])) for a in resident
        )

    def bounds(self, index: int) -> tuple[int, int]:
        """First row of a shard, and the first after it."""
        return index * self.tile, min((index + 1) * self.tile, self.m)


class _NumpyBlocks:
    """NumPy views of a shard."""

    gpu = False

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def context(self, stream: int | None) -> AbstractContextManager[Any]:
        return nullcontext()

    def x(self, x: np.ndarray, stream: int | None) -> Array:
        return x.astype(self.dtype)

    def resident(self, store: Any) -> Array:
        return np.asarray(store)

    def host(self, block: Any, stream: int | None) -> Array:
        return np.asarray(block)

    def sums(self, store: Any) -> _HostSums:
        return _HostSums(np.asarray(store))

    def functions(self, functions: tuple[Function, Function]) -> tuple[Function, Function]:
        return functions

    def flat(self, a: Any, *shape: int) -> Array:
        return np.asarray(a).reshape(shape)


class _TorchBlocks:
    """torch views of a shard, on the device of the task."""

    gpu = True

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._local = threading.local()
        self._lock = threading.Lock()

    def context(self, stream: int | None) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        import torch

        context: AbstractContextManager[Any] = torch.cuda.stream(
            torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
        )
        return context

    def x(self, x: np.ndarray, stream: int | None) -> Array:
        import torch

        return torch.from_numpy(x.copy()).to(_device(stream), getattr(torch, self.dtype))

    def resident(self, store: Any) -> Array:
        import torch

        return torch.utils.dlpack.from_dlpack(store)

    def host(self, block: Any, stream: int | None) -> Array:
        import torch

        if not isinstance(block, torch.Tensor):
            block = np.asarray(block)
            block = torch.from_numpy(block if block.flags.writeable else block.copy())
        return block.to(_device(stream))

    def sums(self, store: Any) -> _HostSums | _DeviceSums:
        import torch

        view = torch.utils.dlpack.from_dlpack(store)
        return _DeviceSums(view) if view.is_cuda else _HostSums(view.numpy())

    def functions(self, functions: tuple[Function, Function]) -> tuple[Function, Function]:
        # functional_call on a module that two threads share gives silently wrong results.
        if getattr(self._local, "of", None) is not functions:
            with self._lock:
                self._local.copies = copy.deepcopy(functions)
            self._local.of = functions
        copies: tuple[Function, Function] = self._local.copies
        return copies

    def flat(self, a: Any, *shape: int) -> Array:
        return a.detach().reshape(shape)


def _device(stream: int | None) -> str:
    """torch's name for the device of a task: CPU tasks have no stream."""
    return "cpu" if stream is None else "cuda"


class _HostSums:
    """J'J and J'r of a shard in host memory."""

    def __init__(self, sums: np.ndarray) -> None:
        self._sums = sums
        n = (math.isqrt(4 * sums.size + 1) - 1) // 2
        self._gram = sums[: n * n].reshape(n, n)
        self._grad = sums[n * n :]
        self._product = np.empty((n, n))

    def add(self, J: Array, r: Array) -> None:
        """Add a block: J (b, n), r (b,), of any library in host memory."""
        J = np.asarray(J).astype(np.float64, copy=False)
        self._gram += np.matmul(J.T, J, out=self._product)
        self._grad += J.T @ np.asarray(r).astype(np.float64, copy=False)


class _DeviceSums:
    """J'J and J'r of a shard in a GPU's memory."""

    def __init__(self, sums: Any) -> None:
        n = (math.isqrt(4 * len(sums) + 1) - 1) // 2
        self._gram = sums[: n * n].reshape(n, n)
        self._grad = sums[n * n :]

    def add(self, J: Array, r: Array) -> None:
        """Add a block: J (b, n), r (b,) on the device."""
        J = J.to(self._gram.dtype)
        self._gram.addmm_(J.T, J)
        self._grad.addmv_(J.T, r.to(J.dtype))


class _Functions:
    """The user's two functions over one block of rows, with the loss."""

    def __init__(
        self,
        fun: Function,
        jac: Function,
        *,
        n: int,
        blocks: _NumpyBlocks | _TorchBlocks,
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

    def __init__(self, functions: _Functions, layout: _Layout, x: np.ndarray) -> None:
        self._functions, self._layout, self._x = functions, layout, x

    def __call__(self, shard: _tasks.Shard) -> tuple[float, float, float]:
        """The shard's part of the cost, and a checksum of the parameters it used."""
        with self._functions.blocks.context(shard.stream):
            x = self._functions.blocks.x(self._x, shard.stream)
            return self._evaluate(x, shard), _checksum(self._x), 0.0

    def _evaluate(self, x: Array, shard: _tasks.Shard) -> float:
        raise NotImplementedError

    def _blocks(self, shard: _tasks.Shard) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The arguments of the functions for each block of the shard, and its number of rows."""
        blocks, data = self._functions.blocks, self._layout.data
        first, end = self._layout.bounds(shard.index)
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
        sums = self._functions.blocks.sums(shard.sums[0])
        for block, b in self._blocks(shard):
            r, J = self._functions.linear(x, block, b)
            sums.add(J, r)
        return 0.0


def _checksum(x: np.ndarray) -> float:
    """Of the bits of x: ranks whose parameters differ must stop, not wait for each other."""
    return float(zlib.crc32(np.ascontiguousarray(x).tobytes()))
