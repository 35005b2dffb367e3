"""Blocks of rows of the Jacobian, in whichever of four ways is right and fastest for the model.

    factors   one backward pass a residual, rows from the layers' inputs and output gradients
    vmap      reverse mode on single samples, vectorised
    forward   forward mode on single parameters, vectorised; for few parameters
    graph     plain vector-Jacobian products on the graph of a block, one cotangent a row

The first two need samples that do not see each other, which is tested and not assumed; `graph`
asks for nothing. `choose` verifies each candidate against a plain backward pass, times it, and
returns a `Plan`; `stream` follows one.

Symbols: B samples, k rows of each, J (rows, n) or the columns of a group of parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap
from torch.utils import _pytree as pytree

from . import _factors
from ._chain import Chain
from ._network import Batch, Network
from ._params import flat, quiet_transforms, without_dropout

Tensors = Mapping[str, Tensor]
Block = tuple[Tensor, Tensor]  # rows r (rows,) and J (rows, columns)

# Bytes of J in one block that still sit in a core's second-level cache while the Gram product
# reads them (writing them there is twice as fast as in blocks of 4 MiB); rows below 256, or far
# below n, make that product inefficient.
_CACHE_BYTES = 1 << 20
_FEWEST_ROWS = 256
# Bytes of J in a block of a vectorised way, whose cost is mostly that of calls: 40 ms in one block
# against 92 in nine, for a physics-informed network at 2,200 x 501.
_VECTOR_BYTES = 8 << 20
# Seconds of one trial run from which the choice is not a matter of noise.
_SLOW = 0.2
# A way is taken before those listed ahead of it if it takes less than this share of their time:
# timings on a busy machine scatter, and only `factors` reuses a trial's forward pass.
_MARGIN = 0.5
# Errors by which torch reports an operation that a transform cannot take: the candidate is left
# out, and if none remains the plain graph raises the user's own error.
_TRANSFORM_ERRORS = (
    _factors.Unsupported, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Where rows are wanted: parameters, scale of the objective, seed of the masks."""

    tensors: Tensors
    scale: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Plan:
    """How the rows of a model are made."""

    way: str
    k: int  # rows of one sample; of the whole batch where `coupled`
    coupled: bool  # the samples see each other: one block holds them all
    samples: int  # in a block
    activation_bytes: int = 0  # of one sample in a pass of factors
    batched: bool = True  # `graph`: cotangents vectorised
    note: str = ""

    def halved(self) -> Plan:
        """A plan that takes half the memory, or MemoryError."""
        if self.samples <= 1:
            raise MemoryError(
                "One block of the Jacobian does not fit into memory at the smallest block size; "
                "use a smaller batch, fewer parameters, or a device with more memory."
            )
        return replace(self, samples=(self.samples + 1) // 2)


def stream(
    network: Network, batch: Batch, point: Point, plan: Plan, group: range | None = None
) -> Iterator[Block]:
    """Blocks of consecutive rows of J, all of the batch; columns of `group` or all."""
    columns = group if group is not None else range(len(network.parameters.names))
    if plan.way == "factors":
        for block in batch.blocks(plan.samples):
            found = _factors.run(network, point.tensors, block, point.scale, point.seed).backward()
            yield from rows_of_pass(network, found, network.parameters.dtype)
        return
    if plan.coupled:
        if plan.way == "forward":
            yield _forward(network, batch, point, columns)
        else:
            yield from _graph(network, batch, point, columns, plan)
        return
    for block in batch.blocks(plan.samples):
        if plan.way == "vmap":
            yield _vmap(network, block, point, columns)
        elif plan.way == "forward":
            yield _forward(network, block, point, columns)
        else:
            yield from _graph(network, block, point, columns, plan)


def coupled_rows(
    network: Network, batch: Batch, point: Point, plan: Plan, rows: range
) -> Iterator[Block]:
    """Blocks of some consecutive rows of a batch whose samples see each other."""
    columns = range(len(network.parameters.names))
    yield from _graph(network, batch, point, columns, plan, rows)


def rows_of_pass(network: Network, found: _factors.Pass, dtype: torch.dtype) -> Iterator[Block]:
    """Rows of a pass in pieces of one reused buffer (valid until the next), in `dtype`."""
    offsets = network.parameters.offsets
    B, k = found.rows.shape
    step = min(B, max(1, block_rows(offsets[-1], dtype) // k))
    buffer = found.rows.new_empty((step, k, offsets[-1]), dtype=dtype)
    for r, J in found.jacobian(buffer, offsets):
        yield r.reshape(-1), J.flatten(0, 1)


def rows_of_passes(
    network: Network,
    passes: Sequence[_factors.Pending],
    dtype: torch.dtype,
    done: list[_factors.Pass] | None,
) -> Iterator[Block]:
    """Rows of forward passes, one after another; `done` keeps what they leave."""
    for pending in passes:
        found = pending.backward()
        if done is not None:
            done.append(found)
        yield from rows_of_pass(network, found, dtype)


def block_rows(n: int, dtype: torch.dtype) -> int:
    """Rows of J in one piece: the cache's worth, but not too few for the Gram product of n^2."""
    return max(_FEWEST_ROWS, _CACHE_BYTES // (n * dtype.itemsize), n // 2)


def _split(network: Network, point: Point, columns: range) -> tuple[dict[str, Tensor], Tensors]:
    """Tensors to differentiate by, and all."""
    names = [network.parameters.names[i] for i in columns]
    return {name: point.tensors[name] for name in names}, point.tensors


def _flat(parts: Mapping[str, Tensor], lead: int) -> Tensor:
    """Blocks (..., *shape) side by side, (rows, columns)."""
    flat = [v.flatten(lead) if v.ndim > lead else v.unsqueeze(-1) for v in parts.values()]
    return torch.cat([v.reshape(-1, v.shape[-1]) for v in flat], 1)


def _vmap(network: Network, block: Batch, point: Point, columns: range) -> Block:
    """Reverse mode on every sample of a block at once."""
    wanted, everything = _split(network, point, columns)

    def rows(part: Tensors, sample: Any) -> tuple[Tensor, Tensor]:
        r = network.rows_of_sample({**everything, **part}, sample, point.scale, None)
        return r, r

    fork = torch.random.fork_rng(enabled=point.seed is not None, devices=_cuda(block))
    with fork, quiet_transforms():
        if point.seed is not None:
            torch.manual_seed((point.seed + 7919 * block.start) % 2**63)
        samples = (block.inputs, block.targets, block.weights)
        axes = pytree.tree_map(lambda a: 0 if isinstance(a, Tensor) else None, samples)
        J, r = vmap(jacrev(rows, has_aux=True), in_dims=(None, axes), randomness="different")(
            wanted, samples
        )
    return r.detach().reshape(-1), _flat(J, 2).detach()


def _forward(network: Network, block: Batch, point: Point, columns: range) -> Block:
    """Forward mode: every column of a block's rows at once."""
    wanted, everything = _split(network, point, columns)

    def rows(part: Tensors) -> tuple[Tensor, Tensor]:
        r = network.judge({**everything, **part}, block, point.scale, point.seed).rows
        return r.reshape(-1), r.reshape(-1)

    with quiet_transforms():
        J, r = jacfwd(rows, has_aux=True, randomness="same")(wanted)
    return r.detach(), _flat(J, 1).detach()


def _graph(
    network: Network,
    block: Batch,
    point: Point,
    columns: range,
    plan: Plan,
    wanted_rows: range | None = None,
) -> Iterator[Block]:
    """Plain backward passes, one cotangent for each row of the block, or for some of its rows."""
    names = [network.parameters.names[i] for i in columns]
    leaves = {k: t.detach().requires_grad_(k in names) for k, t in point.tensors.items()}
    r = network.judge(leaves, block, point.scale, point.seed).rows.reshape(-1)
    wanted = [leaves[name] for name in names]
    width = sum(t.numel() for t in wanted)
    some = range(r.shape[0]) if wanted_rows is None else wanted_rows
    rows = min(len(some), max(1, block_rows(width, r.dtype)))
    for lo in range(some.start, some.stop, rows):
        hi = min(lo + rows, some.stop)
        if plan.batched:
            cotangents = torch.zeros((hi - lo, r.shape[0]), dtype=r.dtype, device=r.device)
            cotangents.diagonal(lo).fill_(1)
            with quiet_transforms():
                J = torch.autograd.grad(
                    r, wanted, cotangents, retain_graph=True, allow_unused=True,
                    is_grads_batched=True,
                )  # fmt: skip
            parts = [
                r.new_zeros((hi - lo, t.numel())) if v is None else v.flatten(1)
                for v, t in zip(_optional(J), wanted, strict=True)
            ]
            yield r[lo:hi].detach(), torch.cat(parts, 1)
            continue
        out = r.new_zeros((hi - lo, width))
        for row in range(lo, hi):
            one = torch.autograd.grad(r[row], wanted, retain_graph=True, allow_unused=True)
            out[row - lo] = flat(one, wanted)
        yield r[lo:hi].detach(), out


def _optional(parts: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients as autograd returns them where some may be missing."""
    return parts


def _cuda(block: Batch) -> list[torch.device]:
    """The CUDA device of the block's tensors, if any."""
    tensors = [a for a in pytree.tree_leaves(block.inputs) if isinstance(a, Tensor)]
    return [a.device for a in tensors[:1] if a.device.type == "cuda"]


def choose(network: Network, batch: Batch, point: Point, memory: int, forward: bool = True) -> Plan:
    """Fastest way that reproduces a plain backward pass on some of the batch's samples.

    ``forward`` mode is the whole process's, and not for several threads.
    """
    n, itemsize = network.parameters.n, network.parameters.dtype.itemsize
    if not _separate(network, batch, point):
        return _choose_coupled(network, batch, point, forward)
    k = network.judge(point.tensors, batch.block(0, 2), point.scale, point.seed).rows.shape[1]
    row_bytes = n * itemsize
    fit = max(1, memory // (4 * row_bytes * k))
    probe = batch.block(0, min(256, fit))
    timed: list[tuple[float, Plan]] = []
    for plan in _candidates(k, n, _factors.supported(network), forward):
        block = probe.block(0, plan.samples)
        seconds = _verified_time(network, block, point, plan)
        if seconds is not None:
            timed.append((seconds / block.size, plan))
            if plan.way == "factors" and Chain.of(network) is not None:
                break  # nothing is faster, and the first use of torch.func takes most of a second
    if not timed:
        raise ValueError(
            "`model` must give the same output for the same data: no way of differentiating it "
            "reproduces a plain backward pass. Use `model.eval()`."
        )
    plan = _preferred(timed)
    if any(other.way == "vmap" for _, other in timed):
        plan = replace(plan, note="")  # plain backward passes are the faster way, not the only one
    if plan.way == "factors":
        each = _activation_bytes(network, probe, point)
        return replace(plan, samples=max(1, memory // (4 * each)), activation_bytes=each)
    if plan.way in ("vmap", "forward"):
        rows = max(block_rows(n, network.parameters.dtype), _VECTOR_BYTES // row_bytes)
        return replace(plan, samples=max(1, min(fit, rows // k)))
    return replace(plan, samples=min(plan.samples, fit))


def _preferred(timed: list[tuple[float, Plan]]) -> Plan:
    """The first candidate, or a later one that is faster beyond doubt.

    Two ways agree to rounding only, so that a choice by noise would make runs differ.
    """
    seconds, plan = timed[0]
    for other, candidate in timed[1:]:
        if other < _MARGIN * seconds:
            seconds, plan = other, candidate
    return plan


def _candidates(k: int, n: int, factors: bool, forward: bool = True) -> list[Plan]:
    """Ways worth a try for separate samples of k rows each."""
    ways = [Plan("vmap", k, False, 256)]
    if factors:
        ways.insert(0, Plan("factors", k, False, 256))
    if forward and n <= 2 * k:
        ways.append(Plan("forward", k, False, 256))
    note = (
        "The Jacobian is made by plain backward passes, one for each row: the model has operations "
        "that torch.func cannot vectorise."
    )
    ways.append(Plan("graph", k, False, max(1, 32 // k), note=note))
    ways.append(Plan("graph", k, False, 1, batched=False, note=note))
    return ways


def _choose_coupled(network: Network, batch: Batch, point: Point, forward: bool = True) -> Plan:
    """A way for a model whose samples see each other, such as batch normalisation in training."""
    m = network.judge(point.tensors, batch, point.scale, point.seed).rows.numel()
    note = (
        "The samples of a batch see each other (batch normalisation in training mode, or a "
        "residual over the batch): the Jacobian is made from the graph of the whole batch."
    )
    few = Plan("forward", m, True, batch.size, note=note)
    plain = Plan("graph", m, True, batch.size, note=note)
    narrow = forward and 2 * network.parameters.n <= m
    if narrow and _verified_time(network, batch, point, few) is not None:
        return few
    if _takes_batched_cotangents(network, batch, point):
        return plain
    return replace(plain, batched=False)


def _separate(network: Network, batch: Batch, point: Point) -> bool:
    """Whether the rows of a sample stay the same without the other samples."""
    probe = batch.block(0, 32)
    half = probe.block(0, max(1, probe.size // 2))
    with without_dropout(network.module):
        together = network.judge(point.tensors, probe, point.scale).rows
        try:
            alone = network.judge(point.tensors, half, point.scale).rows
        except ValueError:  # batch normalisation in training refuses a single sample
            return False
    if together.shape[0] != probe.size or alone.shape[0] != half.size:
        return False
    if together.shape[1] != alone.shape[1]:
        return False
    return probe.size == 1 or is_close(alone, together[: half.size])


def is_close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the square root of the dtype's precision, relative to the largest element."""
    bound = math.sqrt(torch.finfo(b.dtype).eps) * b.abs().amax()
    return bool((a - b).abs().amax() <= bound)  # a host read; only when a plan is made


def _verified_time(network: Network, batch: Batch, point: Point, plan: Plan) -> float | None:
    """Seconds of a way on a batch, or None if it fails or disagrees with a plain backward pass."""
    r, z, exact = reference(network, batch, point)

    def run() -> Tensor | None:
        done, found = 0, torch.zeros_like(exact)
        for rows, J in stream(network, batch, point, plan):
            there = slice(done, done + rows.shape[0])
            if not is_close(rows, r[there]):
                return None
            found += J.to(exact.dtype).T @ z[there]
            done += rows.shape[0]
        return found

    try:
        found = run()
    except _TRANSFORM_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return None
    if found is None or not is_close(found, exact):
        return None
    best = math.inf
    for _ in range(3):  # the least of three: another process may hold the core
        start = time.perf_counter()
        for _ in stream(network, batch, point, plan):
            pass
        if exact.is_cuda:
            torch.cuda.synchronize(exact.device)
        best = min(best, time.perf_counter() - start)
        if best > _SLOW:
            break
    return best


def reference(network: Network, batch: Batch, point: Point) -> tuple[Tensor, Tensor, Tensor]:
    """Rows r, a random z and `J'z` by one plain backward pass, all flat."""
    leaves = {k: t.detach().requires_grad_() for k, t in point.tensors.items()}
    rows = network.judge(leaves, batch, point.scale, point.seed).rows
    if not rows.requires_grad:
        raise ValueError(
            "`model` must reach the residuals through differentiable operations, got residuals "
            "that require no grad."
        )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
    parts = torch.autograd.grad(rows, list(leaves.values()), z, allow_unused=True)
    return rows.detach().reshape(-1), z.reshape(-1), flat(parts, list(leaves.values()))


def _takes_batched_cotangents(network: Network, batch: Batch, point: Point) -> bool:
    """Whether the backward pass of the whole batch can be vectorised over cotangents."""
    _, z, exact = reference(network, batch, point)
    leaves = {k: t.detach().requires_grad_() for k, t in point.tensors.items()}
    rows = network.judge(leaves, batch, point.scale, point.seed).rows.reshape(-1)
    try:
        parts = torch.autograd.grad(
            rows,
            list(leaves.values()),
            torch.stack([z, 2 * z]),
            allow_unused=True,
            is_grads_batched=True,
        )
    except _TRANSFORM_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return False
    second = [None if v is None else v[1] / 2 for v in _optional(parts)]
    return is_close(flat(second, list(leaves.values())), exact)


def _activation_bytes(network: Network, probe: Batch, point: Point) -> int:
    """Bytes that a pass of factors keeps for one sample, gradients and graph included."""
    found = _factors.run(network, point.tensors, probe, point.scale, point.seed)
    forward = sum(call.a.nbytes for call in found.calls)
    gradients = found.backward().factors
    backward = sum({id(v): v.nbytes for uses in gradients for u in uses for v in u.g}.values())
    return max(1, (3 * forward + backward) // probe.size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or NumPy ran out of memory, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )
