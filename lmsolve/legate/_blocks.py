"""Blocks of a shard's rows as NumPy arrays or torch tensors, and the sums over them.

Sums are in float64 whatever the dtype of the blocks. NumPy's ``J.T.dot(J)`` is a syrk that lets
go of Python's lock. scipy's dsyrk holds it, and so does ``J.T @ J`` of fewer than 500
elements, which would keep the shards of a process waiting in turn.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lmsolve._xp import Array

Function = Callable[..., Any]
Functions = tuple[Function, Function | None]
#: Columns of J'J that are made at once: more need as much memory again for the product.
PANEL = 1024


class NumpyBlocks:
    """NumPy views of a shard."""

    gpu = False

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def context(self, stream: int | None) -> AbstractContextManager[Any]:
        """What a task computes in."""
        return nullcontext()

    def x(self, x: np.ndarray, stream: int | None) -> Array:
        """The parameters (n,) for the user's functions, their own copy."""
        return x.astype(self.dtype)

    def resident(self, store: Any) -> Array:
        """A view of a store's memory."""
        return np.asarray(store)

    def host(self, block: Any, stream: int | None) -> Array:
        """Rows of host data where the task computes."""
        return np.asarray(block)

    def sums(self, row: Any, stream: int | None = None) -> HostSums:
        """The sums J'J and J'r in a row (1, n^2 + n), an array or a store."""
        return HostSums(np.asarray(row))

    def write(self, row: Any, R: Array) -> None:
        """Put a factor (k, n + 1) into a row (1, (n + 1)^2), with rows of zeros below."""
        _write(np.asarray(row), R)

    def functions(self, functions: Functions) -> Functions:
        """The user's functions for this thread."""
        return functions

    def flat(self, a: Any, *shape: int) -> Array:
        """``a`` in another shape."""
        return np.asarray(a).reshape(shape)

    def triangle(self, R: Array | None, J: Array, r: Array) -> Array:
        """Triangular factor (k, n + 1) of the rows ``[J, r]`` below those that R stands for."""
        rows = np.concatenate([J, r[:, None]], axis=1).astype(np.float64, copy=False)
        return np.linalg.qr(rows if R is None else np.concatenate([R, rows]), mode="r")


class TorchBlocks:
    """torch views of a shard, on the device of the task."""

    gpu = True

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._local = threading.local()
        self._lock = threading.Lock()

    def context(self, stream: int | None) -> AbstractContextManager[Any]:
        """The stream of a task on a GPU."""
        if stream is None:
            return nullcontext()
        import torch

        context: AbstractContextManager[Any] = torch.cuda.stream(
            torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
        )
        return context

    def x(self, x: np.ndarray, stream: int | None) -> Array:
        """The parameters (n,) for the user's functions, their own copy."""
        import torch

        return torch.from_numpy(x.copy()).to(_device(stream), getattr(torch, self.dtype))

    def resident(self, store: Any) -> Array:
        """A view of a store's memory, on its device."""
        import torch

        return torch.utils.dlpack.from_dlpack(store)

    def host(self, block: Any, stream: int | None) -> Array:
        """Rows of host data where the task computes."""
        import torch

        if not isinstance(block, torch.Tensor):
            block = np.asarray(block)
            block = torch.from_numpy(block if block.flags.writeable else block.copy())
        return block.to(_device(stream))

    def sums(self, row: Any, stream: int | None = None) -> HostSums | DeviceSums:
        """The sums J'J and J'r in a row (1, n^2 + n), an array or a store."""
        if stream is None:
            return HostSums(np.asarray(row))
        import torch

        if isinstance(row, np.ndarray):
            device = torch.zeros(row.shape, dtype=torch.float64, device="cuda")
            return DeviceSums(device, torch.from_numpy(row))
        return DeviceSums(torch.utils.dlpack.from_dlpack(row).zero_())

    def write(self, row: Any, R: Array) -> None:
        """Put a factor (k, n + 1) into a row (1, (n + 1)^2), with rows of zeros below."""
        if isinstance(row, np.ndarray) or not R.is_cuda:
            _write(np.asarray(row), R.cpu().numpy())
            return
        import torch

        _write(torch.utils.dlpack.from_dlpack(row), R)

    def functions(self, functions: Functions) -> Functions:
        """The user's functions for this thread: deep copies, made once."""
        # functional_call on a module that two threads share gives silently wrong results.
        if getattr(self._local, "of", None) is not functions:
            with self._lock:
                self._local.copies = copy.deepcopy(functions)
            self._local.of = functions
        copies: Functions = self._local.copies
        return copies

    def flat(self, a: Any, *shape: int) -> Array:
        """``a`` in another shape, without its graph."""
        return a.detach().reshape(shape)

    def triangle(self, R: Array | None, J: Array, r: Array) -> Array:
        """Triangular factor (k, n + 1) of the rows ``[J, r]`` below those that R stands for."""
        import torch

        rows = torch.cat([J, r[:, None]], dim=1).to(torch.float64)
        return torch.linalg.qr(rows if R is None else torch.cat([R, rows]), mode="r")[1]


