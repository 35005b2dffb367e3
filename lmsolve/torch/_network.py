"""A module, its parameter layout and its objective: rows of residuals over blocks of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ._losses import Judged, Objective
from ._params import Parameters, fixed_random, frozen_statistics


@dataclass(frozen=True)
class Batch:
    """Samples: pytrees of tensors with one common leading axis, and a weight for each sample.

    `start` is the place of the first sample in the batch that this one was cut from: a dropout
    mask is drawn anew for every block, from the step's seed and that place.
    """

    inputs: Any
    targets: Any
    weights: Tensor | None
    size: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        leaves = pytree.tree_leaves((self.inputs, self.targets, self.weights))
        return sum(a.nbytes for a in leaves if isinstance(a, Tensor))

    def block(self, lo: int, hi: int) -> Batch:
        """Samples lo to hi."""
        if lo == 0 and hi >= self.size:
            return self
        hi = min(hi, self.size)
        cut = lambda a: a[lo:hi] if isinstance(a, Tensor) else a  # noqa: E731  (two uses below)
        return Batch(
            pytree.tree_map(cut, self.inputs),
            pytree.tree_map(cut, self.targets),
            None if self.weights is None else self.weights[lo:hi],
            hi - lo,
            self.start + lo,
        )

    def blocks(self, samples: int) -> Iterator[Batch]:
        """Consecutive blocks of at most `samples` samples."""
        for lo in range(0, self.size, samples):
            yield self.block(lo, lo + samples)


@dataclass(frozen=True)
class Network:
    """What is evaluated. Holds no state of a fit; the parameters come with every call."""

    module: nn.Module
    parameters: Parameters
    objective: Objective

    @cached_property
    def owners(self) -> dict[nn.Module, dict[str, int]]:
        """Submodules with trainable parameters of their own: which, by their names there."""
        index = {
            id(self.module.get_parameter(name)): i for i, name in enumerate(self.parameters.names)
        }
        found = {
            module: {
                key: index[id(p)]
                for key, p in module.named_parameters(recurse=False)
                if id(p) in index
            }
            for module in self.module.modules()
        }
        return {module: own for module, own in found.items() if own}

    @cached_property
    def tied(self) -> dict[str, str] | None:
        """Where a parameter has several names: name of each place in the layout, by its full name.

        A module that is registered twice has its places once: torch, told of both of them, would
        put a tensor back into the second one instead of the parameter.
        """
        names = self.module.named_parameters(remove_duplicate=False)
        if sum(1 for _ in names) == sum(1 for _ in self.module.parameters()):
            return None
        first = {id(self.module.get_parameter(name)): name for name in self.parameters.names}
        return {
            f"{path}.{key}".removeprefix("."): first[id(p)]
            for path, module in self.module.named_modules()
            for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in first
        }

    def call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
        """The module's output at the given parameters."""
        if self.tied is not None:
            tensors = {place: tensors[name] for place, name in self.tied.items()}
        return functional_call(self.module, dict(tensors), args, tie_weights=False)

    def judge(
        self, tensors: Mapping[str, Tensor], batch: Batch, scale: float, seed: int | None = None
    ) -> Judged:
        """Rows (B, k), differentiable, and costs (B,) of a block at the given parameters."""
        args = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        device = self.parameters.device
        mask = None if seed is None else (seed + 7919 * batch.start) % 2**63
        # Grad mode on: a forward pass may differentiate in its inputs. It records nothing more.
        with torch.enable_grad(), frozen_statistics(self.module), fixed_random(mask, device):
            output = self.call(tensors, args)
            return self.judge_output(output, batch, scale)

    def judge_output(self, output: Any, batch: Batch, scale: float) -> Judged:
        """Rows and costs of a block from the module's output."""
        judged = self.objective(output, batch.targets, batch.size, batch.weights)
        if scale == 1.0:
            return judged
        return Judged(judged.rows * scale**0.5, judged.cost * scale)

    def rows_of_sample(
        self, tensors: Mapping[str, Tensor], sample: Any, scale: float, seed: int | None = None
    ) -> Tensor:
        """Rows (k,) of one sample (inputs, targets, weight) without a batch axis, for `vmap`."""
        inputs, targets, weight = pytree.tree_map(
            lambda a: a[None] if isinstance(a, Tensor) else a, sample
        )
        return self.judge(tensors, Batch(inputs, targets, weight, 1), scale, seed).rows[0]
