"""Per-sample gradients from one backward pass: the factors of a layer's rows of the Jacobian.

The gradient of one sample's residual in a Linear layer's weight (o, i) is `sum_t g[t, o] a[t, i]`:
`a` the layer's input, `g` the residual's gradient in the layer's output, t over whatever axes the
layer treats alike (none for (B, i) inputs, pixels for a convolution). So one forward pass that
keeps the inputs and one backward pass for each residual of a sample give every row of J, and rows
need not be formed where a product with them is wanted.

Symbols: B samples, k residuals of each, T places, J (B, k, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._network import Batch, Network


class Unsupported(Exception):
    """The model's rows do not factor; another way must be taken."""


@dataclass(frozen=True)
class Factor:
    """Rows of one parameter in one call of its layer.

    `g` holds k gradients (B, T, o). Rows are `sum_t g[t, o] a[t, i]` where `outer`, else
    `sum_t g[t, o] a[t, o]`, and without `a` `sum_t g[t, o]`.
    """

    g: list[Tensor]
    places: Callable[[slice], Tensor] | None  # samples -> a (b, T, i)
    outer: bool
    single: bool  # T is 1

    def rows(self, k: int, samples: slice, first: slice) -> Tensor:
        """Rows (b, o, i) or (b, o) of residual k, for some samples and some of the first axis."""
        g = self.g[k][samples, :, first]
        if self.places is None:
            return g[:, 0] if self.single else g.sum(1)
        a = self.places(samples)
        if self.outer:
            return g[:, 0, :, None] * a[:, :1] if self.single else g.mT @ a
        return (g * a[:, :, first]).sum(1)

    def write(self, k: int, samples: slice, out: Tensor) -> None:
        """Rows of residual k into `out` (b, size), in its dtype."""
        if not self.single:
            out.copy_(self.rows(k, samples, slice(None)).flatten(1))
            return
        g = self.g[k][samples, 0]
        if self.places is None:
            out.copy_(g)
            return
        a = self.places(samples)[:, 0]
        if self.outer and g.shape[1] > 1 and a.shape[1] > 1:
            torch.mul(
                g[:, :, None], a[:, None, :], out=torch.unflatten(out, 1, (g.shape[1], a.shape[1]))
            )
        else:
            torch.mul(g, a, out=out)

    def transposed_product(self, z: Tensor) -> Tensor:
        """`sum of z (B, k) times rows`: the parameter's part of J'z, flat."""
        g = sum_over_k(self.g, z)
        everything = slice(None)
        if self.places is None:
            return g.sum((0, 1))
        a = self.places(everything)
        if self.outer:
            return (g.flatten(0, 1).mT @ a.flatten(0, 1)).reshape(-1)
        return (g * a).sum((0, 1))

    def product(self, p: Tensor) -> Tensor:
        """`rows @ p`: the parameter's part of J p, (B, k)."""
        if self.places is None:
            image = p.reshape(1, 1, -1)
        elif self.outer:
            a = self.places(slice(None))
            image = a @ p.reshape(-1, a.shape[-1]).mT
        else:
            image = self.places(slice(None)) * p
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

    def jacobian(self, samples: slice, J: Tensor, offsets: tuple[int, ...]) -> None:
        """Write the rows of some samples into `J` (b, k, n)."""
        for index, uses in enumerate(self.factors):
            span = slice(offsets[index], offsets[index + 1])
            if not uses:
                J[:, :, span] = 0
            for k in range(J.shape[1]):
                for use in uses[:1]:
                    use.write(k, samples, J[:, k, span])
                for use in uses[1:]:
                    J[:, k, span] += use.rows(k, samples, slice(None)).flatten(1)


def supported(network: Network) -> bool:
    """Whether every trainable parameter belongs to layers whose rows factor."""
    trainable = set(network.parameters.names)
    known = {id(p) for layer in _layers(network.module) for p in layer.parameters(recurse=False)}
    owners = dict(network.module.named_parameters())
    return all(id(owners[name]) in known for name in trainable)


def run(
    network: Network,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    scale: float,
    seed: int | None = None,
) -> Pending:
    """Forward pass that keeps what the factors need; the backward pass comes on demand."""
    calls: list[_Call] = []
    index = {
        id(p): i
        for i, name in enumerate(network.parameters.names)
        for p in [network.module.get_parameter(name)]
    }
    by_layer = {
        layer: {key: index[id(p)] for key, p in layer.named_parameters(recurse=False)
                if id(p) in index}
        for layer in _layers(network.module)
    }  # fmt: skip

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        a = args[0] if args and isinstance(args[0], Tensor) else None
        if a is None or a.ndim < 2 or a.shape[0] != batch.size or not output.requires_grad:
            raise Unsupported
        a = a.detach()
        calls.append(_Call(layer, a, a._version, get_gradient_edge(output), by_layer[layer]))

    handles = [layer.register_forward_hook(keep) for layer, own in by_layer.items() if own]
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


def _layers(module: nn.Module) -> list[nn.Module]:
    """Submodules whose rows factor. Exact types: a subclass may compute anything."""
    return [m for m in module.modules() if type(m) in _KINDS and _plain(m)]


def _plain(layer: nn.Module) -> bool:
    """Whether a layer of a known type is used in the way the formulas assume."""
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
    places: Callable[[slice], Tensor]
    if isinstance(layer, nn.Linear):
        outer = True
        g = [v.reshape(B, -1, layer.out_features) for v in g]
        flat = a.reshape(B, -1, layer.in_features)
        places = flat.__getitem__
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        outer = True
        g = [v.flatten(2).mT for v in g]
        places = _Patches(layer, a)
    elif isinstance(layer, nn.LayerNorm):
        outer = False
        size = math.prod(layer.normalized_shape)
        g = [v.reshape(B, -1, size) for v in g]
        normal = F.layer_norm(a, layer.normalized_shape, eps=layer.eps).reshape(B, -1, size)
        places = normal.__getitem__
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        outer = False
        g = [v.flatten(2).mT if v.ndim > 2 else v[:, None] for v in g]
        normal = F.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps)
        normal = normal.flatten(2).mT if a.ndim > 2 else normal[:, None]
        places = normal.__getitem__
    else:
        raise Unsupported
    single = g[0].shape[1] == 1
    both = {
        "weight": Factor(g, places, outer, single),
        "bias": Factor(g, None, False, single),
    }
    return [(key, both[key]) for key in call.own]


@dataclass(frozen=True)
class _Patches:
    """Inputs of a convolution as places (b, T, channels * kernel), unfolded only when asked for."""

    layer: nn.Conv1d | nn.Conv2d
    a: Tensor

    def __call__(self, samples: slice) -> Tensor:
        layer, a = self.layer, self.a[samples]
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
        return F.unfold(a, kernel, dilation=dilation, stride=stride).mT


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
    if first.places is None:
        return Factor(g, None, first.outer, first.single)
    a = torch.cat([p.places(slice(None)) for p in parts if p.places is not None])
    return Factor(g, a.__getitem__, first.outer, first.single)
