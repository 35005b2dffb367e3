"""Products with J and J' that never form a row: from the factors of a pass, or by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.func import jvp

from ._factors import Pass
from ._jacobian import Point, is_out_of_memory
from ._network import Batch, Network
from ._params import flat, quiet_transforms, unfused_attention


@dataclass(frozen=True)
class FactorProducts:
    """Products with the rows of passes that hold the whole batch."""

    passes: list[Pass]
    offsets: tuple[int, ...]

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,) in the dtype of the factors."""
        total, done = z.new_zeros(self.offsets[-1]), 0
        for found in self.passes:
            rows = found.rows
            part = z[done : done + rows.numel()].to(rows.dtype).reshape(rows.shape)
            done += rows.numel()
            for index, uses in enumerate(found.factors):
                for use in uses:
                    span = slice(self.offsets[index], self.offsets[index + 1])
                    total[span] += use.transposed_product(part)
        return total

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        images = []
        for found in self.passes:
            p = p.to(found.rows.dtype)
            image = torch.zeros_like(found.rows)
            for index, uses in enumerate(found.factors):
                for use in uses:
                    image += use.product(p[self.offsets[index] : self.offsets[index + 1]])
            images.append(image.reshape(-1))
        return torch.cat(images)


@dataclass(frozen=True)
class HeldProducts:
    """Products with rows that are small enough to keep."""

    J: Tensor

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        return self.J.T @ z.to(self.J.dtype)

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        return self.J @ p.to(self.J.dtype)


@dataclass
class GraphProducts:
    """Products by reverse mode, and by forward mode where the model has it."""

    network: Network
    batch: Batch
    point: Point
    samples: int  # in a block
    _forward_mode: bool = field(default=True)
    _unfused: bool = field(default=False)  # see `unfused_attention`

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        total = torch.zeros(self.network.parameters.n, dtype=z.dtype, device=z.device)
        done = 0
        for block in self.batch.blocks(self.samples):
            leaves = {k: t.detach().requires_grad_() for k, t in self.point.tensors.items()}
            rows = self._rows(leaves, block)
            part = z[done : done + rows.numel()].to(rows.dtype).reshape(rows.shape)
            done += rows.numel()
            grads = torch.autograd.grad(rows, list(leaves.values()), part, allow_unused=True)
            total += flat(grads, list(leaves.values()))
        return total

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        direction = self.network.parameters.unpack(p)
        blocks = self.batch.blocks(self.samples)
        return torch.cat([self._image(direction, block) for block in blocks]).to(p.dtype)

    def _image(self, direction: Mapping[str, Tensor], block: Batch) -> Tensor:
        """J p of a block, in the first way that the model's operations allow."""
        while True:
            way = self._forward if self._forward_mode else self._twice_backward
            try:
                with unfused_attention() if self._unfused else nullcontext():
                    return way(direction, block)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                if not self._unfused:
                    self._unfused = True
                elif self._forward_mode:
                    self._forward_mode = False
                else:
                    raise

    def _forward(self, direction: Mapping[str, Tensor], block: Batch) -> Tensor:
        """J p by forward mode."""
        with quiet_transforms():
            rows = partial(self._rows, block=block)
            image: Tensor = jvp(rows, (dict(self.point.tensors),), (dict(direction),))[1]
        return image.detach().reshape(-1)

    def _rows(self, tensors: Mapping[str, Tensor], block: Batch) -> Tensor:
        return self.network.judge(tensors, block, self.point.scale, self.point.seed).rows

    def _twice_backward(self, direction: Mapping[str, Tensor], block: Batch) -> Tensor:
        """J p as the derivative of J'v in v, along p."""
        leaves = {k: t.detach().requires_grad_() for k, t in self.point.tensors.items()}
        rows = self._rows(leaves, block)
        v = torch.zeros_like(rows, requires_grad=True)
        grads = torch.autograd.grad(
            rows, list(leaves.values()), v, create_graph=True, allow_unused=True
        )
        along = flat(grads, list(leaves.values())) @ flat(
            list(direction.values()), list(leaves.values())
        )
        (image,) = torch.autograd.grad(along, v)
        return image.reshape(-1)
