"""A least-squares problem whose rows are evaluated where the data are, shard by shard.

The m rows are cut into one shard per processor, and the functions are called in Legate's tasks,
which reduce what they return (`_reduce`). So J and r exist one block at a time. The parameters, the
damping and the solve are on the host, alike on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lmsolve import _numdiff
from lmsolve._loss import LOSSES, Loss
from lmsolve._numdiff import Differences
from lmsolve._subproblem import NormalEquations
from lmsolve._sums import LOCAL
from lmsolve._xp import Array, Namespace, array_namespace, copied, to_numpy

from ._blocks import Function, NumpyBlocks, TorchBlocks
from ._reduce import CostSums, cost_of, rows_of_block
from ._start import start


def rows(
    fun_block: Function,
    jac_block: Function | None = None,
    *,
    n: int,
    m: int | None = None,
    data: Sequence[Array] = (),
    sigma: Array | None = None,
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
    jac_block : callable, optional
        ``jac_block(x, *blocks)`` returns their Jacobian, array, shape (b, n) or (b, k, n), or
        ``(residuals, Jacobian)``, which saves a call of ``fun_block``. Without it ``fun_block`` is
        differenced in the tasks, one-sided, and by central differences where the fit comes to
        need them.
    n : int
        Number of parameters.
    m : int, optional
        Number of rows; needed where there is no data.
    data : sequence of arrays, shape (m, ...)
        cuPyNumeric arrays, and what Legate's own readers return (``legate.io.hdf5.from_file``),
        stay where their shards are. Anything else with a shape and slices (NumPy arrays, memory
        maps, datasets of h5py or Zarr) is read block by block by the tasks, on every rank its own
        rows only. Import h5py before Legate starts: it does not load after Legate's own HDF5.
    sigma : array, shape (m,) or (m, k), optional
        Standard deviations of the rows, of any kind that ``data`` may be: residuals and rows of J
        are divided by them.
    namespace : {'numpy', 'torch'}
        What x and the blocks are to the functions. torch computes on GPUs where Legate has
        some. Each thread gets its own deep copy of torch functions, and so of the modules that
        they hold as attributes (those of a closure are shared, and are not safe).
    dtype : str
        The dtype of x that the functions see.
    loss, f_scale : str, float
        As in `least_squares`.
    block_rows : int, optional
        Rows of a block; by default as many as make 8 MB of J, 32768 at most.

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
    data = [_array(a) for a in data]
    shapes = [tuple(a.shape) for a in data]
    if m is None and not shapes:
        raise ValueError("`m`, the number of rows, is needed where there is no `data`.")
    if m is None:
        m = shapes[0][0]
    if any(not shape or shape[0] != m for shape in shapes):
        raise ValueError(f"`data` must have m = {m} rows each, got shapes {shapes}.")
    if sigma is not None:
        sigma = _array(sigma)
        if tuple(sigma.shape[:1]) != (m,) or len(sigma.shape) > 2:
            raise ValueError(
                f"`sigma` must have shape (m,) or (m, k) with m = {m}, got {tuple(sigma.shape)}."
            )
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
        numbered=not data,
        weighted=sigma is not None,
    )
    return RowProblem(functions, m, (*data,) if sigma is None else (*data, sigma))


def _array(a: Any) -> Any:
    """``a``, as a cuPyNumeric array if it is one of Legate's own."""
    return start().asarray(a) if hasattr(a, "__legate_data_interface__") else a


@dataclass(frozen=True)
class Evaluated:
    """What is known of the residuals at a point: their cost."""

    cost: float


