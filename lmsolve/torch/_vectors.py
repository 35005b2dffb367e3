"""Vectors in Legate's stores: a launch takes one whole, as a broadcast input, or in tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A vector (size,) of float64, written once, in tiles of one for each processor."""

    store: Any
    size: int
    tile: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.size // self.tile)

    @property
    def tiles(self) -> Any:
        """The tiles, as an input or an output of a launch."""
        return self.store.partition_by_tiling((self.tile,))


@dataclass(frozen=True)
class Weights:
    """Parameters (n,) of a point where tasks find them: their process's memory, or a store."""

    place: Tensor | Stored
    fingerprint: float = 0.0  # of what the rank's memory holds, where ranks could differ
    token: object = field(default_factory=object)  # stands for the point in what tasks keep

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a launch is to be given."""
        return (self.place.store,) if isinstance(self.place, Stored) else ()


def fingerprint(x: Tensor) -> float:
    """A number of the bits of x (n,) in float64, made where x is: one number comes to the host."""
    bits, odd = x.view(torch.int64), 2 * torch.arange(x.numel(), device=x.device) + 1
    mixed = bits ^ bits >> 32  # else signs, the highest bits, would cancel in pairs
    return float(int((mixed * odd).sum()) % (2**53 - 111))  # the largest such prime
