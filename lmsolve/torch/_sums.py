"""What the rows of J add up to: the normal equations, and the Gram matrix of a wide J.

Neither needs J as a whole. `NormalSums` takes blocks of rows as they come. `DualKernel` makes
`K = J J'` from one parameter after another: for a Linear layer on vectors its part of K is the
elementwise product of two small Gram matrices, of its output gradients and of its inputs, and J's
columns are never formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._factors import Factor

# From this many columns on NumPy's product of a matrix with its own transpose, which is syrk, beats
# torch's gemm: 32 against 48 ms at 8000 x 500, but 0.23 against 0.17 ms at 2000 x 61 (float64, one
# core). Below, three quarters of the gemm do: 1.7 against 2.1 ms at ten times 2000 x 61.
FEWEST_SYRK = 128
# Rows of a strip of a small Gram matrix: 1.65 ms for the lower triangle at ten times 62 x 2000,
# where the whole takes 1.90 and strips of 16 and 48 rows 1.67 and 1.74 (float64, one core).
_STRIP = 32


class NormalSums:
    """J'J (n, n) and J'r (n,), accumulated over blocks of rows in `dtype`.

    The products of a block are made in `block_dtype`. Those of float32 rows in float64 are exact;
    in float32, at half the cost, their error of about 1e-6 is below any but the smallest damping.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        block_dtype: torch.dtype | None = None,
    ) -> None:
        gram = torch.zeros((n, n), dtype=dtype, device=device)
        self._start(gram, torch.zeros(n, dtype=dtype, device=device), block_dtype)

    @classmethod
    def into(cls, gram: Tensor, grad: Tensor, block_dtype: torch.dtype | None = None) -> NormalSums:
        """Sums that grow in the memory of others."""
        sums = cls.__new__(cls)
        sums._start(gram, grad, block_dtype)
        return sums

    def _start(self, gram: Tensor, grad: Tensor, block_dtype: torch.dtype | None) -> None:
        self.gram, self.grad = gram, grad
        self.block_dtype = block_dtype or gram.dtype
        half = gram.shape[0] // 2
        self._blocks = gram[:half, :half], gram[:half, half:], gram[half:]
        self._column = grad[:, None]
        self._part: np.ndarray | None = None

    def add_chunks(self, block: Tensor) -> None:
        """Add rows as chunks (c, n + 1, rows) of [J r]'."""
        for chunk in block:
            self.add(chunk[-1], chunk[:-1].T)

    def add(self, r: Tensor, J: Tensor) -> None:
        """Add rows J (rows, n) with residuals r (rows,)."""
        J, r = J.to(self.block_dtype), r.to(self.block_dtype)
        Jt = J.T
        add_product(self._column, Jt, r[:, None])
        if J.device.type != "cpu":
            add_product(self.gram, Jt, J)
        elif J.shape[1] < FEWEST_SYRK:
            corner, upper, lower = self._blocks
            half = corner.shape[0]
            add_product(corner, Jt[:half], J[:, :half])
            add_product(lower, Jt[half:], J)
            upper.copy_(lower[:, :half].T)
        else:
            A = J.numpy()
            self._part = np.matmul(A.T, A, out=self._part)
            self.gram += torch.from_numpy(self._part)


