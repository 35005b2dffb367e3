"""The problem of a chain of layers, in blocks for the cache.

A trial keeps the outputs of the layers that it computes anyway, in memory that is used again and
again; a linearisation goes backward through them, and an acceleration forward along the step. A
block of J comes out transposed, as its Gram product reads it, with r below it. What a thread's
chunk of a block needs fits into a core's second-level cache.

Symbols: B samples in blocks of c chunks of b, k residuals of each; layers of i inputs, o outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ._chain import Chain, Layers
from ._jacobian import Plan, Point, block_rows, is_close, reference
from ._losses import Judged
from ._network import Batch, Network
from ._params import Parameters
from ._problem import Evaluation, NetworkProblem, Settings, accumulator
from ._subproblems import Curved, Products, TallSubproblem
from ._sums import FEWEST_SYRK, ChunkSums, NormalSums

T = TypeVar("T")

# Elements of a cache line: rows that begin with one are written a quarter faster.
_LINE = 8
# Samples on which a chain is compared with a plain backward pass.
_PROBE = 64


@dataclass(frozen=True)
class Cuts:
    """How samples are cut: `count` blocks of `chunks` times `size`, and one chunk of the rest."""

    count: int
    chunks: int
    size: int
    rest: int

    @classmethod
    def even(cls, samples: int, chunks: int, most: int) -> Cuts:
        """Blocks alike, of chunks of at most `most` samples."""
        chunks = min(chunks, samples)
        size = max(1, samples // (chunks * -(-samples // (chunks * most))))
        if size > _LINE:
            size -= size % _LINE
        count = samples // (chunks * size)
        return cls(count, chunks, size, samples - count * chunks * size)

    def of(self, whole: Tensor) -> list[Tensor]:
        """The blocks (c, ..., b) of a tensor (..., B)."""
        shape = (self.count, self.chunks, self.size)
        whole, rest = torch.split(whole, [math.prod(shape), self.rest], -1)
        blocks = [*torch.unflatten(whole, -1, shape).movedim((-3, -2), (0, 1)).unbind(0)]
        return [*blocks, rest[None]] if self.rest else blocks

    def each(self, matrices: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each block matrices (c, ., .), from those for all."""
        whole = [W.expand(self.chunks, -1, -1) for W in matrices]
        return self.firsts(whole)

    def firsts(self, stacks: list[Tensor]) -> list[list[Tensor]]:
        """For each block as many of each stack as it has chunks."""
        blocks = [stacks] * self.count
        return [*blocks, [stack[:1] for stack in stacks]] if self.rest else blocks


class Memory:
    """Outputs of all layers, those of the trace that was written last.

    Or `folded`, with the hidden layers of all blocks in one place, which stays in the cache.
    """

    def __init__(
        self, chain: Chain, cuts: Cuts, inputs: Sequence[Tensor], folded: bool = False
    ) -> None:
        samples = sum(len(h) * h.shape[2] for h in inputs)
        self.y = inputs[0].new_empty((chain.widths[-1], samples))
        self.blocks: list[Layers] = []
        hidden: list[Tensor] = []
        for h, y in zip(inputs, cuts.of(self.y), strict=True):
            if not (folded and self.blocks and h.shape == inputs[0].shape):
                hidden = [h.new_empty((len(h), o + 1, h.shape[2])) for o in chain.widths[:-1]]
            self.blocks.append(Layers.of(h, hidden, y))
        self.written = 0  # how often


