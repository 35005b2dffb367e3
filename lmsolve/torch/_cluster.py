"""Legate as a session of a network sees it: processors, stores, launches, and bytes that cross."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lmsolve._threads import one_thread
from lmsolve.legate._start import start

from ._bands import COPIES, UNTILED, Bands
from ._jacobian import Plan, Point, block_rows, choose
from ._jobs import Job
from ._network import Batch, Network
from ._params import quiet_transforms
from ._setup import (
    CONTEXT,
    check_copy,
    check_launched,
    check_processors,
    check_split,
    check_torch_memory,
    free_gpu_bytes,
)
from ._shards import stream_of, view_of
from ._vectors import Stored, Weights, combined, fingerprint

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

#: What a task does of no network, and at most three numbers that it returns.
Work: TypeAlias = "Callable[[Shard], Sequence[float | Tensor]]"

WAYS = ("factors", "vmap", "graph")
#: What passes between the host and Legate's tasks; see `Cluster`.
TRAFFIC = ("jacobian", "matrix", "residuals", "vectors", "parameters", "samples", "numbers")


class Cluster:
    """Legate as a session sees it: its processors, its stores, and what the ranks agree on.

    `traffic` counts the bytes between this host and Legate's tasks, by what they are: `jacobian`
    (rows of J), `matrix` (J'J with J'r, or J J'), `residuals` (m numbers), `vectors` (n), `samples`
    (a batch on its way to devices), `parameters` (n, the weights at a point), `numbers` (one or a
    few of each shard). What goes to every task counts once.
    """

    def __init__(self, network: Network, devices: Sequence[torch.device] | None = None) -> None:
        check_copy(network)
        start()
        from legate.core import TaskTarget, get_legate_runtime

        from lmsolve.legate import _memory, _tasks

        self._tasks, self._memory = _tasks, _memory
        self.store_of = _tasks.store_of
        self.ranks = int(get_legate_runtime().node_count)
        check_launched(self.ranks, os.environ)
        gpus = _tasks.processors(TaskTarget.GPU)
        self.target = TaskTarget.GPU if gpus else TaskTarget.CPU
        self.processors = gpus or _tasks.processors(TaskTarget.CPU)
        if devices is None:
            check_processors(self.processors, gpus, network.parameters.device)
        else:
            check_split(self.ranks, gpus // self.ranks, devices)
        self.local = -(-self.processors // self.ranks)
        # One process's tasks write into its own memory: Legate's pool would hold a second copy.
        self.in_process = self.ranks == 1 and not gpus
        self.shared = not gpus  # memory, by the tasks of a rank and what starts them
        self.traffic: Counter[str] = Counter()
        self._chain = _tasks.Chain(self.target)
        self._sent: list[tuple[Tensor | Stored, Weights]] = []
        self._held: dict[str, tuple[Any, Any]] = {}

    def agreed(self, *values: float) -> list[float]:
        """The first rank's values, at most three, on every rank: numbers that decide something."""
        if self.ranks == 1:
            return list(values)
        padded = [*values, 0.0, 0.0][:3]
        found = self._tasks.launch(lambda shard: padded, 1, self.target)
        self.traffic["numbers"] += found.nbytes
        return [float(v) for v in found[0, : len(values)]]

    def choose(self, network: Network, batch: Batch, point: Point, memory: int) -> Plan:
        """How rows are made: timed on the first rank, the same on all."""
        plan = choose(network, batch, point, memory // self.local, forward=False)
        code = 2 * WAYS.index(plan.way) + plan.batched
        code, samples, activation = map(int, self.agreed(code, plan.samples, plan.activation_bytes))
        plan = replace(
            plan,
            way=WAYS[code // 2],
            batched=bool(code % 2),
            samples=samples,
            activation_bytes=activation,
        )
        if self.target.name == "GPU":
            self.check_gpu_memory(network, batch, plan)
        return plan

    def check_gpu_memory(self, network: Network, batch: Batch, plan: Plan) -> None:
        """MemoryError, on all ranks, where Legate's pool leaves torch too little of a GPU."""
        free = int(self.run(free_gpu_bytes, self.processors)[:, 0].min())
        n, itemsize = network.parameters.n, network.parameters.dtype.itemsize
        rows = min(block_rows(n, torch.float64), plan.k * plan.samples)
        need = batch.nbytes // self.processors + plan.activation_bytes + 8 * rows * n
        check_torch_memory(free, need + 3 * n * itemsize + CONTEXT, self._memory.pool("fbmem"))

    def table(self, kind: str, shards: int, size: int) -> Any:
        """A table of float64 (shards, size) to be summed; in Legate's memory one of each kind."""
        if self.in_process:
            return self._tasks.HostRows(shards, size)
        return self._kept(
            kind, (shards, size), lambda: self._tasks.Table(shards, size, self.target)
        )

    def store(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A store, one of each kind kept between launches."""
        from legate.core import get_legate_runtime, types

        of = types.float64 if dtype == torch.float64 else types.float32
        make = get_legate_runtime().create_store
        return self._kept(kind, (shape, dtype), lambda: make(of, shape))

    def _kept(self, kind: str, form: Any, make: Callable[[], Any]) -> Any:
        """The thing of a kind; one of another form takes its place."""
        if kind not in self._held or self._held[kind][0] != form:
            self._held.pop(kind, None)
            self._held[kind] = form, make()
        return self._held[kind][1]

    def require_sums(self, n: int) -> None:
        """MemoryError where there is no room for the shards' J'J (n, n) and J'r."""
        size, what = 8 * n * (n + 1), "The sums of J'J"
        if self.in_process:
            self._memory.require_host(size * self.processors, what)
        else:  # the rows of this process, the columns that it adds up, and their total
            rest = self.share_of_bands(n, 8) if self.distributes(n) else 2 * size
            self.require(size * 2 * self.local + rest, what)

    def require_kernel(self, m: int, itemsize: int) -> None:
        """MemoryError where there is no room for J J' (m, m)."""
        distributed = self.distributes(m)
        need = self.share_of_bands(m, itemsize) if distributed else m * m * itemsize
        self.require(need, "The kernel J J'")

    def share_of_bands(self, size: int, itemsize: int) -> int:
        """Bytes of this process for a matrix that is factored in bands."""
        return COPIES * itemsize * size * size // (self.ranks if size > UNTILED else 1)

    def require(self, size: int, what: str) -> None:
        """MemoryError, with the option to raise, where Legate's pool cannot hold ``size`` bytes."""
        option = "sysmem" if self.target.name == "CPU" else "fbmem"
        self._memory.require(size, option, what)

    def launch(self, job: Job, outputs: Sequence[Any] = ()) -> np.ndarray:
        """Run a job on every shard; each shard's number, array (shards,)."""
        threads = torch.get_num_threads()
        try:
            with quiet_transforms():
                status = self._chain.launch(job, job.placed.shards, job.inputs, outputs)
        finally:
            # A task sets its own thread's number, and with it that of threads still to come.
            torch.set_num_threads(threads)
        for column, what in ((1, "parameters"), (2, "data")):
            if not (status[:, column] == status[0, column]).all():
                raise RuntimeError(
                    f"The ranks of this run hold different {what}: give every rank the same model "
                    "and data (seed the generators, and the DataLoader's)."
                )
        self.traffic += job.sent
        self.traffic["numbers"] += 8 * self._tasks.STATUS * len(status)
        values: np.ndarray = status[:, 0]
        return values

    def run(
        self,
        work: Work,
        shards: int,
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
    ) -> np.ndarray:
        """Run a function of no network on every shard; each one's numbers, array (shards, 3)."""
        threads = torch.get_num_threads()
        try:
            status = self._chain.launch(_job(work), shards, inputs, outputs)
        finally:
            torch.set_num_threads(threads)
        self.traffic["numbers"] += 8 * self._tasks.STATUS * shards
        return status

    def submit(
        self, work: Work, shards: int, inputs: Sequence[Any] = (), outputs: Sequence[Any] = ()
    ) -> None:
        """Start the same, within `chained`: the next launch that is waited for reads it."""
        self._chain.add(_job(work), shards, inputs, outputs)

    @contextmanager
    def chained(self) -> Iterator[None]:
        """Launches of which only the last is waited for: that of `launch` or `run`."""
        with self._tasks.no_collection(), one_thread():
            yield

    def sent(self, x: Tensor | Stored) -> Weights:
        """Parameters x (n,) for tasks; within `chained`.

        Tasks on CPUs read them in the memory of their rank, which has them anyway: on two ranks of
        two cores a step took 1.1 s so, and 1.5 with a store. For GPUs they are written into one
        before the first launch at a point, each processor's tile from the memory of its rank, and
        travel from there. Those of two points are kept, an accepted one and its trial.
        """
        known = next((pair for pair in self._sent if pair[0] is x), None)
        if known is None:
            known = x, self._weights(x)
        others = [pair for pair in self._sent if pair[0] is not x]
        self._sent = [*others[-1:], known]
        return known[1]

    def _weights(self, x: Tensor | Stored) -> Weights:
        if isinstance(x, Stored):
            return Weights(x, x.fingerprint)
        self.traffic["parameters"] += x.nbytes
        return Weights(x if self.shared else self._written(x), self._mark(x))

    def stored(self, x: Tensor) -> Stored:
        """x (n,) in a store, its numbers with it."""
        self.traffic["parameters"] += x.nbytes
        with self.chained():
            return replace(combined(self, (1.0, self._written(x))), fingerprint=self._mark(x))

    def _mark(self, x: Tensor) -> float:
        return fingerprint(x) if self.ranks > 1 else 0.0

    def _written(self, x: Tensor) -> Stored:
        """x (n,) in a store."""
        if x.is_cuda:  # tasks have streams of their own
            torch.cuda.current_stream(x.device).synchronize()
        vector = self.vector(x.numel(), self.tile(x.numel()))

        def put(shard: Shard) -> Sequence[float]:
            out, first = view_of(shard.outputs[0]), shard.index * vector.tile
            out.copy_(x[first : first + len(out)])
            return ()

        self.submit(put, vector.count, (), (vector.tiles,))
        return vector

    def tile(self, size: int) -> int:
        """Size of the tiles of a vector, or of the bands of a matrix, of that size."""
        return -(-size // self.processors)

    def vector(self, size: int, tile: int) -> Stored:
        """A new vector, for a launch to write."""
        from legate.core import get_legate_runtime, types

        return Stored(get_legate_runtime().create_store(types.float64, (size,)), size, tile)

    def distributes(self, size: int) -> bool:
        """Whether a matrix (size, size) stays on the processors, to be solved there."""
        from lmsolve.legate import _cholesky

        return not self.in_process and _cholesky.pays(size)

    def bands(self, kind: str, size: int, tile: int, dtype: torch.dtype) -> Bands:
        """A matrix in bands of `tile` rows, one of each kind kept between launches."""
        made: Bands = self._kept(kind, (size, tile, dtype), lambda: Bands(self, size, tile, dtype))
        return made

    @contextmanager
    def overlapped(self) -> Iterator[Overlap]:
        """Launches that run while the caller goes on; all are done at the end."""
        with self._tasks.no_collection(), one_thread():
            overlap = Overlap(self._tasks, self.target)
            try:
                yield overlap
            finally:
                overlap.wait()

    def read(self, store: Any, kind: str) -> Tensor:
        """A store's values on the host, the same on every rank."""
        values = torch.from_numpy(self._tasks.read(store))
        self.traffic[kind] += values.nbytes
        return values

    def total(self, table: Any, kind: str) -> Tensor:
        """A table's sum over the shards on the host, the same on every rank."""
        self.traffic[kind] += table.nbytes_read
        return torch.from_numpy(table.total())


def _job(work: Work) -> Callable[[Shard], Sequence[float]]:
    """A function of no network as a job: in its task's stream, its numbers three."""

    def job(shard: Shard) -> Sequence[float]:
        with stream_of(shard.stream):
            numbers = [float(v) for v in work(shard)]
        return numbers + [0.0] * (3 - len(numbers))

    return job


class Overlap:
    """One launch under way at a time."""

    def __init__(self, tasks: Any, target: Any) -> None:
        self._tasks, self._target = tasks, target
        self._under_way: Any = None

    def launch(self, job: Any) -> None:
        """Start a job for every row of its table once the last one is done."""
        self.wait()
        table = job.table
        self._under_way = self._tasks.Launch(
            job, table.shards, self._target, (), table.outputs, beside=True
        )

    def wait(self) -> None:
        """Wait for the last one; raises its exception."""
        last, self._under_way = self._under_way, None
        if last is not None:
            last.wait()
