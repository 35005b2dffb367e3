"""Vectors in Legate's stores: a launch takes one whole, as a broadcast input, or in tiles.

The tasks that write a vector return its sums, so that of a step that lies there the host reads
numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._shards import view_of

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

    from ._cluster import Cluster


@dataclass(frozen=True)
class Stored:
    """A vector (size,) of float64, written once, in tiles of one for each processor."""

    store: Any
    size: int
    tile: int
    square: float = 0.0  # v'v, where the launch that wrote v told
    largest: float = 0.0  # magnitude of a component
    along: float = 0.0  # product with another vector
    fingerprint: float = 0.0  # of what the rank's memory held, if it came from there

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.size // self.tile)

    @property
    def tiles(self) -> Any:
        """The tiles, as an input or an output of a launch."""
        return self.store.partition_by_tiling((self.tile,))

    def numel(self) -> int:
        """Number of components, by the name that tensors have for it."""
        return self.size


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


def combined(
    cluster: Cluster,
    *terms: tuple[float, Stored],
    rows: Any = None,
    weight: float = 1.0,
    against: Stored | None = None,
) -> Stored:
    """Sum of `c v` over the terms (c, v), and of the rows of a table times their weight.

    Its `along` is the product with `against`.
    """
    out = cluster.vector(terms[0][1].size, terms[0][1].tile)
    inputs = [v.tiles for _, v in terms]
    if rows is not None:
        inputs.append(rows.partition_by_tiling((rows.shape[0], out.tile)))
    if against is not None:
        inputs.append(against.tiles)

    def work(shard: Shard) -> Sequence[Tensor]:
        parts = [view_of(store) for store in shard.inputs]
        total = view_of(shard.outputs[0]).zero_()
        for (c, _), part in zip(terms, parts, strict=False):
            total.add_(part, alpha=c)
        if rows is not None:
            total.add_(parts[len(terms)].sum(0), alpha=weight)
        other = total if against is None else parts[-1]
        return total @ total, total.abs().max(), total @ other

    told = cluster.run(work, out.count, inputs, (out.tiles,))
    return replace(
        out,
        square=float(told[:, 0].sum()),
        largest=float(told[:, 1].max()),
        along=float(told[:, 2].sum()),
    )