@dataclass(frozen=True, eq=False)
class Trace:
    """A forward pass: outputs y (o, B), what they were judged, and where the rest is."""

    tensors: tuple[Tensor, ...]
    y: Tensor
    judged: Judged  # rows with their graph back to `y`
    memory: Memory
    number: int  # by the memory's count

    @property
    def is_whole(self) -> bool:
        """Whether nothing else has been written since."""
        return self.number == self.memory.written

    def slopes(self, graph: bool = False) -> Tensor:
        """Derivatives (k, o, B) of the residuals of each sample in its outputs."""
        rows = self.judged.rows
        found = []
        for weights in torch.eye(rows.shape[1], dtype=rows.dtype):
            (g,) = torch.autograd.grad(
                rows, self.y, weights.expand_as(rows), retain_graph=True, create_graph=graph
            )
            found.append(g)
        return torch.stack(found)

    def bends(self) -> bool:
        """Whether the residuals can be differentiated twice in the outputs."""
        rows = self.judged.rows
        # The derivative depends on the weights, unless its own is hidden from autograd.
        weights = torch.ones_like(rows, requires_grad=True)
        (g,) = torch.autograd.grad(rows, self.y, weights, retain_graph=True, create_graph=True)
        try:
            _, found = torch.autograd.grad(g.sum(), (self.y, weights), allow_unused=True)
        except RuntimeError:  # torch's answer where an operation has one derivative only
            return False
        return found is not None