class ChunkSums:
    """J'J (n, n) and J'r (n,) of few columns, from rows in chunks, one for each thread.

    One product of a few dozen columns does not scale with threads, a product for each does. Of
    `[J r]'[J r]` only strips of the lower triangle are made.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, chunks: int, block_dtype: torch.dtype | None = None
    ) -> None:
        self.block_dtype = block_dtype or dtype
        starts = range(0, n + 1, _STRIP)
        self._spans = [(lo, min(lo + _STRIP, n + 1)) for lo in starts]
        self._strips = [torch.zeros((chunks, hi - lo, hi), dtype=dtype) for lo, hi in self._spans]
        self._block: Tensor | None = None
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []

    def add_chunks(self, block: Tensor) -> None:
        """Add rows as chunks (c, n + 1, rows) of [J r]'; often again in the same place."""
        if block is not self._block:
            self._block = block
            self._products = [
                (strip[: len(block)], block[:, lo:hi], block[:, :hi].mT)
                for (lo, hi), strip in zip(self._spans, self._strips, strict=True)
            ]
        for total, A, B in self._products:
            if A.dtype == total.dtype:
                total.baddbmm_(A, B)
            else:
                total += torch.bmm(A, B)

    @property
    def gram(self) -> Tensor:
        """J'J (n, n)."""
        _, n1 = self._spans[-1]
        square = self._strips[0].new_zeros((n1, n1))
        for (lo, hi), strip in zip(self._spans, self._strips, strict=True):
            square[lo:hi, :hi] = strip.sum(0)
        lower = square[:-1, :-1].tril()
        return lower + lower.tril(-1).T

    @property
    def grad(self) -> Tensor:
        """J'r (n,)."""
        return self._strips[-1].sum(0)[-1, :-1]


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add `A B` in place, made in the dtype of A and B."""
    if A.dtype == total.dtype:
        total.addmm_(A, B)
    else:
        total += A @ B


def _multiplies(uses: list[Factor]) -> bool:
    """Whether a parameter's Gram matrix is the product of two small ones."""
    return len(uses) == 1 and uses[0].single and (uses[0].outer or uses[0].inputs is None)


@dataclass(frozen=True)
class DualKernel:
    """`K = J J'` (m, m), lower triangle, from the factors of a pass."""

    factors: list[list[Factor]]
    sizes: tuple[int, ...]
    samples: int
    k: int
    memory: int  # bytes for temporaries

    def assemble(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """K, one parameter after another."""
        m = self.samples * self.k
        K = torch.zeros((m, m), dtype=dtype, device=device)
        self.add_band(K, range(self.samples))
        return K

    def add_band(self, K: Tensor, samples: range) -> None:
        """Add the rows of some consecutive samples to a band K (rows, m) of zeros."""
        for uses, size in zip(self.factors, self.sizes, strict=True):
            if _multiplies(uses):
                self._add_products(K, uses[0], samples)
            elif uses:
                self._add_rows(K, uses, size, samples)

    def _add_products(self, K: Tensor, use: Factor, samples: range) -> None:
        """Gram of output gradients times Gram of inputs, a few rows at a time."""
        B, k = self.samples, self.k
        G = torch.stack([g[:, 0] for g in use.g], 1).flatten(0, 1).to(K.dtype)
        A = None if use.inputs is None else use.a[:, 0].to(K.dtype)
        band = max(1, min(B, self.memory // (2 * B * k * k * K.dtype.itemsize)))
        for lo in range(samples.start, samples.stop, band):
            hi = min(lo + band, samples.stop)
            part = G[lo * k : hi * k] @ G[: hi * k].T
            if A is not None:
                inputs = A[lo:hi] @ A[:hi].T
                part = part.view(hi - lo, k, hi, k).mul_(inputs[:, None, :, None])
                part = part.view((hi - lo) * k, hi * k)
            first = samples.start
            K[(lo - first) * k : (hi - first) * k, : hi * k].add_(part)

    def _add_rows(self, K: Tensor, uses: list[Factor], size: int, samples: range) -> None:
        """Columns of J made slice by slice."""
        for J in self._slices(uses, size):
            J = J.to(K.dtype)
            K.addmm_(J[samples.start * self.k : samples.stop * self.k], J.T)

    def _slices(self, uses: list[Factor], size: int) -> Iterator[Tensor]:
        """Columns of one parameter (m, columns), a slice of its first axis at a time."""
        heads = uses[0].g[0].shape[-1]
        width = size // heads
        m = self.samples * self.k
        step = max(1, self.memory // (2 * m * width * uses[0].g[0].dtype.itemsize))
        for lo in range(0, heads, step):
            first = slice(lo, lo + step)
            columns = []
            for k in range(self.k):
                rows = [u.rows(k, first).flatten(1) for u in uses]
                columns.append(rows[0] if len(rows) == 1 else torch.stack(rows).sum(0))
            yield torch.stack(columns, 1).flatten(0, 1)
