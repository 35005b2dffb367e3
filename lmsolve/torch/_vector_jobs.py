"""Jobs that take a vector to every shard: products with its rows, curvature along a step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._chain_problem import ChainProblem
from ._jacobian import Plan
from ._jobs import Here, Job
from ._params import flat
from ._problem import Settings
from ._shards import Placed, view_of
from ._subproblems import AHEAD, second_derivative
from ._vectors import Stored, Weights

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard


class VectorJob(Job):
    """A job with a vector v: a step or a direction (n,), or one number for each residual (m,)."""

    kind = "vectors"  # of v in the cluster's traffic, where it comes from the host

    def __init__(
        self, placed: Placed, x: Weights, plan: Plan, settings: Settings, v: Tensor | Stored
    ) -> None:
        super().__init__(placed, x, plan, settings)
        self._v: Tensor | None = None
        if isinstance(v, Stored):
            self.inputs = (*self.inputs, self.part(v))
        else:
            self._v = v.detach().cpu()
            self.sent[self.kind] += self._v.nbytes

    def part(self, v: Stored) -> Any:
        """What a task sees of a vector in a store: all of it."""
        return v.store

    def v(self, shard: Shard, like: Tensor) -> Tensor:
        """The vector where the task runs."""
        return view_of(shard.inputs[-1]) if self._v is None else self._v.to(like.device)


class CurvatureJob(VectorJob):
    """Writes the shard's J'r_pp (n,) into its row of a table: the geodesic acceleration's.

    No number of residuals' size leaves the task.
    """

    def compute(self, here: Here, shard: Shard) -> float:
        """Second difference of the residuals along p, or the derivative of a chain."""
        out = self.zeros(shard)
        x, p = here.x, self.v(shard, out)
        if self.placed.chain is not None:
            problem = ChainProblem(
                here.network, here.batch, self.plan, self.settings, self.placed.chain
            )
            out += problem.curvature(here.point, p)
            return 0.0
        ahead = replace(here.point, tensors=here.network.parameters.unpack(x + AHEAD * p))
        for block, products, r in self.linear(here):
            Jp = products.product(p).to(x.dtype)
            r_ahead = self.rows(replace(here, batch=block, point=ahead)).to(x.dtype)
            slope = (r_ahead - r.to(x.dtype)) / AHEAD
            out += products.transposed(second_derivative(slope, Jp))
        return 0.0


class BendJob(VectorJob):
    """Writes the shard's part of r_pp into its part of a store (m,); its number is |J p|^2."""

    def compute(self, here: Here, shard: Shard) -> float:
        """Second difference of the residuals along p."""
        out = view_of(shard.outputs[0])
        x, p = here.x, self.v(shard, out)
        ahead = replace(here.point, tensors=here.network.parameters.unpack(x + AHEAD * p))
        parts = [(products.product(p).to(x.dtype), r) for _, products, r in self.linear(here)]
        Jp, r = (torch.cat(part).to(x.dtype) for part in zip(*parts, strict=True))
        r_ahead = self.rows(replace(here, point=ahead)).to(x.dtype)
        out.copy_(second_derivative((r_ahead - r) / AHEAD, Jp))
        return float(Jp @ Jp)


class SlopeJob(VectorJob):
    """Writes J' times the residuals' slope over a share of the step; J'J p makes J'r_pp of it."""

    def compute(self, here: Here, shard: Shard) -> float:
        """One backward pass for all residuals of a block."""
        out = self.zeros(shard)
        x, p, point = here.x, self.v(shard, out), here.point
        ahead = replace(point, tensors=here.network.parameters.unpack(x + AHEAD * p))
        kept = self.placed.rows(here.index, self.x.token)
        if kept is not None:
            products, r = kept
            out += products.transposed((self.rows(replace(here, point=ahead)) - r) / AHEAD)
            return 0.0
        for block in here.batch.blocks(self.evaluation_samples()):
            leaves = {name: t.detach().requires_grad_() for name, t in point.tensors.items()}
            rows = here.network.judge(leaves, block, point.scale, point.seed).rows
            r_ahead = self.rows(replace(here, batch=block, point=ahead)).view_as(rows)
            slope = (r_ahead - rows.detach()) / AHEAD
            wanted = list(leaves.values())
            out += flat(torch.autograd.grad(rows, wanted, slope, allow_unused=True), wanted)
        return 0.0


class ProductJob(VectorJob):
    """Writes the shard's part of `J p` into its part of a store (m,); its number is |J p|^2."""

    def compute(self, here: Here, shard: Shard) -> float:
        """Twice backward, or from the factors of a pass."""
        out = view_of(shard.outputs[0])
        p = self.v(shard, out)
        out.copy_(torch.cat([products.product(p) for _, products, _ in self.linear(here)]))
        return float(out @ out)


class TransposedJob(VectorJob):
    """Writes the shard's part of `J'z` (n,) into its row of a table."""

    kind = "residuals"

    def part(self, v: Stored) -> Any:
        """The shard's own."""
        return v.tiles

    def v(self, shard: Shard, like: Tensor) -> Tensor:
        """The shard's own part."""
        if self._v is None:
            return super().v(shard, like)
        first = shard.index * self.placed.tile * self.plan.k
        return self._v[first : first + self.placed.tile * self.plan.k].to(like.device)

    def compute(self, here: Here, shard: Shard) -> float:
        """One backward pass."""
        out = self.zeros(shard)
        z = self.v(shard, out)
        for _, products, r in self.linear(here):
            out += products.transposed(z[: len(r)])
            z = z[len(r) :]
        return 0.0