class ChainProblem(NetworkProblem):
    """The problem of a chain with at least as many residuals as parameters."""

    def __init__(
        self, network: Network, batch: Batch, plan: Plan, settings: Settings, chain: Chain
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.chain = chain
        own = network.parameters
        threads, most = torch.get_num_threads(), block_rows(own.n, own.dtype)
        # Chunks where a product takes one thread, else one block for all threads' caches.
        chunks, most = (threads, most) if own.n < FEWEST_SYRK else (1, threads * most)
        self.cuts = Cuts.even(batch.size, chunks, max(1, most // plan.k))
        blocks = self.cuts.of(batch.inputs.T)
        self.inputs = [torch.cat([h, torch.ones_like(h[:, :1])], 1) for h in blocks]
        # One for the point that is linearised, one for the next trial.
        self._held, self._spare = (Memory(chain, self.cuts, self.inputs) for _ in range(2))
        self._passing = Memory(chain, self.cuts, self.inputs, folded=True)

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
        cost = 0.5 * self.settings.decay * x.to(torch.float64).square().sum()
        return Evaluation(cost + trace.judged.cost.sum(), trace)

    def _retry(self, compute: Callable[[], T]) -> T:
        """Run: blocks are cut for the cache, and `Session` has another way if memory runs out."""
        return compute()

    def _trace(self, point: Point, memory: Memory) -> Trace:
        """Outputs and residuals at a point."""
        y = self._outputs(point, memory).detach().requires_grad_()
        with torch.enable_grad():
            judged = self.network.judge_output(y.T, self.batch, point.scale)
        tensors = tuple(point.tensors.values())
        memory.written += 1
        found = Judged(judged.rows, judged.cost.detach())
        return Trace(tensors, y, found, memory, memory.written)

    def _rows(self, point: Point) -> Tensor:
        """All rows r (m,)."""
        y = self._outputs(point, self._passing)
        return self.network.judge_output(y.T, self.batch, point.scale).rows.reshape(-1)

    def _outputs(self, point: Point, memory: Memory) -> Tensor:
        """Outputs y (o, B)."""
        matrices = self.cuts.each(self.chain.matrices(tuple(point.tensors.values())))
        for matrix, layers in zip(matrices, memory.blocks, strict=True):
            self.chain.forward(matrix, layers)
        return memory.y

    def _normal(self, x: Tensor, passes: object, damping: float = 0.0) -> TallSubproblem:
        if not (isinstance(passes, Trace) and passes.is_whole):
            passes = self._evaluate(x).passes
            assert isinstance(passes, Trace)
        if passes.memory is self._spare:
            self._held, self._spare = self._spare, self._held
        r = passes.judged.rows.detach().reshape(-1).to(x.dtype)
        products = ChainProducts(self, passes, passes.slopes(self.bends_exactly))
        sums = self._sums(damping)
        products.add_rows(sums)
        curved = self._curved(x, r, products)
        return TallSubproblem(sums.gram, sums.grad, x, r, products, self.settings.decay, curved)

    @property
    def bends_exactly(self) -> bool:
        """Whether steps are bent by exact second derivatives.

        In float32 a difference of two residuals has lost most of theirs.
        """
        return self._accelerated and self.network.parameters.dtype == torch.float32

    def _curved(self, x: Tensor, r: Tensor, products: Products) -> Curved | None:
        if self.bends_exactly:
            assert isinstance(products, ChainProducts)
            return lambda p, known: products.curvature(p)
        return super()._curved(x, r, products)

    def curvature(self, point: Point, p: Tensor) -> Tensor:
        """J'r_pp (n,) at any point, exactly."""
        trace = self._trace(point, self._spare)
        return ChainProducts(self, trace, trace.slopes(graph=True)).curvature(p)

    def _sums(self, damping: float) -> NormalSums | ChunkSums:
        n, x = self.network.parameters.n, self.batch.inputs
        dtype, block_dtype = accumulator(self.network, n), self._block_dtype(damping)
        if n < FEWEST_SYRK:
            return ChunkSums(n, dtype, self.cuts.chunks, block_dtype)
        return NormalSums(n, dtype, x.device, block_dtype)


class Block:
    """Memory for a block of [J r]', (c, n + 1, k b), and in it the part of each row and layer."""

    def __init__(self, chain: Chain, parameters: Parameters, r: Tensor, dtype: torch.dtype) -> None:
        chunks, k, b = r.shape
        J = torch.empty((chunks, parameters.n + 1, k, b), dtype=dtype)
        self.chunks, self.r = J.flatten(2), J[:, -1]
        shapes = parameters.shapes
        self.weights = [
            [
                torch.unflatten(J[:, parameters.span(w), row], 1, shapes[w])
                for w, _, _ in chain.links
            ]
            for row in range(k)
        ]
        self.biases = [
            [None if i is None else J[:, parameters.span(i), row] for _, i, _ in chain.links]
            for row in range(k)
        ]
        # d is made where it stays, or made in the model's dtype and copied.
        same = dtype == parameters.dtype
        nowhere: list[Tensor | None] = [None] * len(chain.links)
        self.places = self.biases if same else [nowhere] * k

    def put(self, row: int, number: int, d: Tensor, factor: Tensor) -> None:
        """The rows of a layer with the gradient d (c, o, b) and the input (c, 1, i, b)."""
        torch.mul(d[:, :, None], factor, out=self.weights[row][number])
        bias = self.biases[row][number]
        if bias is not None and bias is not d:
            bias.copy_(d)


@dataclass(frozen=True)
class ChainProducts:
    """Rows of J, and products with them, at a point."""

    problem: ChainProblem
    trace: Trace
    slopes: Tensor  # (k, o, B), with a graph back to the outputs where they are not constant

    def add_rows(self, sums: NormalSums | ChunkSums) -> None:
        """Add all rows."""
        chain, cuts = self.problem.chain, self.problem.cuts
        blocks = zip(
            self.trace.memory.blocks,
            self._transposes(),
            cuts.of(self.trace.judged.rows.detach().T),
            cuts.of(self.slopes.detach()),
            strict=True,
        )
        block: Block | None = None
        for layers, transposes, r, d in blocks:
            if block is None or block.r.shape != r.shape:
                block = None  # before the next one takes its memory
                block = Block(chain, self.problem.network.parameters, r, sums.block_dtype)
            block.r.copy_(r)
            for row, places in enumerate(block.places):
                for number, d_l in chain.backward(transposes, layers, d[:, row], places):
                    block.put(row, number, d_l, layers.factors[number])
            sums.add_chunks(block.chunks)

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        chain, cuts = self.problem.chain, self.problem.cuts
        z = z.to(self.slopes.dtype).view(-1, len(self.slopes)).T
        d = (self.slopes.detach() * z[:, None]).sum(0)
        first = self.trace.memory.blocks[0]
        # Inputs times gradients, (i + 1, o): the other way round it takes three times as long.
        totals = [
            h.new_zeros((len(h), h.shape[1], v.shape[1]))
            for h, v in zip(first.arguments, first.values, strict=True)
        ]
        nowhere: list[Tensor | None] = [None] * len(chain.links)
        blocks = zip(
            self.trace.memory.blocks, self._transposes(), cuts.of(d), cuts.firsts(totals),
            strict=True,
        )  # fmt: skip
        for layers, transposes, d, sums in blocks:
            for number, d_l in chain.backward(transposes, layers, d, nowhere):
                sums[number].baddbmm_(layers.arguments[number], d_l.mT)
        return self._flat([total.sum(0) for total in totals])

    def _flat(self, products: Sequence[Tensor]) -> Tensor:
        """Vector (n,) of one value for each parameter, from (i + 1, o) for each layer."""
        parameters = self.problem.network.parameters
        found = products[0].new_empty(parameters.n)
        parts = list(parameters.unpack(found).values())
        for link, product in zip(self.problem.chain.links, products, strict=True):
            parts[link.weight].copy_(product[:-1].T)
            if link.bias is not None:
                parts[link.bias].copy_(product[-1])
        return found

    def _transposes(self) -> list[list[Tensor]]:
        """Transposed weights for each block."""
        weights = [self.trace.tensors[link.weight].T for link in self.problem.chain.links]
        return self.problem.cuts.each(weights)

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        return self._rows(self._pushed(p)[0])

    def curvature(self, p: Tensor) -> Tensor:
        """J'r_pp (n,)."""
        return self.transposed(self.second_derivative(p))

    def second_derivative(self, p: Tensor) -> Tensor:
        """r_pp (m,)."""
        first, second = self._pushed(p)
        rows = self._rows(second)
        if not self.slopes.requires_grad:
            return rows  # the residuals are linear in the outputs
        bent = []
        for slope in self.slopes:
            (turned,) = torch.autograd.grad(
                slope, self.trace.y, first, retain_graph=True, materialize_grads=True
            )
            bent.append((turned * first).sum(0))
        return rows + torch.stack(bent, 1).reshape(-1)

    def _rows(self, dy: Tensor) -> Tensor:
        """Change of the rows (m,) with the outputs' dy (o, B)."""
        return (self.slopes.detach() * dy).sum(1).T.reshape(-1)

    def _pushed(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative (o, B) of the outputs along p."""
        chain, cuts = self.problem.chain, self.problem.cuts
        directions = list(self.problem.network.parameters.unpack(p).values())
        first, second = torch.zeros_like(self.trace.memory.y), torch.zeros_like(self.trace.memory.y)
        blocks = zip(
            self.trace.memory.blocks,
            cuts.each(chain.matrices(self.trace.tensors)),
            cuts.each(chain.matrices(directions, corner=0.0)),
            cuts.of(first),
            cuts.of(second),
            strict=True,
        )
        for layers, matrices, along, to_first, to_second in blocks:
            a, b = chain.pushed(matrices, along, layers)
            to_first.copy_(a)
            if b is not None:
                to_second.copy_(b)
        return first, second


def verified(network: Network, batch: Batch, settings: Settings, x: Tensor, k: int) -> Chain | None:
    """The network's chain, if it does what a plain backward pass does."""
    chain = Chain.of(network)
    probe = batch.block(0, _PROBE)
    if chain is None or not ChainProblem.suits(chain, probe, network.parameters.dtype, 1 << 62):
        return None
    problem = ChainProblem(network, probe, Plan("factors", k, False, _PROBE), settings, chain)
    r, z, exact = reference(network, probe, problem._point(x))
    sub = problem._normal(x, None)
    if not (is_close(sub.r.to(r.dtype), r) and is_close(sub.products.transposed(z), exact)):
        return None
    assert isinstance(sub.products, ChainProducts)
    return None if problem.bends_exactly and not sub.products.trace.bends() else chain
