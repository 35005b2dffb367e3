"""Per-sample gradients from one backward pass: the factors of a layer's rows of the Jacobian.

The gradient of one sample's residual in a Linear layer's weight (o, i) is `sum_t g[t, o] a[t, i]`:
`a` the layer's input, `g` the residual's gradient in the layer's output, t over whatever axes the
layer treats alike (none for (B, i) inputs, pixels for a convolution). So one forward pass that
keeps the inputs and one backward pass for each residual of a sample give every row of J, and rows
need not be formed where a product with them is wanted.

Symbols: B samples, k residuals of each, T places, J (B, k, n).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._network import Batch, Network

_ALL = slice(None)


class Unsupported(Exception):
    """The model's rows do not factor; another way must be taken."""


@dataclass(frozen=True)
class Factor:
    """Rows of one parameter in one call of its layer.

    `g` holds k gradients (B, T, o). Rows are `sum_t g[t, o] a[t, i]` where `outer`, else
    `sum_t g[t, o] a[t, o]`, and without `a` `sum_t g[t, o]`.
    """

    g: list[Tensor]
    inputs: Tensor | Patches | None  # a (B, T, i)
    outer: bool
    single: bool  # T is 1

    @property
    def a(self) -> Tensor:
        """Inputs (B, T, i) of a factor that has them."""
        assert self.inputs is not None
        return self.inputs.places() if isinstance(self.inputs, Patches) else self.inputs

    def unfolded(self) -> Factor:
        """The same with its patches at hand, for several products with them."""
        return replace(self, inputs=self.a) if isinstance(self.inputs, Patches) else self

    def split(self, samples: int) -> list[Factor]:
        """Factors of consecutive runs of samples."""
        g = zip(*(torch.split(v, samples) for v in self.g), strict=True)
        if self.inputs is None:
            return [Factor(list(v), None, self.outer, self.single) for v in g]
        both = zip(g, self.inputs.split(samples), strict=True)
        return [Factor(list(v), a, self.outer, self.single) for v, a in both]

    def rows(self, k: int, first: slice = _ALL) -> Tensor:
        """Rows (B, o, i) or (B, o) of residual k, for some of the first axis."""
        g = self.g[k][:, :, first]
        if self.inputs is None:
            return g[:, 0] if self.single else g.sum(1)
        if self.outer:
            return g[:, 0, :, None] * self.a[:, :1] if self.single else g.mT @ self.a
        return (g * self.a[:, :, first]).sum(1)

    def write(self, k: int, out: Tensor) -> None:
        """Rows of residual k into `out` (B, size), in its dtype."""
        if not self.single:
            out.copy_(self.rows(k).flatten(1))
            return
        g = self.g[k].squeeze(1)
        if self.inputs is None:
            out.copy_(g)
            return
        a = self.a.squeeze(1)
        if self.outer and g.shape[1] > 1 and a.shape[1] > 1:
            torch.mul(
                g[:, :, None], a[:, None, :], out=torch.unflatten(out, 1, (g.shape[1], a.shape[1]))
            )
        else:
            torch.mul(g, a, out=out)

    def transposed_product(self, z: Tensor) -> Tensor:
        """`sum of z (B, k) times rows`: the parameter's part of J'z, flat."""
        if self.inputs is None:
            parts = [self.rows(k).mT @ z[:, k] for k in range(len(self.g))]
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        a = self.a
        if not self.outer:
            return (sum_over_k(self.g, z) * a).sum((0, 1))
        if len(self.g) == 1 and a.shape[2] < self.g[0].shape[2]:  # the narrower takes the weights
            g, a = self.g[0], a * z[:, :, None]
        else:
            g = sum_over_k(self.g, z)
        return (g.flatten(0, 1).mT @ a.flatten(0, 1)).reshape(-1)

    def product(self, p: Tensor) -> Tensor:
        """`rows @ p`: the parameter's part of J p, (B, k)."""
        if self.inputs is None:
            return torch.stack([(g @ p).sum(1) for g in self.g], 1)
        a = self.a
        if not self.outer:
            image = a * p
        else:
            P = p.reshape(-1, a.shape[2])
            if len(self.g) == 1 and a.shape[2] < P.shape[0]:  # the narrower makes the image
                return (a * (self.g[0] @ P)).sum((1, 2))[:, None]
            image = a @ P.mT
        return torch.stack([(g * image).sum((1, 2)) for g in self.g], 1)


