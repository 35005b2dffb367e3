"""Networks on Legate, in place: rows of J are computed where their samples are, and added up there.

At a trial each shard returns its part of the cost, one number. At an accepted point

    m >= n   each shard adds up J'J and J'r of its rows, and the shards' sums are summed;
    m < n    each shard makes its rows of K = J J', which needs no J but that of one parameter.

The host reads n^2 + n numbers, or m^2 + m, for an accepted step, and solves; J never leaves its
device and is never held. All ranks make the same launches with the same numbers: whatever decides
(memory, the way of differentiating, a clock) is agreed on first.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lmsolve.legate._start import start

from ._jacobian import Plan, Point, choose
from ._network import Batch, Network
from ._params import quiet_transforms
from ._problem import COARSE, Evaluation, NetworkProblem, Settings, accumulator
from ._shards import (
    CostJob,
    CoupledSumsJob,
    CurvatureJob,
    Job,
    KernelJob,
    Placed,
    ProductJob,
    RowsJob,
    SumsJob,
    TransposedJob,
    checksum,
)
from ._subproblems import (
    Linearised,
    Products,
    TallSubproblem,
    WideSubproblem,
    factorized,
    solved,
)

WAYS = ("factors", "vmap", "graph")
#: What passes between the host and Legate's tasks; see `Cluster`.
TRAFFIC = ("jacobian", "matrix", "residuals", "vectors", "samples", "numbers")
# What copy.deepcopy raises for objects that cannot be copied.
_COPY_ERRORS = (TypeError, RuntimeError, AttributeError, NotImplementedError, pickle.PicklingError)


class Cluster:
    """Legate as a session sees it: its processors, its stores, and what the ranks agree on.

    `traffic` counts the bytes between this host and Legate's tasks, by what they are: `jacobian`
    (rows of J), `matrix` (J'J with J'r, or J J'), `residuals` (m numbers), `vectors` (n), `samples`
    (a batch on its way to devices), `numbers` (one or a few of each shard). What goes to every task
    counts once.
    """

    def __init__(self, network: Network, devices: Sequence[torch.device] | None = None) -> None:
        _check_copy(network)
        start()
        from legate.core import TaskTarget, get_legate_runtime

        from lmsolve.legate import _memory, _tasks

        self._tasks, self._memory = _tasks, _memory
        self.ranks = int(get_legate_runtime().node_count)
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
        self.traffic: Counter[str] = Counter()
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
        return replace(
            plan,
            way=WAYS[code // 2],
            batched=bool(code % 2),
            samples=samples,
            activation_bytes=activation,
        )

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
            self.require(size * (2 * self.local + 2), what)

    def require(self, size: int, what: str) -> None:
        """MemoryError, with the option to raise, where Legate's pool cannot hold ``size`` bytes."""
        option = "sysmem" if self.target.name == "CPU" else "fbmem"
        self._memory.require(size, option, what)

    def launch(self, job: Job, outputs: Sequence[Any] = ()) -> np.ndarray:
        """Run a job on every shard; each shard's number, array (shards,)."""
        threads = torch.get_num_threads()
        try:
            with quiet_transforms():
                status = self._tasks.launch(job, job.placed.shards, self.target, (), outputs)
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

    @contextmanager
    def overlapped(self) -> Iterator[Overlap]:
        """Launches that run while the caller goes on; all are done at the end."""
        with self._tasks.no_collection():
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


class Overlap:
    """One launch under way at a time."""

    def __init__(self, tasks: Any, target: Any) -> None:
        self._tasks, self._target = tasks, target
        self._under_way: Any = None

    def launch(self, job: Any) -> None:
        """Start a job for every row of its table once the last one is done."""
        self.wait()
        table = job.table
        self._under_way = self._tasks.Launch(job, table.shards, self._target, (), table.outputs)

    def wait(self) -> None:
        """Wait for the last one; raises its exception."""
        last, self._under_way = self._under_way, None
        if last is not None:
            last.wait()


def gpus_of_legate() -> int:
    """Number of GPUs of each process of Legate, which has started."""
    from legate.core import TaskTarget, get_legate_runtime

    runtime = get_legate_runtime()
    return int(runtime.get_machine().count(TaskTarget.GPU)) // int(runtime.node_count)


def _check_copy(network: Network) -> None:
    """TypeError where a model cannot be copied."""
    try:
        copy.deepcopy(network.module)
    except _COPY_ERRORS as error:
        raise TypeError(
            "`model` must allow copy.deepcopy, for every thread of Legate computes with a copy of "
            f"its own: {error}. Keep locks, files and tensors with a graph out of the module, or "
            "use `linalg='torch'`."
        ) from error


def check_processors(processors: int, gpus: int, device: torch.device) -> None:
    """RuntimeError where Legate's processors are none that torch can compute on."""
    if not processors:
        raise RuntimeError(
            "Legate has no processor for the model: start with --cpus 1 or more, or with --gpus."
        )
    if gpus and not torch.cuda.is_available():
        raise RuntimeError(
            f"Legate holds {gpus} GPUs, but this torch has no CUDA: install a CUDA build of "
            "torch, or start Legate with --cpus N --gpus 0."
        )
    if not gpus and device.type != "cpu":
        raise RuntimeError(
            f"`model` is on {device}, and Legate holds no GPU: start with --gpus 1 or more, or "
            "move the model with `model.cpu()`."
        )


def check_split(ranks: int, held: int, devices: Sequence[torch.device]) -> None:
    """ValueError where torch's devices and Legate's cannot be kept apart."""
    if ranks > 1:
        raise ValueError(
            f"`linalg='legate-split'` runs in one process, got {ranks} ranks: use "
            "`linalg='legate'`, which runs on any number."
        )
    for device in devices:
        if device.type == "cuda" and (device.index or 0) < held:
            raise ValueError(
                f"`devices` must leave out the {held} GPUs that Legate holds, got {device}: start "
                "Legate with fewer --gpus, name devices of lmsolve.torch.available_gpus(), or use "
                "`linalg='legate'`, which shares them."
            )


class LegateProblem(NetworkProblem):
    """`NetworkProblem` with its rows on Legate's processors."""

    def __init__(
        self, network: Network, batch: Batch, plan: Plan, settings: Settings, cluster: Cluster
    ) -> None:
        super().__init__(network, batch, plan, settings)
        self.cluster = cluster
        self.placed = Placed(network, batch, cluster.processors, cluster.traffic)
        if cluster.ranks > 1:
            tensors = pytree.tree_leaves((batch.inputs, batch.targets, batch.weights))
            arrays = [a.cpu().numpy() for a in tensors if isinstance(a, Tensor)]
            self.placed.checksum = checksum(*arrays)

    def linearize(self, x: Tensor, r: Evaluation, damping: float = 0.0) -> Linearised:
        """Subproblem at x (n,); MemoryError where Legate's pool is too small for it."""
        n, m, form = self.network.parameters.n, self.m, self.form()
        if form == "normal":
            self.cluster.require_sums(n)
        elif form == "dual":
            size = m * m * accumulator(self.network, m).itemsize
            self.cluster.require(size, "The kernel J J'")
        return super().linearize(x, r, damping)

    def _evaluate(self, x: Tensor) -> Evaluation:
        if self.plan.coupled:
            return super()._evaluate(x)
        costs = self.launch(CostJob, x)
        decay = 0.5 * self.settings.decay * x.to(torch.float64).square().sum()
        return Evaluation(decay + float(costs.sum()), None)

    def _normal(self, x: Tensor, passes: Any, damping: float = 0.0) -> TallSubproblem:
        network, n = self.network, self.network.parameters.n
        table = self.cluster.table("sums", self.placed.shards, n * n + n)
        coarse = network.parameters.dtype if damping > COARSE else None
        job = CoupledSumsJob if self.plan.coupled else SumsJob
        self.launch(job, x, coarse, table=table)
        sums = self.cluster.total(table, "matrix").to(x.device)
        gram, grad = sums[: n * n].view(n, n), sums[n * n :]
        if self.plan.coupled:
            r = self._rows(self._point(x)).to(x.dtype)
            products, slope = self._products(x), self._slope(x, r)
            return TallSubproblem(gram, grad, x, r, products, self.settings.decay, slope)
        bent = self.settings.acceleration and network.objective.exact
        curved = self._curved(x) if bent else None
        return ShardedTallSubproblem(gram, grad, x, self._products(x), self.settings.decay, curved)

    def _dual(self, x: Tensor, passes: Any) -> WideSubproblem:
        if self.plan.coupled:
            return super()._dual(x, None)
        m, k, tile = self.m, self.plan.k, self.placed.tile
        store = self.cluster.store("kernel", (m, m), accumulator(self.network, m))
        self.launch(
            KernelJob, x, self._groups(), outputs=(store.partition_by_tiling((tile * k, m)),)
        )
        kernel = self.cluster.read(store, "matrix").to(x.device)
        r = self._rows(self._point(x)).to(x.dtype)
        products, decay = self._products(x), self.settings.decay
        return WideSubproblem(kernel, x, r, products, decay, self._slope(x, r))

    def _products(self, x: Tensor) -> Products:
        return super()._products(x) if self.plan.coupled else ShardedProducts(self, x)

    def _rows(self, point: Point) -> Tensor:
        if self.plan.coupled:
            return super()._rows(point)
        x = torch.cat([t.reshape(-1) for t in point.tensors.values()])
        return self.written(RowsJob, x)

    def _curved(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda p: self._retry(lambda: self.added(CurvatureJob, x, p))

    def added(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """Sum (n,) of a job's vectors over the shards."""
        table = self.cluster.table("vector", self.placed.shards, self.network.parameters.n)
        self.launch(job, x, *arguments, table=table)
        return self.cluster.total(table, "vectors").to(x.device)

    def written(self, job: type[Job], x: Tensor, *arguments: Any) -> Tensor:
        """The shards' rows (m,) of a job."""
        store = self.cluster.store("rows", (self.m,), torch.float64)
        tiles = store.partition_by_tiling((self.placed.tile * self.plan.k,))
        self.launch(job, x, *arguments, outputs=(tiles,))
        return self.cluster.read(store, "residuals").to(x.device)

    def launch(
        self,
        job: type[Job],
        x: Tensor,
        *arguments: Any,
        table: Any = None,
        outputs: Sequence[Any] = (),
    ) -> np.ndarray:
        """Run a job of this batch at x; each shard's number."""
        made = job(self.placed, x, self.plan, self.settings, *arguments)
        made.table = table
        return self.cluster.launch(made, outputs if table is None else table.outputs)


class ShardedProducts:
    """Products with rows that lie in shards: one launch each."""

    def __init__(self, problem: LegateProblem, x: Tensor) -> None:
        self._problem, self._x = problem, x

    def transposed(self, z: Tensor) -> Tensor:
        """J'z (n,)."""
        return self._problem.added(TransposedJob, self._x, z).to(z.dtype)

    def product(self, p: Tensor) -> Tensor:
        """J p (m,)."""
        return self._problem.written(ProductJob, self._x, p).to(p.dtype)


class ShardedTallSubproblem(TallSubproblem):
    """Normal equations whose geodesic acceleration is added up in the shards too.

    Legate factors a large matrix where that pays.
    """

    def __init__(
        self,
        gram: Tensor,
        grad: Tensor,
        x: Tensor,
        products: Products,
        decay: float,
        curved: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__(gram, grad, x, x.new_empty(0), products, decay, None)
        self._curved = curved

    def solve(self, damping: float) -> Tensor:
        """Step p (n,)."""
        self._factor = None  # before the next factor takes its memory
        self._factor = self._factored(damping)
        return -solved(self._factor, self.grad)

    def _factored(self, damping: float) -> Tensor:
        from lmsolve.legate import _cholesky

        if _cholesky.pays(self.gram.shape[0]):
            A = self.gram.clone()
            A.diagonal().add_(damping)
            made = _cholesky.LegateCholesky(A.cpu().numpy())
            if made.reproduces(A.cpu().numpy()):
                return torch.from_numpy(made.factor).to(self.gram.device)
        return factorized(self.gram, damping)

    def acceleration(self, p: Tensor) -> Tensor | None:
        """Geodesic acceleration (n,) of the last step."""
        if self._curved is None:
            return None
        assert self._factor is not None
        return -0.5 * solved(self._factor, self._curved(p).to(p.dtype))
