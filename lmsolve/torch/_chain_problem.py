"""The problem of a chain of layers, in blocks for the cache.

A trial keeps the outputs of the layers that it computes anyway, in memory that is used again and
again, and a linearisation goes backward through them. A block of J comes out transposed, as its
Gram product reads it. What a block needs fits into a core's second-level cache.

Symbols: B samples in blocks of b, k residuals of each; layers of i inputs and o outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._chain import Chain, Layers
from ._jacobian import Plan, Point, block_rows, is_close, reference
from ._losses import Judged
from ._network import Batch, Network
from ._params import Parameters
from ._problem import Evaluation, NetworkProblem, Settings, accumulator
from ._subproblems import TallSubproblem
from ._sums import NormalSums

# Samples on which a chain is compared with a plain backward pass.
_PROBE = 64


def _with_ones(h: Tensor) -> Tensor:
    """(i + 1, b): a layer's input, and below it what the bias multiplies."""
    return torch.cat([h, torch.ones_like(h[:1])])


class Memory:
    """Outputs of the hidden layers, block by block; whoever wrote them last owns them."""

    def __init__(self, chain: Chain, inputs: Sequence[Tensor]) -> None:
        self.sizes = [h.shape[1] for h in inputs]
        self.blocks = [
            [_with_ones(h.new_empty((width, h.shape[1]))) for width in chain.widths[:-1]]
            for h in inputs
        ]
        self.values = [[h[:-1] for h in block] for block in self.blocks]
        self.owner: Trace | None = None

    def folded(self) -> Memory:
        """The same with all full blocks in one place, which stays in the cache."""
        folded, again = copy.copy(self), len(self.sizes) - 1
        folded.blocks = self.blocks[:1] * again + self.blocks[-1:]
        folded.values = self.values[:1] * again + self.values[-1:]
        return folded


@dataclass(frozen=True, eq=False)
class Trace:
    """A forward pass: outputs y (o, B), what they were judged, and where the rest is."""

    tensors: tuple[Tensor, ...]
    y: Tensor
    judged: Judged  # rows with their graph back to `y`
    memory: Memory

    def slopes(self) -> Tensor:
        """Derivatives (k, o, B) of the residuals of each sample in its outputs."""
        rows = self.judged.rows
        found = []
        for column in range(rows.shape[1]):
            (g,) = torch.autograd.grad(rows[:, column].sum(), self.y, retain_graph=True)
            found.append(g)
        return torch.stack(found)