def sum_over_k(g: list[Tensor], z: Tensor) -> Tensor:
    """`sum_k z[:, k] g[k]`, (B, T, o)."""
    total = g[0] * z[:, 0, None, None]
    for k in range(1, len(g)):
        total.addcmul_(g[k], z[:, k, None, None])
    return total


@dataclass(frozen=True)
class Pass:
    """A block of samples, run forward and backward."""

    rows: Tensor  # (B, k)
    cost: Tensor  # (B,)
    factors: list[list[Factor]]  # for each parameter, one factor a call

    def jacobian(self, buffer: Tensor, offsets: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows r (b, k) and J (b, k, n) of consecutive samples, J in a buffer that is reused."""
        step, k = buffer.shape[:2]
        spans = itertools.pairwise(offsets)
        columns = [buffer[:, :, lo:hi].unbind(1) for lo, hi in spans]
        parts = [[use.split(step) for use in uses] for uses in self.factors]
        for number, r in enumerate(torch.split(self.rows, step)):
            b = len(r)
            for targets, uses in zip(columns, parts, strict=True):
                outs = targets if b == step else [target[:b] for target in targets]
                here = [use[number].unfolded() for use in uses]
                for row in range(k):
                    if not here:
                        outs[row].zero_()
                    for use in here[:1]:
                        use.write(row, outs[row])
                    for use in here[1:]:
                        outs[row].add_(use.rows(row).flatten(1))
            yield r, buffer[:b]


def supported(network: Network) -> bool:
    """Whether every trainable parameter belongs to layers whose rows factor."""
    known = [
        own.values()
        for layer, own in network.owners.items()
        if _factorises(layer) and own.keys() <= {"weight", "bias"}  # others make up the weight
    ]
    return set(itertools.chain(*known)) == set(range(len(network.parameters.names)))


def run(
    network: Network,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    scale: float,
    seed: int | None = None,
) -> Pending:
    """Forward pass that keeps what the factors need; the backward pass comes on demand."""
    calls: list[_Call] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        a = args[0] if args and isinstance(args[0], Tensor) else None
        if a is None or a.ndim < 2 or a.shape[0] != batch.size or not output.requires_grad:
            raise Unsupported
        a = a.detach()
        calls.append(_Call(layer, a, a._version, get_gradient_edge(output), network.owners[layer]))

    handles = [v.register_forward_hook(keep) for v in network.owners if _factorises(v)]
    try:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        judged = network.judge(leaves, batch, scale, seed)
    finally:
        for handle in handles:
            handle.remove()
    if judged.rows.shape[0] != batch.size or not judged.rows.requires_grad:
        raise Unsupported
    return Pending(judged.rows, judged.cost.detach(), calls, len(network.parameters.names))


@dataclass(frozen=True)
class _Call:
    """One call of a layer in the forward pass."""

    layer: nn.Module
    a: Tensor
    version: int
    edge: GradientEdge
    own: dict[str, int]  # "weight", "bias" -> parameter


@dataclass(frozen=True)
class Pending:
    """A forward pass whose backward pass is still to come."""

    graph: Tensor  # rows (B, k)
    cost: Tensor
    calls: list[_Call]
    parameters: int

    def backward(self) -> Pass:
        """One backward pass for each residual of a sample; frees the graph."""
        k = self.graph.shape[1]
        edges = [call.edge for call in self.calls]
        seen: list[tuple[Tensor | None, ...]] = []
        for column in range(k):
            cotangent = torch.zeros_like(self.graph)
            cotangent[:, column] = 1
            last = column == k - 1
            seen.append(
                torch.autograd.grad(
                    self.graph, edges, cotangent, retain_graph=not last, allow_unused=True
                )
            )
        factors: list[list[Factor]] = [[] for _ in range(self.parameters)]
        for position, call in enumerate(self.calls):
            if call.a._version != call.version:
                raise Unsupported  # the layer's input was overwritten after it was used
            g = [gradients[position] for gradients in seen]
            present = [v for v in g if v is not None]
            if len(present) != k:
                if not present:
                    continue  # this layer's output does not reach the rows
                g = [torch.zeros_like(present[0]) if v is None else v for v in g]
            for key, factor in _factors(call, [v for v in g if v is not None]):
                factors[call.own[key]].append(factor)
        return Pass(self.graph.detach(), self.cost, factors)


def _factorises(layer: nn.Module) -> bool:
    """Whether a layer's rows factor. Exact types: a subclass may compute anything."""
    if type(layer) not in _KINDS:
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return not layer.training and layer.running_mean is not None
    return True


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def _factors(call: _Call, g: list[Tensor]) -> list[tuple[str, Factor]]:
    """Factors of a call's own parameters from the gradients in its output."""
    layer, a = call.layer, call.a
    B = a.shape[0]
    inputs: Tensor | Patches
    outer = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    if isinstance(layer, nn.Linear):
        g = [v.reshape(B, -1, layer.out_features) for v in g]
        inputs = a.reshape(B, -1, layer.in_features)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        g = [v.flatten(2).mT for v in g]
        inputs = Patches(layer, a)
    elif isinstance(layer, nn.LayerNorm):
        size = math.prod(layer.normalized_shape)
        g = [v.reshape(B, -1, size) for v in g]
        inputs = F.layer_norm(a, layer.normalized_shape, eps=layer.eps).reshape(B, -1, size)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        g = [v.flatten(2).mT if v.ndim > 2 else v[:, None] for v in g]
        normal = F.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps)
        inputs = normal.flatten(2).mT if a.ndim > 2 else normal[:, None]
    else:
        raise Unsupported
    single = g[0].shape[1] == 1
    both = {
        "weight": Factor(g, inputs, outer, single),
        "bias": Factor(g, None, False, single),
    }
    return [(key, both[key]) for key in call.own]