def _device(stream: int | None) -> str:
    """torch's name for the device of a task: CPU tasks have no stream."""
    return "cpu" if stream is None else "cuda"


class HostSums:
    """J'J and J'r of a shard in host memory, added up in a row (1, n^2 + n) of a table."""

    def __init__(self, row: np.ndarray) -> None:
        row[...] = 0.0
        n = (math.isqrt(4 * row.size + 1) - 1) // 2
        self._gram = row[0, : n * n].reshape(n, n)
        self._grad = row[0, n * n :]
        self._panel = min(n, PANEL)
        self._product = np.empty((n, self._panel))

    def add(self, J: Array, r: Array) -> None:
        """Add a block: J (b, n), r (b,), of any library in host memory."""
        J = np.asarray(J).astype(np.float64, copy=False)
        self._grad += J.T.dot(np.asarray(r).astype(np.float64, copy=False))
        n = J.shape[1]
        if self._panel == n:
            self._gram += np.dot(J.T, J, out=self._product)
            return
        # One product would need n^2 numbers beside the sum: a panel of columns at a time, and
        # only what lies on and below the diagonal.
        for i in range(0, n, self._panel):
            j = min(i + self._panel, n)
            out = self._product[: n - i, : j - i]
            self._gram[i:, i:j] += np.matmul(J[:, i:].T, J[:, i:j], out=out)

    def finish(self) -> None:
        """Fill in what lies above the diagonal, where it was left out."""
        n = len(self._grad)
        if self._panel < n:
            for i in range(0, n, self._panel):
                j = min(i + self._panel, n)
                self._gram[i:j, j:] = self._gram[j:, i:j].T


class DeviceSums:
    """J'J and J'r of a shard in a GPU's memory, in a row (1, n^2 + n) of zeros."""

    def __init__(self, row: Any, host: Any = None) -> None:
        n = (math.isqrt(4 * row.numel() + 1) - 1) // 2
        self._row, self._host = row, host
        self._gram = row[0, : n * n].reshape(n, n)
        self._grad = row[0, n * n :]

    def add(self, J: Array, r: Array) -> None:
        """Add a block: J (b, n), r (b,) on the device."""
        J = J.to(self._gram.dtype)
        self._gram.addmm_(J.T, J)
        self._grad.addmv_(J.T, r.to(J.dtype))

    def finish(self) -> None:
        """Bring the sums to the host, where they are wanted there."""
        if self._host is not None:
            self._host.copy_(self._row)


def _write(row: Array, R: Array) -> None:
    """Fill a row (1, (n + 1)^2) with R (k, n + 1) and zeros."""
    n1 = R.shape[1]
    out = row.reshape(n1, n1)
    out[...] = 0.0
    out[: R.shape[0]] = R
