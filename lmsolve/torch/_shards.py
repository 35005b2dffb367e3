"""Shards of a batch in this process: one of each task, with a copy of the network for each thread.

Host data reach a task through its job (every rank makes the same one), so that on CPUs nothing is
copied, and on a GPU the shard's samples are, once for each batch.

Tasks of one process are threads. `functional_call` on a module that two threads share gives
silently wrong results, so each thread has a copy.
"""

from __future__ import annotations

import copy
import threading
import zlib
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._chain import Chain
from ._factors import Pending
from ._network import Batch, Network
from ._subproblems import Products

Kept = tuple[object, Any]  # something made at an x, and what stands for it


class Placed:
    """A batch cut into shards, and what this process holds of it between launches."""

    def __init__(
        self, network: Network, batch: Batch, processors: int, traffic: Counter[str]
    ) -> None:
        self.network, self.batch, self.traffic = network, batch, traffic
        self.tile = -(-batch.size // processors)
        self.shards = -(-batch.size // self.tile)
        self.checksum = 0.0  # of the batch, where several ranks hold one
        self.chain: Chain | None = None  # the network's, where second derivatives come from it
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._data: dict[tuple[int, torch.device], Batch] = {}
        self._pending: dict[int, Kept] = {}
        self._rows: dict[int, Kept] = {}

    def part(self, index: int) -> Batch:
        """A shard's samples, on the host or wherever the user left them."""
        return self.batch.block(index * self.tile, (index + 1) * self.tile)

    def on(self, device: torch.device, index: int) -> Batch:
        """A shard's samples on the device of its task: copied there once."""
        if device == self.network.parameters.device:
            return self.part(index)
        return self._moved_once(index, device, self.part(index))

    def whole_on(self, device: torch.device) -> Batch:
        """All samples on the device of a task, likewise."""
        if device == self.network.parameters.device:
            return self.batch
        return self._moved_once(-1, device, self.batch)

    def _moved_once(self, index: int, device: torch.device, part: Batch) -> Batch:
        if (index, device) not in self._data:
            found = moved(part, device)
            with self._lock:
                self.traffic["samples"] += found.nbytes
            self._data[index, device] = found
        return self._data[index, device]

    def network_on(self, device: torch.device) -> Network:
        """This thread's copy of the network."""
        copies = self._thread.__dict__.setdefault("copies", {})
        if device not in copies:
            with self._lock:
                copies[device] = copied(self.network, device)
        found: Network = copies[device]
        return found

    def keep_pending(self, index: int, at: object, passes: list[Pending]) -> None:
        """Hold the forward passes of a trial point: it may be accepted."""
        self._pending[index] = at, passes

    def take_pending(self, index: int, at: object) -> list[Pending] | None:
        """The forward passes at x, if this process has them; they serve once."""
        found: list[Pending] | None = _kept(at, self._pending.pop(index, None))
        return found

    def keep_rows(self, index: int, at: object, products: Products, r: Tensor) -> None:
        """Hold a linearisation's residuals, and products with its rows."""
        self._rows[index] = at, (products, r)

    def drop_rows(self, index: int) -> None:
        """Free what is held of the last linearisation."""
        self._rows.pop(index, None)

    def rows(self, index: int, at: object) -> tuple[Products, Tensor] | None:
        """What this process holds of the linearisation at x."""
        found: tuple[Products, Tensor] | None = _kept(at, self._rows.get(index))
        return found


def _kept(at: object, kept: Kept | None) -> Any:
    return kept[1] if kept is not None and kept[0] is at else None


def copied(network: Network, device: torch.device) -> Network:
    """A network of its own for a thread; on the same device it shares the parameters' memory."""
    own = device == network.parameters.device
    # Their values come with every call, so that only what surrounds them must be separate.
    shared = {id(p): p for p in network.module.parameters()} if own else {}
    module = copy.deepcopy(network.module, shared)
    if own:
        return replace(network, module=module)
    parameters = replace(network.parameters, device=device)
    return replace(network, module=module.to(device), parameters=parameters)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Samples on another device."""

    def move(a: Any) -> Any:
        return a.to(device) if isinstance(a, Tensor) else a

    weights = None if batch.weights is None else batch.weights.to(device)
    inputs, targets = pytree.tree_map(move, (batch.inputs, batch.targets))
    return replace(batch, inputs=inputs, targets=targets, weights=weights)


def checksum(*arrays: np.ndarray) -> float:
    """Of the bits of arrays: ranks that hold different ones must stop, not wait for each other."""
    total = 0
    for a in arrays:
        total = zlib.crc32(np.ascontiguousarray(a).data, total)
    return float(total)


def view_of(store: Any) -> Tensor:
    """A store's, or an array's, memory where it lies."""
    return torch.utils.dlpack.from_dlpack(store)


def device_of(stream: int | None) -> torch.device:
    """Device of a task: CPU tasks have no stream."""
    if stream is None:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def stream_of(stream: int | None) -> AbstractContextManager[Any]:
    """The stream of a task on a GPU; on a CPU one thread, for a task has one processor."""
    if stream is None:
        if torch.get_num_threads() != 1:  # of this thread
            torch.set_num_threads(1)
        return nullcontext()
    context: AbstractContextManager[Any] = torch.cuda.stream(
        torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    )
    return context
