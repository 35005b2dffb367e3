"""Sums over rows, where the arrays are: cost, subproblem, and running sums over blocks of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._factored import Rows
from ._functions import wrong_shape
from ._loss import Loss
from ._subproblem import Subproblem, dense_subproblem
from ._subproblem import gram as gram_of
from ._xp import Array, Namespace, sum_squares, to_floats


class LocalSums:
    """Sums over rows, taken where and by what library the arrays are."""

    def covers(self, m: int, n: int) -> bool:
        """Whether this is all there is to a dense problem of m rows and n parameters."""
        return True

    def cost(self, xp: Namespace, r: Array, loss: Loss | None) -> Array:
        """0-d cost of residuals r (m,), summed in float64."""
        if loss is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # a trial may be anywhere
                return loss.cost(xp, r)
        return 0.5 * sum_squares(xp, r)

    def subproblem(
        self,
        xp: Namespace,
        J: Array,
        r: Array,
        loss: Loss | None,
        memory: dict[str, Any] | None = None,
    ) -> Subproblem:
        """Subproblem of a dense J (m, n) and r (m,); memory: what those before it have left."""
        w = None
        if loss is not None:
            w, r = loss.weights(xp, r)
        return dense_subproblem(xp, J, r, w, memory)

    def iterated(
        self, xp: Namespace, J: Array, r: Array, loss: Loss | None, options: dict[str, Any]
    ) -> Subproblem:
        """Subproblem of a dense J (m, n) that is to be iterated on, and r (m,)."""
        from . import _sparse

        w = None
        if loss is not None:
            w, r = loss.weights(xp, r)
        return _sparse.iterated_subproblem(J, r, w, options)

    def curvature_rows(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Some rows (k, n) with the curvature of the cost, and its scores if there is a loss.

        They stand for all m where those should not come to the host; None where they may.
        """
        return None

    def columns(
        self, J: Array, r: Array, loss: Loss | None
    ) -> tuple[Any, np.ndarray | None] | None:
        """`Columns` of rows with the curvature of the cost, and what gives their scores.

        Where J (m, n) has m < n and should not come to the host; else None. The second are
        factors (m,) of those rows, or None without a loss.
        """
        return None

    def reserve(self, r: Array, n: int) -> None:
        """Raise MemoryError if a Jacobian by differences of residuals r (m,) would not fit."""

    def block_costs(self, xp: Namespace, loss: Loss | None) -> BlockCosts:
        """Where the costs of blocks of residuals add up."""
        return BlockCosts(xp, loss)

    def block_sums(self, xp: Namespace, loss: Loss | None, n: int) -> BlockSums:
        """Where J'J and J'r of blocks of rows add up."""
        return BlockSums(xp, loss, n)


LOCAL = LocalSums()


class BlockCosts:
    """Running cost over blocks of residuals."""

    def __init__(self, xp: Namespace, loss: Loss | None) -> None:
        self._xp, self._loss = xp, loss
        self._cost = 0.0
        self.m = 0

    def add(self, r: Array) -> None:
        """Add a block of residuals (k,)."""
        self.m += r.shape[0]
        self._add(r)

    def _add(self, r: Array) -> None:
        self._cost += to_floats(LOCAL.cost(self._xp, r, self._loss))[0]

    def result(self) -> float:
        """The cost."""
        return self._cost


class BlockSums:
    """Running sums J'J (n, n) and J'r (n,) over blocks of weighted rows."""

    def __init__(self, xp: Namespace, loss: Loss | None, n: int) -> None:
        self._xp, self._loss, self._n = xp, loss, n
        self._gram: Array = None
        self._grad: Array = None
        self.m = 0

    def add(self, r: Array, J: Array) -> None:
        """Add a block of residuals (k,) and rows (k, n)."""
        if tuple(J.shape) != (r.shape[0], self._n):
            raise wrong_shape(J.shape, (r.shape[0], self._n), " in a block")
        self.m += r.shape[0]
        self._add(r, J)

    def _add(self, r: Array, J: Array) -> None:
        w = None
        if self._loss is not None:
            w, r = self._loss.weights(self._xp, r)
        G, g = gram_of(self._xp, Rows(self._xp, J, r, w))
        self._add_sums(G, g)

    def _add_sums(self, G: Array, g: Array) -> None:
        if self._gram is None:
            self._gram, self._grad = G, g
        else:
            self._gram, self._grad = self._gram + G, self._grad + g

    def result(self) -> tuple[Array, Array]:
        """The sums."""
        if self._gram is None:
            raise ValueError("`jac` must yield at least one block of rows, got none.")
        return self._gram, self._grad
