"""Data as users give it: checked, placed beside the model, cut into mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ._network import Batch
from ._params import Parameters


def make_batch(
    inputs: Any, targets: Any, weights: Tensor | None, parameters: Parameters, move: bool = False
) -> Batch:
    """Samples on the model's device, floats in its dtype; ValueError where they cannot be used.

    ``move`` takes host tensors to the model's device; otherwise they must be there.
    """

    def place(name: str) -> Callable[[Any], Any]:
        def one(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            if a.device != parameters.device and not (move and a.device.type == "cpu"):
                raise ValueError(
                    f"`{name}` must be on the model's device {parameters.device}, got a tensor on "
                    f"{a.device}."
                )
            if a.is_complex():
                raise TypeError(f"`{name}` must be real, got {a.dtype}.")
            dtype = parameters.dtype if a.is_floating_point() else a.dtype
            return a.to(parameters.device, dtype, non_blocking=True)

        return one

    inputs = pytree.tree_map(place("inputs"), inputs)
    targets = pytree.tree_map(place("targets"), targets)
    size = _common_size(inputs, targets)
    if weights is not None:
        weights = place("weights")(torch.as_tensor(weights))
        _check_weights(weights, size)
    for name, tree in (("inputs", inputs), ("targets", targets)):
        _check_finite(name, tree)
    return Batch(inputs, targets, weights, size)


def _common_size(inputs: Any, targets: Any) -> int:
    """Length of the leading axis that all tensors share."""
    named = [("inputs", a) for a in pytree.tree_leaves(inputs) if isinstance(a, Tensor)]
    named += [("targets", a) for a in pytree.tree_leaves(targets) if isinstance(a, Tensor)]
    if not named or named[0][0] == "targets":
        raise TypeError(
            f"`inputs` must be a tensor or a pytree of tensors, got {type(inputs).__name__}."
        )
    for name, a in named:
        if a.ndim == 0:
            raise ValueError(f"`{name}` must have a leading axis of samples, got a scalar tensor.")
    size = named[0][1].shape[0]
    for name, a in named:
        if a.shape[0] != size:
            raise ValueError(
                f"`{name}` must hold as many samples as the first of `inputs`, {size}, "
                f"got a tensor of shape {tuple(a.shape)}."
            )
    if size == 0:
        raise ValueError("`inputs` must hold at least one sample, got none.")
    return int(size)


def _check_finite(name: str, tree: Any) -> None:
    for a in pytree.tree_leaves(tree):
        if isinstance(a, Tensor) and a.is_floating_point() and not bool(a.isfinite().all()):
            bad = int((~a.isfinite()).sum())
            raise ValueError(f"`{name}` must be finite, got {bad} NaN or infinite of {a.numel()}.")


def _check_weights(weights: Tensor, size: int) -> None:
    if weights.shape != (size,):
        raise ValueError(
            f"`weights` must have shape ({size},), one for each sample, got {tuple(weights.shape)}."
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("`weights` must be finite and not negative.")


@dataclass(frozen=True)
class Drawn:
    """A mini-batch and its place: epoch, and index in the epoch."""

    batch: Batch
    epoch: int
    index: int


class Samples:
    """A fit's data: everything at once, random mini-batches of tensors, or a DataLoader's batches.

    ``size`` is the size of the mini-batches, None for all at once; it may grow between batches.
    """

    def __init__(
        self,
        data: Any,
        weights: Tensor | None,
        size: int | None,
        parameters: Parameters,
        seed: int,
    ) -> None:
        self._parameters = parameters
        self._seed = seed
        self.loader: DataLoader[Any] | None = None
        self.whole: Batch | None = None
        self.size = size
        if isinstance(data, DataLoader):
            if weights is not None or size is not None:
                raise ValueError(
                    "`weights` and `batch_size` belong to tensors and datasets; a DataLoader "
                    "brings its own batches."
                )
            self.loader = data
            return
        if isinstance(data, Dataset):
            data = _collated(data)
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise TypeError(
                "`data` must be a pair (inputs, targets), a Dataset or a DataLoader, got "
                f"{type(data).__name__}."
            )
        self.whole = make_batch(data[0], data[1], weights, parameters)
        if size is not None and size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {size}.")
        if size is not None and size >= self.whole.size:
            self.size = None

    @property
    def fixed(self) -> bool:
        """Whether every step sees all the data."""
        return self.loader is None and self.size is None

    def draw(self, epoch: int, skip: int) -> Iterator[Drawn]:
        """Batches of one epoch after the first ``skip``; the same for the same epoch."""
        if self.loader is not None:
            yield from self._from_loader(epoch, skip)
            return
        assert self.whole is not None
        if self.size is None:
            yield Drawn(self.whole, epoch, 0)
            return
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(self.whole.size, generator=generator)
        order = order.to(self._parameters.device)
        done = index = 0
        while done < self.whole.size:
            chosen = order[done : done + self.size]
            done += self.size
            if index >= skip:
                yield Drawn(_select(self.whole, chosen), epoch, index)
            index += 1

    def _from_loader(self, epoch: int, skip: int) -> Iterator[Drawn]:
        assert self.loader is not None
        found = False
        for index, pair in enumerate(self.loader):
            found = True
            if index < skip:
                continue
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"The DataLoader must yield pairs (inputs, targets), got {type(pair).__name__}."
                )
            inputs = tuple(pair[0]) if isinstance(pair[0], list) else pair[0]
            yield Drawn(
                make_batch(inputs, pair[1], None, self._parameters, move=True), epoch, index
            )
        if not found:
            raise ValueError("The DataLoader must yield at least one batch, got none.")


def _collated(data: Dataset[Any]) -> Any:
    """All samples of a map-style dataset, stacked."""
    if isinstance(data, IterableDataset):
        raise TypeError("`data` must have a length; give an IterableDataset as a DataLoader.")
    count = len(data)  # type: ignore[arg-type]  # map-style datasets have a length
    if count == 0:
        raise ValueError("`data` must hold at least one sample, got an empty Dataset.")
    return default_collate([data[i] for i in range(count)])


def _select(batch: Batch, chosen: Tensor) -> Batch:
    """The chosen samples."""

    def pick(a: Any) -> Any:
        return a[chosen] if isinstance(a, Tensor) else a

    weights = None if batch.weights is None else batch.weights[chosen]
    return Batch(
        pytree.tree_map(pick, batch.inputs),
        pytree.tree_map(pick, batch.targets),
        weights,
        chosen.numel(),
    )
