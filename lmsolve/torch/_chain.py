"""Chains of Linear layers and elementwise functions: their derivatives without autograd.

With `z_l = W_l h_(l-1) + b_l`, `h_l = f(z_l)` and `d_l` the gradient of a residual in `z_l`, its
gradient in `W_l` is `d_l h_(l-1)'`, in `b_l` it is `d_l`, and `d_(l-1) = f'(z_(l-1)) * W_l' d_l`,
where `f'` and `f''` follow from `h` itself. Along a direction `(V_l, c_l)` of the parameters, with
dots for first and second derivatives,

    z. = V h + c + W h.,    h. = f' z.,    z.. = W h.. + 2 V h.,    h.. = f' z.. + f'' z.^2.

Samples stand on the last axis, so that every operation runs along rows of a thousand numbers or
more, and in chunks on the first, one for each thread. The input of a layer has a last row of ones,
which the bias multiplies and which a hidden layer's matrix reproduces.

Symbols: c chunks of b samples; layers of i inputs and o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._network import Network


class Elementwise(NamedTuple):
    """A function f in place, and its derivatives from f's own values h."""

    apply: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor], Tensor]  # (g, h, out): out = g * f'
    bend: Callable[[Tensor, Tensor], Tensor] | None  # (g, h): g *= f'' / f', None for f'' = 0


_aten = torch.ops.aten
FUNCTIONS: dict[type[nn.Module], Elementwise] = {
    nn.Tanh: Elementwise(
        torch.tanh_,
        lambda g, h, out: _aten.tanh_backward.grad_input(g, h, grad_input=out),
        lambda g, h: torch.addcmul(g.new_zeros(()), g, h, value=-2, out=g),
    ),
    nn.Sigmoid: Elementwise(
        torch.sigmoid_,
        lambda g, h, out: _aten.sigmoid_backward.grad_input(g, h, grad_input=out),
        lambda g, h: g.addcmul_(g, h, value=-2),
    ),
    nn.ReLU: Elementwise(
        torch.relu_,
        lambda g, h, out: _aten.threshold_backward.grad_input(g, h, 0, grad_input=out),
        None,
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

    def forward(self, matrices: Sequence[Tensor], layers: Layers) -> None:
        """Put the outputs of all layers into their places."""
        zips = zip(
            self.links, matrices, layers.arguments, layers.outputs, layers.values, strict=True
        )
        for link, W, argument, out, values in zips:
            torch.bmm(W, argument, out=out)
            if link.function is not None:
                link.function.apply(values)

    def backward(
        self,
        transposes: Sequence[Tensor],
        layers: Layers,
        d: Tensor,
        places: Sequence[Tensor | None],
    ) -> Iterator[tuple[int, Tensor]]:
        """From the last layer on its number and d (c, o, b), that in its place if there is one.

        `d` is at first the gradient in the network's outputs.
        """
        last = len(self.links) - 1
        for number in range(last, -1, -1):
            function, place = self.links[number].function, places[number]
            if function is not None:
                if place is None:
                    place = torch.empty_like(d) if number == last else d
                d = function.pull(d, layers.values[number], place)
            elif place is not None and place is not d:
                d = place.copy_(d)
            yield number, d
            if number:
                W = transposes[number]
                outer = W.shape[2] == 1
                d = torch.mul(W, d, out=places[number - 1]) if outer else torch.bmm(W, d)

    def pushed(
        self, matrices: Sequence[Tensor], directions: Sequence[Tensor], layers: Layers
    ) -> tuple[Tensor, Tensor | None]:
        """First and second derivative (c, o, b) of the outputs along a direction, if not zero."""
        first: Tensor | None = None
        second: Tensor | None = None
        zips = zip(self.links, matrices, directions, layers.arguments, layers.outputs, strict=True)
        for link, W, V, argument, h in zips:
            z = torch.bmm(V, argument)
            if first is not None:
                z.baddbmm_(W, first)
                turned = torch.bmm(V, first).mul_(2)
                second = turned if second is None else turned.baddbmm_(W, second)
            first = z
            if link.function is None:
                continue
            first = link.function.pull(z, h, torch.empty_like(z))
            if second is not None:
                second = link.function.pull(second, h, second)
            if link.function.bend is not None:
                curved = link.function.bend(z.mul_(first), h)  # f'' z.^2, in place of z.
                second = curved if second is None else second.add_(curved)
        assert first is not None
        return first, second

    def matrices(self, tensors: Sequence[Tensor], corner: float = 1.0) -> list[Tensor]:
        """Weight and bias of each layer side by side; below them, but in the last, (0, corner)."""
        joined = []
        for number, (link, width) in enumerate(zip(self.links, self.widths, strict=True), 1):
            W = tensors[link.weight]
            M = W.new_zeros((width + (number < len(self.links)), W.shape[1] + 1))
            M[:width, :-1] = W
            if link.bias is not None:
                M[:width, -1] = tensors[link.bias]
            M[width:, -1] = corner
            joined.append(M)
        return joined


class Layers(NamedTuple):
    """The places of a block of samples on its way through the layers."""

    arguments: list[Tensor]  # inputs (c, i + 1, b) of each layer, with ones
    outputs: list[Tensor]  # the arguments that follow, and the network's outputs (c, o, b)
    values: list[Tensor]  # outputs (c, o, b) without ones
    factors: list[Tensor]  # inputs (c, 1, i, b) without ones

    @classmethod
    def of(cls, h: Tensor, hidden: Sequence[Tensor], y: Tensor) -> Layers:
        """From the input (c, i + 1, b), the hidden layers and the outputs."""
        arguments, outputs = [h, *hidden], [*hidden, y]
        values = [*(v[:, :-1] for v in hidden), y]
        return cls(arguments, outputs, values, [v[:, None, :-1] for v in arguments])


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that a Sequential calls one after another; others as they are."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _layers(child)
    else:
        yield module