class RowProblem:
    """The solver's view of `rows`; see LeastSquaresProblem."""

    xp: Namespace = np

    def __init__(self, functions: BlockFunctions, m: int, data: tuple[Array, ...]) -> None:
        start()
        self.m, self.n = m, functions.n
        self.nfev = self.njev = 0
        self.functions = functions
        self._sums = CostSums(functions)
        self.layout = self._sums.layout(m, data)

    @property
    def loss(self) -> Loss | None:
        """The loss of the residuals, if they have one."""
        return self.functions.loss

    @property
    def precision(self) -> float:
        """Unit round-off of the residuals."""
        return float(np.finfo(self.functions.blocks.dtype).eps)

    def begin(self, x0: np.ndarray, lb: np.ndarray, ub: np.ndarray) -> None:
        """A fit from x0 between bounds begins: differences stay inside."""
        typical = np.where(x0 != 0, np.abs(x0), 1.0)
        self.functions.differences = Differences(
            "2-point", typical, max(self.precision, float(np.finfo(x0.dtype).eps)), lb=lb, ub=ub
        )

    def residual(self, x: np.ndarray) -> Evaluated:
        """The cost at x (n,): one launch, one read."""
        self.nfev += 1
        return Evaluated(self._sums.cost(self.layout, x))

    def cost(self, r: Evaluated) -> float:
        """The cost of what `residual` returned."""
        return r.cost

    def linearize(self, x: np.ndarray, r: Evaluated | None = None) -> NormalEquations:
        """The sums of J at x (n,): one launch, one read of n^2 + n numbers."""
        self.njev += 1
        found = self._sums.subproblem(self.layout, x)
        self.m = self._sums.m
        return found

    def curvature_rows(
        self, x: np.ndarray, r: Evaluated, J: None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """See `CostSums`: a launch and a read, two with a loss."""
        return self._sums.curvature_rows(self.layout, x, self.functions.loss is not None)

    def derivative_error(self) -> float:
        """Relative error of the Jacobian's entries to expect from the way it is made."""
        return self.functions.derivative_error()

    def refine_derivatives(self) -> bool:
        """Go over from one-sided to central differences; False where that is not possible."""
        return self.functions.refine()


class BlockFunctions:
    """The user's two functions over one block of rows, with their deviations and the loss."""

    def __init__(
        self,
        fun: Function,
        jac: Function | None,
        *,
        n: int,
        blocks: NumpyBlocks | TorchBlocks,
        loss: Loss | None,
        block_rows: int,
        numbered: bool,
        weighted: bool,
    ) -> None:
        self.n, self.blocks, self.loss, self.block_rows = n, blocks, loss, block_rows
        self.numbered, self._weighted = numbered, weighted
        self._functions = fun, jac
        self.differences = Differences("2-point", np.ones(n), float(np.finfo(blocks.dtype).eps))

    def cost(self, x: Array, block: tuple[Any, ...], b: int) -> Array:
        """0-d cost of a block of b rows, summed in float64."""
        return cost_of(self._residual(x, block, b), self.loss)

    def linear(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array, Loss | None]:
        """r (b * k,) and J (b * k, n) of a block of b rows, and the loss."""
        _, jac = self.blocks.functions(self._functions)
        r, J = self._differenced(x, block, b) if jac is None else self._exact(jac, x, block, b)
        return r, J, self.loss

    def derivative_error(self) -> float:
        """See RowProblem."""
        diff = self.differences
        if self._functions[1] is not None:
            return 0.0
        return float(diff.precision ** (0.5 if diff.kind == "2-point" else 2.0 / 3.0))

    def refine(self) -> bool:
        """See RowProblem."""
        if self._functions[1] is not None or self.differences.kind == "3-point":
            return False
        self.differences = replace(self.differences, kind="3-point")
        return True

    def _residual(self, x: Array, block: tuple[Any, ...], b: int) -> Array:
        """r (b * k,) in units of their deviations."""
        fun, _ = self.blocks.functions(self._functions)
        block, sigma = self._split(block)
        return self._scaled(self._checked(fun(x, *block), b), sigma, b)

    def _exact(
        self, jac: Function, x: Array, block: tuple[Any, ...], b: int
    ) -> tuple[Array, Array]:
        """r and J as the user's functions return them, in units of the deviations."""
        inner, sigma = self._split(block)
        J = jac(x, *inner)
        if isinstance(J, tuple):
            r, J = self._scaled(self._checked(J[0], b), sigma, b), J[1]
        else:
            r = self._residual(x, block, b)
        expected = r.shape[0], self.n
        if math.prod(J.shape) != math.prod(expected) or J.shape[-1] != self.n:
            raise ValueError(f"`jac_block` must return {expected} numbers, got {tuple(J.shape)}.")
        return r, self._scaled(self.blocks.flat(J, *expected), sigma, b)

    def _differenced(self, x: Array, block: tuple[Any, ...], b: int) -> tuple[Array, Array]:
        """r and J by differences."""

        def residual(x: Array) -> Array:
            return self._residual(x, block, b)

        diff, r = self.differences, copied(residual(x))  # some fill one array at every call
        if type(r) is np.ndarray:
            return r, _numdiff.dense(diff, residual, x, r, None)
        squares = partial(LOCAL.cost, array_namespace(r), loss=None)
        return r, _numdiff.dense_xp(diff, residual, x, to_numpy(x), r, squares)

    def _split(self, block: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array | None]:
        """What the user's functions take of a block, and the deviations."""
        return (block[:-1], block[-1]) if self._weighted else (block, None)

    def _scaled(self, a: Array, sigma: Array | None, b: int) -> Array:
        """Residuals (b * k,), or rows (b * k, n), divided by their deviations (b,) or (b, k)."""
        if sigma is None:
            return a
        k = a.shape[0] // b
        if sigma.ndim == 2 and sigma.shape[1] != k:
            raise ValueError(
                f"`sigma` must have shape (m,) or (m, {k}), one for each residual of a row, got "
                f"{sigma.shape[1]} in a row."
            )
        shape = (b, k if sigma.ndim == 2 else 1, *(1 for _ in a.shape[1:]))
        whitened = self.blocks.flat(a, b, k, *a.shape[1:]) / self.blocks.flat(sigma, *shape)
        return self.blocks.flat(whitened, *a.shape)

    def _checked(self, r: Array, b: int) -> Array:
        if not r.shape or r.shape[0] != b:
            raise ValueError(
                f"`fun_block` must return one residual or more for each of the {b} rows of its "
                f"block, got shape {tuple(r.shape)}."
            )
        return self.blocks.flat(r, -1)