class ChainProblem(NetworkProblem):
    """The problem of a chain with at least as many residuals as parameters."""

    def __init__(
        self, network: Network, batch: Batch, plan: Plan, settings: Settings, chain: Chain
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.chain = chain
        own = network.parameters
        # A block for every core's cache: torch's threads share each operation.
        rows = torch.get_num_threads() * block_rows(own.n, own.dtype)
        self.inputs = [_with_ones(part.T) for part in batch.inputs.split(max(1, rows // plan.k))]
        # One for the point that is linearised, one for the next trial.
        self._held, self._spare = (Memory(chain, self.inputs) for _ in range(2))

    @staticmethod
    def suits(chain: Chain, batch: Batch, dtype: torch.dtype, memory: int) -> bool:
        """Whether data are plain vectors on the host, and the activations fit into memory."""
        x = batch.inputs
        if not isinstance(x, Tensor) or x.ndim != 2 or x.device.type != "cpu" or x.dtype != dtype:
            return False
        words = x.shape[1] + 2 * sum(chain.widths)
        return words * batch.size * dtype.itemsize <= memory

    def _evaluate(self, x: Tensor) -> Evaluation:
        trace = self._trace(self._point(x), self._spare)
        self._spare.owner = trace
        cost = 0.5 * self.settings.decay * x.to(torch.float64).square().sum()
        return Evaluation(cost + trace.judged.cost.sum(), trace)

    def _trace(self, point: Point, memory: Memory) -> Trace:
        """Outputs and residuals at a point."""
        tensors = tuple(point.tensors.values())
        y = self.batch.inputs.new_empty((self.chain.widths[-1], self.batch.size))
        matrices, ends = self.chain.matrices(tensors), torch.split(y, memory.sizes, 1)
        blocks = zip(self.inputs, memory.blocks, memory.values, ends, strict=True)
        for h, hidden, values, end in blocks:
            self.chain.forward(matrices, [h, *hidden], [*values, end])
        y.requires_grad_()
        with torch.enable_grad():
            judged = self.network.judge_output(y.T, self.batch, point.scale)
        return Trace(tensors, y, Judged(judged.rows, judged.cost.detach()), memory)

    def _rows(self, point: Point) -> Tensor:
        """All rows r (m,)."""
        self._spare.owner = None
        return self._trace(point, self._spare.folded()).judged.rows.detach().reshape(-1)

    def _normal(self, x: Tensor, passes: object, damping: float = 0.0) -> TallSubproblem:
        if not isinstance(passes, Trace) or passes.memory.owner is not passes:
            passes = self._evaluate(x).passes
            assert isinstance(passes, Trace)
        if passes.memory is self._spare:
            self._held, self._spare = self._spare, self._held
        network, n = self.network, self.network.parameters.n
        sums = NormalSums(n, accumulator(network, n), x.device, self._block_dtype(damping))
        products = ChainProducts(self, passes, passes.slopes())
        products.add_rows(sums)
        r = passes.judged.rows.detach().reshape(-1).to(x.dtype)
        slope = self._slope(x, r)
        decay = self.settings.decay
        return TallSubproblem(sums.gram, sums.grad, x, r, products, decay, slope)


class Block:
    """Memory for a block of J', (n, k b), and in it for each residual the part of each layer."""

    def __init__(
        self, chain: Chain, parameters: Parameters, k: int, b: int, dtype: torch.dtype
    ) -> None:
        Jt = torch.empty((parameters.n, k, b), dtype=dtype)
        self.Jt = Jt.flatten(1)
        shapes = parameters.shapes
        self.weights = [
            [Jt[parameters.span(w), row].view(*shapes[w], b) for w, _, _ in chain.links]
            for row in range(k)
        ]
        self.biases = [
            [None if i is None else Jt[parameters.span(i), row] for _, i, _ in chain.links]
            for row in range(k)
        ]
        # d is made where it stays, or made in the model's dtype and copied.
        same = dtype == parameters.dtype
        self.places = self.biases if same else [[None] * len(chain.links)] * k

    def put(self, row: int, number: int, h: Tensor, d: Tensor) -> None:
        """The rows of a layer with the input h (i, b) and the gradient d (o, b)."""
        torch.mul(d[:, None], h, out=self.weights[row][number])
        bias = self.biases[row][number]
        if bias is not None and bias is not d:
            bias.copy_(d)


@dataclass(frozen=True)
class ChainProducts:
    """Rows of J, and products with them, at a point."""

    problem: ChainProblem
    trace: Trace
    slopes: Tensor  # (k, o, B)

    def add_rows(self, sums: NormalSums) -> None:
        """Add all rows."""
        chain, parameters = self.problem.chain, self.problem.network.parameters
        k, tensors = len(self.slopes), self.trace.tensors
        block: Block | None = None
        for (r, d), layers in self._blocks(self.trace.judged.rows.detach().T, self.slopes):
            b = r.shape[1]
            if block is None or block.Jt.shape[1] != k * b:
                block = None  # before the next one takes its memory
                block = Block(chain, parameters, k, b, sums.block_dtype)
            for row in range(k):
                for layer in chain.backward(tensors, layers, d[row], block.places[row]):
                    block.put(row, *layer)
            sums.add(r.reshape(-1), block.Jt.T)

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        chain, parameters = self.problem.chain, self.problem.network.parameters
        z = z.to(self.slopes.dtype).view(-1, len(self.slopes)).T
        total = z.new_zeros(parameters.n)
        parts = list(parameters.unpack(total).values())
        nowhere = [None] * len(chain.links)
        for (d,), layers in self._blocks((self.slopes * z[:, None]).sum(0)):
            for number, h, d_l in chain.backward(self.trace.tensors, layers, d, nowhere):
                link = chain.links[number]
                parts[link.weight].addmm_(d_l, h.T)
                if link.bias is not None:
                    parts[link.bias].add_(d_l.sum(1))
        return total

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        chain, tensors = self.problem.chain, self.trace.tensors
        directions = chain.matrices(list(self.problem.network.parameters.unpack(p).values()))
        images = [chain.pushed(tensors, directions, layers) for _, layers in self._blocks()]
        return (self.slopes * torch.cat(images, 1)).sum(1).T.reshape(-1)

    def _blocks(self, *wholes: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Layers]]:
        """Parts of tensors (..., B) block by block, and the block."""
        memory = self.trace.memory
        parts = [torch.split(v, memory.sizes, -1) for v in (*wholes, self.trace.y.detach())]
        blocks = zip(self.problem.inputs, memory.blocks, memory.values, *parts, strict=True)
        for h, arguments, values, *own, y in blocks:
            yield tuple(own), Layers([h, *arguments], [h[:-1], *values, y])


def verified(network: Network, batch: Batch, settings: Settings, x: Tensor, k: int) -> Chain | None:
    """The network's chain, if it does what a plain backward pass does."""
    chain = Chain.of(network)
    probe = batch.block(0, _PROBE)
    if chain is None or not ChainProblem.suits(chain, probe, network.parameters.dtype, 1 << 62):
        return None
    problem = ChainProblem(network, probe, Plan("factors", k, False, _PROBE), settings, chain)
    r, z, exact = reference(network, probe, problem._point(x))
    sub = problem._normal(x, None)
    if is_close(sub.r.to(r.dtype), r) and is_close(sub.products.transposed(z), exact):
        return chain
    return None