@dataclass(frozen=True)
class Patches:
    """Inputs of a convolution, unfolded only when asked for."""

    layer: nn.Conv1d | nn.Conv2d
    a: Tensor

    def split(self, samples: int) -> list[Patches]:
        """Patches of consecutive runs of samples."""
        return [Patches(self.layer, a) for a in torch.split(self.a, samples)]

    def places(self) -> Tensor:
        """Places (B, T, channels * kernel)."""
        layer, a = self.layer, self.a
        if isinstance(layer, nn.Conv1d):  # a height of one makes it two-dimensional
            a = a[:, :, None]
        lead = (1,) * (4 - layer.weight.ndim)
        kernel = lead + tuple(layer.kernel_size)
        stride = lead + tuple(layer.stride)
        dilation = lead + tuple(layer.dilation)
        if isinstance(layer.padding, str):
            around = _string_padding(layer.padding, kernel, dilation)
        else:
            around = [v for p in reversed((0,) * len(lead) + tuple(layer.padding)) for v in (p, p)]
        a = F.pad(a, around)
        spans = [d * (size - 1) + 1 for size, d in zip(kernel, dilation, strict=True)]
        places = [
            (size - span) // s + 1 for size, span, s in zip(a.shape[2:], spans, stride, strict=True)
        ]
        # A view and one copy of it: 5 times as fast as `F.unfold` on a CPU.
        sample, channel, *steps = a.stride()
        strides = [sample, channel]
        strides += [step * d for step, d in zip(steps, dilation, strict=True)]
        strides += [step * s for step, s in zip(steps, stride, strict=True)]
        windows = a.as_strided((*a.shape[:2], *kernel, *places), strides, a.storage_offset())
        return windows.reshape(len(a), -1, math.prod(places)).mT


def _string_padding(padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Zeros around the image, last axis first, for "same" and "valid"."""
    if padding == "valid":
        return [0] * 4
    around: list[int] = []
    for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
        total = step * (size - 1)
        around += [total // 2, total - total // 2]
    return around


def joined(passes: list[Pass]) -> Pass:
    """One pass of consecutive blocks."""
    if len(passes) == 1:
        return passes[0]
    factors: list[list[Factor]] = []
    for uses in zip(*(p.factors for p in passes), strict=True):
        calls = zip(*uses, strict=True)
        factors.append([_joined_factor(list(parts)) for parts in calls])
    return Pass(torch.cat([p.rows for p in passes]), torch.cat([p.cost for p in passes]), factors)


def _joined_factor(parts: list[Factor]) -> Factor:
    """One factor over the samples of several."""
    first = parts[0]
    g = [torch.cat([p.g[k] for p in parts]) for k in range(len(first.g))]
    a = None if first.inputs is None else torch.cat([p.a for p in parts])
    return Factor(g, a, first.outer, first.single)
