"""Chains of Linear layers and elementwise functions: forward and backward without autograd.

With `z_l = W_l h_(l-1) + b_l`, `h_l = f(z_l)` and `d_l` the gradient of a residual in `z_l`, its
gradient in `W_l` is `d_l h_(l-1)'`, in `b_l` it is `d_l`, and `d_(l-1) = f'(z_(l-1)) * W_l' d_l`,
where `f'` follows from `h` itself. Samples stand on the last axis, so that every operation runs
along rows of a thousand numbers or more.

Symbols: blocks of b samples; layers of i inputs and o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._network import Network


class Elementwise(NamedTuple):
    """A function f in place, and `out = g * f'` from f's own values h."""

    apply: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]  # (g, h, out)


_aten = torch.ops.aten
FUNCTIONS: dict[type[nn.Module], Elementwise] = {
    nn.Tanh: Elementwise(
        torch.tanh_,
        lambda g, h, out: _aten.tanh_backward.grad_input(g, h, grad_input=out),
    ),
    nn.Sigmoid: Elementwise(
        torch.sigmoid_,
        lambda g, h, out: _aten.sigmoid_backward.grad_input(g, h, grad_input=out),
    ),
    nn.ReLU: Elementwise(
        torch.relu_,
        lambda g, h, out: _aten.threshold_backward.grad_input(g, h, 0, grad_input=out),
    ),
}


class Link(NamedTuple):
    """A Linear layer, by the places of its parameters, and the function after it."""

    weight: int
    bias: int | None
    function: Elementwise | None = None


@dataclass(frozen=True)
class Chain:
    """The layers of a network in their order."""

    links: tuple[Link, ...]
    widths: tuple[int, ...]  # outputs of each layer

    @classmethod
    def of(cls, network: Network) -> Chain | None:
        """The chain that a network is, if it is one, without hooks, and all of it to be trained."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules()):
            return None
        links: list[Link] = []
        widths = []
        for layer in _layers(network.module):
            if type(layer) is nn.Linear:
                own = network.owners.get(layer, {})
                if len(own) != sum(1 for _ in layer.parameters()):
                    return None
                links.append(Link(own["weight"], own.get("bias")))
                widths.append(layer.out_features)
            elif type(layer) in FUNCTIONS and links and links[-1].function is None:
                links[-1] = links[-1]._replace(function=FUNCTIONS[type(layer)])
            else:
                return None
        used = [i for link in links for i in (link.weight, link.bias) if i is not None]
        if not links or sorted(used) != list(range(len(network.parameters.names))):
            return None  # a parameter is shared, or belongs to no layer
        return cls(tuple(links), tuple(widths))

    def forward(
        self, matrices: Sequence[Tensor], arguments: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> None:
        """Put the outputs (o, b) of all layers into `outs`; `arguments` are theirs with ones."""
        for link, W, argument, out in zip(self.links, matrices, arguments, outs, strict=True):
            torch.mm(W, argument, out=out)
            if link.function is not None:
                link.function.apply(out)

    def backward(
        self,
        tensors: Sequence[Tensor],
        layers: Layers,
        d: Tensor,
        places: Sequence[Tensor | None],
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From the last layer on its number, input h (i, b) and d (o, b), that in its place if any.

        `d` is at first the gradient in the network's outputs.
        """
        values = layers.values
        for number in range(len(self.links) - 1, -1, -1):
            link, place = self.links[number], places[number]
            if link.function is not None:
                out = torch.empty_like(d) if place is None else place
                d = link.function.pull(d, values[number + 1], out)
            elif place is not None:
                d = place.copy_(d)
            yield number, values[number], d
            if number:
                W = tensors[link.weight].T
                d = W * d if W.shape[1] == 1 else W @ d

    def pushed(
        self, tensors: Sequence[Tensor], directions: Sequence[Tensor], layers: Layers
    ) -> Tensor:
        """Change of the outputs (o, b) along a direction of the parameters, as `matrices`."""
        dh = torch.zeros_like(layers.values[0])
        zips = zip(self.links, directions, layers.arguments, layers.values[1:], strict=True)
        for link, V, argument, out in zips:
            dh = torch.mm(V, argument).addmm_(tensors[link.weight], dh)
            if link.function is not None:
                link.function.pull(dh, out, dh)
        return dh

    def matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Weight and bias of each layer side by side, (o, i + 1)."""
        joined = []
        for link in self.links:
            W = tensors[link.weight]
            b = W.new_zeros(len(W)) if link.bias is None else tensors[link.bias]
            joined.append(torch.cat([W, b[:, None]], 1))
        return joined


class Layers(NamedTuple):
    """A block of samples on its way through the layers."""

    arguments: list[Tensor]  # inputs (i + 1, b) of each layer, with ones
    values: list[Tensor]  # the input of the first and the outputs of all, (i, b)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that a Sequential calls one after another; others as they are."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _layers(child)
    else:
        yield module
