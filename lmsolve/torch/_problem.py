"""A network on a batch as the solver's problem: cost, and one linearisation at an accepted point.

The form follows the shape: J'J from streamed rows while it is no larger than the rows are many,
the dual kernel in the m residuals where the network is wider than the batch, and products alone
where neither matrix fits into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import _factors, _jacobian
from ._jacobian import Plan, Point
from ._network import Batch, Network
from ._params import Parameters
from ._products import FactorProducts, GraphProducts, HeldProducts
from ._subproblems import (
    AHEAD,
    Curved,
    Linearised,
    MatrixFreeSubproblem,
    Products,
    Slope,
    TallSubproblem,
    WideSubproblem,
    by_slopes,
)
from ._sums import DualKernel, NormalSums

T = TypeVar("T")

# The matrix, its factor, and what a block adds to it.
_MATRICES = 3
# Beyond this size a square matrix of a float32 model stays in float32. Measured: docs/torch.md.
_WIDE_ACCUMULATOR = 16384
# Relative damping above which products of float32 rows may be made in float32.
COARSE = 1e-3
# Random vectors that estimate the columns of a J that is nowhere.
_DRAWS = 4
# Bytes of J that are kept for two products a trial, which otherwise cost a pass each.
HELD = 64 << 20


class Evaluation(NamedTuple):
    """Handle on the residuals at one point: the cost, and what its linearisation can reuse."""

    cost: Tensor  # 0-d, float64
    passes: Any


class BlockSums(NamedTuple):
    """What a block of samples adds to the normal equations."""

    gram: Tensor  # J'J (n, n)
    grad: Tensor  # J'r (n,)
    cost: Tensor  # 0-d, float64


@dataclass(frozen=True)
class Settings:
    """Constants of a fit."""

    scale: float = 1.0  # of the objective: 1 / samples where it is a mean
    decay: float = 0.0  # 1/2 decay |x|^2 joins the cost
    memory: int = 1 << 30  # bytes
    seed: int | None = None  # of dropout masks; None leaves torch's own stream alone
    acceleration: bool = True  # bend steps along the residuals' curvature


def holds(plan: Plan, settings: Settings, m: int, parameters: Parameters, passes: bool) -> bool:
    """Whether rows J (m, n) stay in memory for the products of trials, in place of any `passes`.

    Where layers share their weights, as convolutions do, a sample's rows are smaller than what a
    pass of it keeps, and a product with them is far cheaper than a pass: 0.03 against 1.5 s with
    60,000 rows of 1,026.
    """
    row, room = parameters.n * parameters.dtype.itemsize, settings.memory // 4
    if plan.activation_bytes > plan.k * row:
        return m * row <= room
    return not passes and m * row <= min(HELD, room)


def add_up(blocks: Iterable[_jacobian.Block], sums: NormalSums, J: Tensor | None) -> Tensor:
    """Add blocks of rows to sums, and put them into J (m, n), if any; residuals (m,)."""
    r: list[Tensor] = []
    done = 0
    for rows, block in blocks:
        sums.add(rows, block)
        if J is not None:
            J[done : done + len(rows)] = block
        done += len(rows)
        r.append(rows.clone())
    return torch.cat(r)


def block_sums(
    network: Network, x: Tensor, block: Batch, plan: Plan, settings: Settings
) -> BlockSums:
    """Gram matrix, gradient and cost of a block of samples: reverse mode only, no shared state.

    Safe in a thread of its own if `network.module` is that thread's copy. The penalty is not in.
    """
    point = Point(network.parameters.unpack(x), settings.scale, settings.seed)
    dtype = accumulator(network, network.parameters.n)
    sums = NormalSums(network.parameters.n, dtype, x.device)
    cost = torch.zeros((), dtype=torch.float64, device=x.device)
    if plan.way == "factors":
        for part in block.blocks(plan.samples):
            pending = _factors.run(network, point.tensors, part, point.scale, point.seed)
            cost += pending.cost.sum()
            add_pass(network, pending, sums)
        return BlockSums(sums.gram, sums.grad, cost)
    for part in block.blocks(block.size if plan.coupled else plan.samples):
        cost += network.judge(point.tensors, part, point.scale, point.seed).cost.detach().sum()
    for r, J in _jacobian.stream(network, block, point, plan):
        sums.add(r, J)
    return BlockSums(sums.gram, sums.grad, cost)


def add_pass(network: Network, pending: _factors.Pending, sums: NormalSums) -> None:
    """Run a pass backward and add its rows."""
    for r, J in _jacobian.rows_of_pass(network, pending.backward(), sums.gram.dtype):
        sums.add(r, J)


def accumulator(network: Network, size: int) -> torch.dtype:
    """Dtype of a square matrix of products: float64 while that is affordable."""
    own = network.parameters.dtype
    return torch.float64 if size <= _WIDE_ACCUMULATOR else own


def available_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class NetworkProblem:
    """The problem of a network on one batch, as `Descent` sees it.

    Parameters
    ----------
    network : Network
        Module, parameter layout and objective.
    batch : Batch
        Samples.
    plan : Plan
        How rows are made.
    settings : Settings
        Constants of the fit.
    """

    def __init__(self, network: Network, batch: Batch, plan: Plan, settings: Settings) -> None:
        self.network = network
        self.batch = batch
        self.plan = plan
        self.settings = settings
        self.nfev = 0
        self.njev = 0

    @property
    def m(self) -> int:
        """Number of residuals."""
        return self.plan.k if self.plan.coupled else self.plan.k * self.batch.size

    def residual(self, x: Tensor) -> Evaluation:
        """Evaluate the cost at x (n,)."""
        self.nfev += 1
        return self._retry(lambda: self._evaluate(x))

    def cost(self, r: Evaluation) -> Tensor:
        """0-d cost."""
        return r.cost

    def linearize(self, x: Tensor, r: Evaluation, damping: float = 0.0) -> Linearised:
        """Subproblem at x (n,), in the form that fits shape and memory."""
        self.njev += 1
        passes, form = r.passes, self.form()

        def compute() -> Linearised:
            nonlocal passes
            kept, passes = passes, None  # their graphs serve once; a second try makes its own
            if form == "normal":
                return self._normal(x, kept, damping)
            return self._dual(x, kept) if form == "dual" else self._matrix_free(x)

        return self._retry(compute)

    def form(self) -> str:
        """`normal`, `dual` or `products`."""
        n, m = self.network.parameters.n, self.m
        form, size = ("normal", n) if m >= n else ("dual", m)
        room = _MATRICES * size * size * accumulator(self.network, size).itemsize
        return form if room <= self.settings.memory else "products"

    def _point(self, x: Tensor) -> Point:
        tensors = self.network.parameters.unpack(x)
        return Point(tensors, self.settings.scale, self.settings.seed)

    def _block_dtype(self, damping: float) -> torch.dtype | None:
        """Dtype of the rows of J in products, where it is not that of their sum."""
        return self.network.parameters.dtype if damping > COARSE else None

    def _block_memory(self) -> int:
        return self.settings.memory // 4

    def _evaluate(self, x: Tensor) -> Evaluation:
        point = self._point(x)
        keep = (
            self.plan.way == "factors"
            and self.plan.activation_bytes * self.batch.size <= self._block_memory()
        )
        cost = 0.5 * self.settings.decay * x.to(torch.float64).square().sum()
        passes: list[_factors.Pending] = []
        for block in self.batch.blocks(self._evaluation_samples()):
            if keep:
                pending = _factors.run(self.network, point.tensors, block, point.scale, point.seed)
                passes.append(pending)
                cost = cost + pending.cost.sum()
            else:
                judged = self.network.judge(point.tensors, block, point.scale, point.seed)
                cost = cost + judged.cost.detach().sum()
        return Evaluation(cost, passes if keep else None)

    def _evaluation_samples(self) -> int:
        """Samples in a block of a forward pass; as in the Jacobian where masks depend on it."""
        if self.plan.coupled:
            return self.batch.size
        if self.plan.way == "factors" or self.settings.seed is not None:
            return self.plan.samples
        return max(self.plan.samples, 1024)

    def _normal(
        self, x: Tensor, passes: list[_factors.Pending] | None, damping: float = 0.0
    ) -> Linearised:
        network, n, decay = self.network, self.network.parameters.n, self.settings.decay
        sums = NormalSums(n, accumulator(network, n), x.device, self._block_dtype(damping))
        point, J = self._point(x), None
        if holds(self.plan, self.settings, self.m, network.parameters, passes is not None):
            J = x.new_empty((self.m, n), dtype=network.parameters.dtype)
        done: list[_factors.Pass] = []
        if passes is None:
            blocks = _jacobian.stream(network, self.batch, point, self.plan)
        else:
            kept = done if J is None else None
            blocks = _jacobian.rows_of_passes(network, passes, sums.block_dtype, kept)
        r = add_up(blocks, sums, J).to(x.dtype)
        products: Products
        if J is not None:
            products = HeldProducts(J)
        elif done:
            products = FactorProducts(done, network.parameters.offsets)
        else:
            products = GraphProducts(network, self.batch, point, self._evaluation_samples())
        curved = self._curved(x, r, products)
        return TallSubproblem(sums.gram, sums.grad, x, r, products, decay, curved)

    def _dual(self, x: Tensor, passes: list[_factors.Pending] | None) -> WideSubproblem:
        network, point, decay = self.network, self._point(x), self.settings.decay
        dtype = accumulator(network, self.m)
        products: Products
        if self.plan.way == "factors":
            if passes is None:
                blocks = self.batch.blocks(self.plan.samples)
                passes = [
                    _factors.run(network, point.tensors, b, point.scale, point.seed) for b in blocks
                ]
            found = _factors.joined([pending.backward() for pending in passes])
            r = found.rows.reshape(-1)
            products = FactorProducts([found], network.parameters.offsets)
            sizes = tuple(network.parameters.sizes)
            memory = self._block_memory()
            parts = DualKernel(found.factors, sizes, self.batch.size, self.plan.k, memory)
            kernel = parts.assemble(dtype, x.device)
        else:
            products = GraphProducts(network, self.batch, point, self._evaluation_samples())
            r = self._rows(point)
            kernel = self._kernel_by_groups(point, dtype)
        r = r.to(x.dtype)
        return WideSubproblem(kernel, x, r, products, decay, self._slope(x, r))

    def _matrix_free(self, x: Tensor) -> MatrixFreeSubproblem:
        products = self._products(x)
        r = self._rows(self._point(x)).to(x.dtype)
        squares = self._column_squares(products, r)
        return MatrixFreeSubproblem(squares, x, r, products, self.settings.decay)

    def _column_squares(self, products: Products, r: Tensor) -> Tensor:
        """Estimate (n,) of the squared norms of J's columns."""
        # E (J'z)^2 over random signs z. Fixed draws: they scale the damping.
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(self.network.parameters.n, dtype=torch.float64, device=r.device)
        for _ in range(_DRAWS):
            z = torch.randint(0, 2, r.shape, generator=generator).to(r) * 2 - 1
            total += products.transposed(z).to(torch.float64).square() / _DRAWS
        parts = torch.split(total, self.network.parameters.sizes)
        shapes = self.network.parameters.shapes
        return torch.cat([_smoothed(v.view(s)) for v, s in zip(parts, shapes, strict=True)])

    def _products(self, x: Tensor) -> Products:
        """J at x as an operator that holds nothing."""
        return GraphProducts(self.network, self.batch, self._point(x), self._evaluation_samples())

    @property
    def _accelerated(self) -> bool:
        """Whether steps are bent.

        The rows of a loss are linear in the outputs by construction: they have no second
        derivative to speak of.
        """
        return self.settings.acceleration and self.network.objective.exact

    def _curved(self, x: Tensor, r: Tensor, products: Products) -> Curved | None:
        """How J'r_pp (n,) of a step is found, if steps are bent."""
        return by_slopes(self._slope(x, r), products)

    def _slope(self, x: Tensor, r: Tensor) -> Slope | None:
        """Slope of the residuals along a step, over a share of it, if steps are bent."""
        if not self._accelerated:
            return None

        def slope(p: Tensor) -> Tensor:
            ahead = self._retry(lambda: self._rows(self._point(x + AHEAD * p)))
            return (ahead.to(r.dtype) - r) / AHEAD

        return slope

    def _rows(self, point: Point) -> Tensor:
        """All rows r (m,)."""
        blocks = self.batch.blocks(self._evaluation_samples())
        rows = [self.network.judge(point.tensors, b, point.scale, point.seed).rows for b in blocks]
        return torch.cat([v.detach().reshape(-1) for v in rows])

    def _kernel_by_groups(self, point: Point, dtype: torch.dtype) -> Tensor:
        """`J J'` from groups of parameters whose columns fit into memory."""
        parameters = self.network.parameters
        K = torch.zeros((self.m, self.m), dtype=dtype, device=parameters.device)
        for group in self._groups():
            columns = []
            for _, J in _jacobian.stream(self.network, self.batch, point, self.plan, group):
                columns.append(J.to(dtype))
            J = torch.cat(columns)
            del columns
            K.addmm_(J, J.T)
        return K

    def _groups(self) -> list[range]:
        """Runs of parameters whose columns (m, .) take at most the memory of a block."""
        parameters = self.network.parameters
        widest = self._block_memory() // (2 * 8 * self.m)
        groups, start = [], 0
        for i in range(1, len(parameters.names)):
            if parameters.offsets[i + 1] - parameters.offsets[start] > widest:
                groups.append(range(start, i))
                start = i
        return [*groups, range(start, len(parameters.names))]

    def _retry(self, compute: Callable[[], T]) -> T:
        """Run, and on running out of memory run again with blocks of half the size."""
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not _jacobian.is_out_of_memory(error):
                    raise
            smaller = self.plan.halved()
            self.plan = replace(smaller, activation_bytes=2 * max(1, smaller.activation_bytes))
            if self.network.parameters.device.type == "cuda":
                torch.cuda.empty_cache()


def _smoothed(squares: Tensor) -> Tensor:
    """Flat products of the means over the rows and over the columns of a tensor, over its mean.

    Of few draws they are nearer to the truth than the draws themselves.
    """
    matrix = squares.reshape(len(squares), -1) if squares.ndim > 1 else squares.reshape(1, -1)
    rows, columns = matrix.mean(1, keepdim=True), matrix.mean(0, keepdim=True)
    least = torch.finfo(matrix.dtype).tiny
    return (rows / matrix.mean().clamp_min(least) * columns).reshape(-1)
