"""A network on a batch as the solver's problem: cost, and one linearisation at an accepted point.

The form follows the shape: J'J from streamed rows while it is no larger than the rows are many,
the dual kernel in the m residuals where the network is wider than the batch, and products alone
where neither matrix fits into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import array_api_compat.torch
import torch
from torch import Tensor

from lmsolve._subproblem import Subproblem

from . import _factors, _jacobian
from ._jacobian import Plan, Point
from ._network import Batch, Network
from ._products import FactorProducts, GraphProducts
from ._subproblems import MatrixFreeSubproblem, NetworkEquations, Products, WideSubproblem
from ._sums import DualKernel, NormalSums

T = TypeVar("T")

# The solver works on copies: the matrix, its scaled form and its factor.
_MATRICES = 3
# Beyond this size a square matrix of a float32 model stays in float32. Measured: docs/torch.md.
_WIDE_ACCUMULATOR = 16384


class Evaluation(NamedTuple):
    """Handle on the residuals at one point: the cost, and what its linearisation can reuse."""

    cost: Tensor  # 0-d, float64
    passes: list[_factors.Pending] | None


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
    """`lmsolve._problem.LeastSquaresProblem` of a network on one batch.

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

    xp: Any = array_api_compat.torch

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

    def linearize(self, x: Tensor, r: Evaluation) -> Subproblem:
        """Subproblem at x (n,), in the form that fits shape and memory."""
        self.njev += 1
        passes = r.passes
        form = self.form()
        if form == "normal":
            return self._retry(lambda: self._normal(x, passes))
        if form == "dual":
            return self._retry(lambda: self._dual(x, passes))
        return self._retry(lambda: self._matrix_free(x))

    def form(self) -> str:
        """`normal`, `dual` or `products`."""
        n, m = self.network.parameters.n, self.m
        form, size = ("normal", n) if m >= n else ("dual", m)
        room = _MATRICES * size * size * accumulator(self.network, size).itemsize
        return form if room <= self.settings.memory else "products"

    def _point(self, x: Tensor) -> Point:
        tensors = self.network.parameters.unpack(x)
        return Point(tensors, self.settings.scale, self.settings.seed)

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

    def _normal(self, x: Tensor, passes: list[_factors.Pending] | None) -> Subproblem:
        network, n = self.network, self.network.parameters.n
        if passes is None:
            sums = block_sums(network, x, self.batch, self.plan, self.settings)
            gram, grad = sums.gram, sums.grad
        else:
            both = NormalSums(n, accumulator(network, n), x.device)
            while passes:
                add_pass(network, passes.pop(0), both)
            gram, grad = both.gram, both.grad
        if self.settings.decay:
            gram.diagonal().add_(self.settings.decay)
            grad = grad + self.settings.decay * x.to(grad.dtype)
        dtype = network.parameters.dtype
        return NetworkEquations(self.xp, gram.to(x.dtype), grad.to(x.dtype), dtype)

    def _dual(self, x: Tensor, passes: list[_factors.Pending] | None) -> Subproblem:
        network, point = self.network, self._point(x)
        offsets, m = network.parameters.offsets, self.m
        dtype = accumulator(network, m)
        if self.plan.way != "factors":
            products = GraphProducts(network, self.batch, point, self._evaluation_samples())
            r = self._rows(point)
            norms = self._estimated_norms(products, r)

            def by_groups(c: Sequence[float]) -> Tensor:
                return self._kernel_by_groups(point, c, dtype)

            return WideSubproblem(x, r, products, norms, offsets, self.settings.decay, by_groups)
        if passes is None:
            blocks = self.batch.blocks(self.plan.samples)
            passes = [
                _factors.run(network, point.tensors, b, point.scale, point.seed) for b in blocks
            ]
        found = _factors.joined([p.backward() for p in passes])
        sizes = tuple(network.parameters.sizes)
        kernel = DualKernel(
            found.factors, sizes, self.batch.size, self.plan.k, self._block_memory()
        )
        norms = torch.tensor(
            [
                (kernel.squared_norms(uses, size) / size) ** 0.5
                for uses, size in zip(found.factors, sizes, strict=True)
            ]
        )
        return WideSubproblem(
            x,
            found.rows.reshape(-1),
            FactorProducts(found, offsets),
            norms,
            offsets,
            self.settings.decay,
            lambda c: kernel.assemble(c, dtype, x.device),
        )

    def _matrix_free(self, x: Tensor) -> Subproblem:
        point = self._point(x)
        products = GraphProducts(self.network, self.batch, point, self._evaluation_samples())
        r = self._rows(point)
        norms = self._estimated_norms(products, r)
        offsets = self.network.parameters.offsets
        return MatrixFreeSubproblem(x, r, products, norms, offsets, self.settings.decay)

    def _rows(self, point: Point) -> Tensor:
        """All rows r (m,)."""
        blocks = self.batch.blocks(self._evaluation_samples())
        rows = [self.network.judge(point.tensors, b, point.scale, point.seed).rows for b in blocks]
        return torch.cat([v.detach().reshape(-1) for v in rows])

    def _estimated_norms(self, products: Products, r: Tensor) -> Tensor:
        """Root mean square of the columns of each parameter tensor, by Hutchinson's estimator.

        E |J'z|^2 = |J|^2 (Frobenius) for signs z. Two fixed draws: a scale need not be exact.
        """
        offsets = self.network.parameters.offsets
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(len(offsets) - 1, dtype=torch.float64)
        for _ in range(2):
            z = torch.randint(0, 2, r.shape, generator=generator).to(r) * 2 - 1
            squares = products.transposed(z).double().square()
            parts = torch.split(squares, self.network.parameters.sizes)
            total += torch.stack([v.mean() for v in parts]).cpu()
        return (total / 2).sqrt()

    def _kernel_by_groups(self, point: Point, c: Sequence[float], dtype: torch.dtype) -> Tensor:
        """`J diag(c) J'` from groups of parameters whose columns fit into memory."""
        parameters = self.network.parameters
        K = torch.zeros((self.m, self.m), dtype=dtype, device=parameters.device)
        for group in self._groups():
            columns = []
            for _, J in _jacobian.stream(self.network, self.batch, point, self.plan, group):
                columns.append(J.to(dtype))
            J = torch.cat(columns)
            del columns
            root = torch.tensor([c[i] ** 0.5 for i in group], dtype=dtype, device=J.device)
            sizes = torch.tensor([parameters.shapes[i].numel() for i in group], device=J.device)
            J *= torch.repeat_interleave(root, sizes)
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
