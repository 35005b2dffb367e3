"""Python functions as Legate tasks, one per row shard. Import this only after Legate has started.

A job is a Python callable; ``launch`` runs it once per shard, on the processor that holds the
shard, and waits. Every rank makes the same launches in the same order, so a job is passed by a
number into a table that every rank fills alike, and anything that every rank holds (the
parameters, host arrays) reaches its own tasks through the job itself, at no cost.

An exception that leaves a task aborts the process. So a job's exception is caught, counted in
the status of its shard, and raised from ``launch``, on every rank. Each shard has its own row of
the status array, and of a `Table` of sums, instead of one Legate reduction for all. Reductions of
one element may differ between ranks in the last bit, and ranks that then branch differently wait
for each other for ever; and two tasks that reduce into one store leave their instances in the
pool until it is full, where Legate 26.6.1 has stopped for good in 2 of 3 runs (n = 1000, 2 CPUs).
"""

from __future__ import annotations

import builtins
import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from legate.core import (
    Library,
    LogicalStore,
    LogicalStorePartition,
    PhysicalStore,
    ResourceConfig,
    TaskContext,
    TaskInfo,
    TaskTarget,
    VariantCode,
    get_legate_runtime,
    types,
)

from lmsolve._threads import one_thread

#: Width of a shard's status: whether it failed, and what the job returned.
STATUS = 4
#: A table of at most so many bytes is read whole and added up on the host.
SMALL_TABLE = 2**24
#: Bytes of an exception's text that travel between ranks.
TEXT = 8192


@dataclass(frozen=True)
class Shard:
    """What a job sees: its index, and views of its part of the stores."""

    index: int
    inputs: tuple[PhysicalStore, ...]
    outputs: tuple[PhysicalStore, ...]
    stream: int | None  # the CUDA stream of a GPU task


Job = Callable[[Shard], Sequence[float]]
Part: TypeAlias = LogicalStore | LogicalStorePartition

_numbers = itertools.count()
_jobs: dict[int, Job] = {}
_failures: dict[tuple[int, int], Exception] = {}


def launch(
    job: Job,
    shards: int,
    target: TaskTarget,
    inputs: Sequence[Part] = (),
    outputs: Sequence[LogicalStorePartition] = (),
) -> np.ndarray:
    """Run a job on every shard and wait; what it returned, array (shards, STATUS - 1).

    An exception of the job is raised here on every rank: the first failed shard's.
    """
    with no_collection(), one_thread():
        return Launch(job, shards, target, inputs, outputs).wait()


class Launch:
    """A launch under way; `wait` comes before the next one, and all within `no_collection`.

    With `beside` the caller goes on at once. Otherwise the status has a store that is kept, and
    Legate, which still has it mapped from the last reading, holds the caller until the job is done.
    """

    def __init__(
        self,
        job: Job,
        shards: int,
        target: TaskTarget,
        inputs: Sequence[Part] = (),
        outputs: Sequence[LogicalStorePartition] = (),
        beside: bool = False,
    ) -> None:
        self._number = next(_numbers)
        self._shards, self._target = shards, target
        _jobs[self._number] = job
        rows = _new_rows(shards, STATUS) if beside else _row_store(shards, STATUS)
        self._rows = _submit(_RUN, self._number, target, rows, inputs, outputs)

    def wait(self) -> np.ndarray:
        """What the job returned, array (shards, STATUS - 1), or its exception."""
        try:
            status = read(self._rows)
            if status[:, 0].any():
                rows = _row_store(self._shards, TEXT)
                texts = read(_submit(_TELL, self._number, self._target, rows))
                _raise_first(self._number, texts)
        finally:
            _forget(self._number)
        return status[:, 1:]

    def finish(self) -> list[Exception]:
        """Wait without reading anything; exceptions of this rank's own shards."""
        get_legate_runtime().issue_execution_fence(block=True)
        return _forget(self._number)


class Chain:
    """Launches that feed each other, of which only the last is waited for.

    A launch that nobody waits for costs two ranks half the time. An exception of an earlier one is
    raised by the last, which reads what it wrote; all go within `no_collection`.
    """

    def __init__(self, target: TaskTarget) -> None:
        self._target = target
        self._numbers: list[int] = []

    def add(
        self,
        job: Job,
        shards: int,
        inputs: Sequence[Part] = (),
        outputs: Sequence[LogicalStorePartition] = (),
    ) -> None:
        """Start a job; what it returns is lost."""
        self._numbers.append(next(_numbers))
        _jobs[self._numbers[-1]] = job
        _submit(_RUN, self._numbers[-1], self._target, _unread_store(shards), inputs, outputs)

    def launch(
        self,
        job: Job,
        shards: int,
        inputs: Sequence[Part] = (),
        outputs: Sequence[LogicalStorePartition] = (),
    ) -> np.ndarray:
        """The last one, as `launch` is."""
        numbers, self._numbers = self._numbers, []

        def last(shard: Shard) -> Sequence[float]:
            for (number, _), failure in list(_failures.items()):
                if number in numbers:
                    raise failure
            return job(shard)

        try:
            return launch(last if numbers else job, shards, self._target, inputs, outputs)
        finally:
            for number in numbers:
                _forget(number)


def _forget(number: int) -> list[Exception]:
    """Drop a job that is done; exceptions of this rank's own shards."""
    del _jobs[number]
    own = sorted(key for key in _failures if key[0] == number)
    return [_failures.pop(key) for key in own]


def processors(target: TaskTarget) -> int:
    """Number of processors of a kind, over all ranks."""
    return int(get_legate_runtime().get_machine().count(target))


def host_view(store: PhysicalStore) -> np.ndarray:
    """The memory of a store of a CPU task as an array."""
    return np.asarray(store)


def read(store: LogicalStore) -> np.ndarray:
    """A host copy of a whole store, equal on every rank; waits for it."""
    return np.array(np.asarray(store.get_physical_store()))


def store_of(array: Any) -> LogicalStore:
    """The store of a cuPyNumeric array, on every call the same one."""
    return next(iter(array.__legate_data_interface__["data"].values())).data


class Table:
    """One row of numbers for each shard, in a store that is kept, and their sum."""

    def __init__(self, shards: int, size: int, target: TaskTarget) -> None:
        runtime = get_legate_runtime()
        self.shards, self.size, self.target = shards, size, target
        self._store = runtime.create_store(types.float64, (shards, size))
        self._total = runtime.create_store(types.float64, (size,))

    @property
    def rows(self) -> LogicalStorePartition:
        """The rows, as an output of `launch`."""
        return self._store.partition_by_tiling((1, self.size))

    @property
    def outputs(self) -> tuple[LogicalStorePartition, ...]:
        """What a job that writes into `row` is to be launched with."""
        return (self.rows,)

    def row(self, shard: Shard) -> Any:
        """Where a shard writes its row (1, size)."""
        return shard.outputs[0]

    def read(self) -> np.ndarray:
        """A host copy (shards, size), equal on every rank."""
        return read(self._store)

    def columns(self, lo: int, hi: int) -> LogicalStore:
        """Some columns (shards, hi - lo)."""
        return self._store.slice(1, slice(lo, hi))

    @property
    def nbytes_read(self) -> int:
        """Bytes that `total` brings to the host."""
        return 8 * self.size * (self.shards if self._is_small else 1)

    @property
    def _is_small(self) -> bool:
        return self.shards == 1 or 8 * self.shards * self.size <= SMALL_TABLE

    def total(self) -> np.ndarray:
        """The sum over the shards (size,), always in the same order; equal on every rank."""
        if self._is_small:
            return np.sum(self.read(), axis=0)
        tile = -(-self.size // self.shards)
        launch(
            _sum_columns,
            -(-self.size // tile),
            self.target,
            (self._store.partition_by_tiling((self.shards, tile)),),
            (self._total.partition_by_tiling((tile,)),),
        )
        return read(self._total)


class HostRows:
    """The same on a single rank, in the memory of the process instead of Legate's pool.

    Legate would keep a second copy of a table that is read, and could not tell that it has no room.
    """

    outputs: tuple[LogicalStorePartition, ...] = ()

    def __init__(self, shards: int, size: int) -> None:
        self.shards, self.size = shards, size
        self.nbytes_read = 8 * shards * size  # by `total`
        self._rows = [np.empty((1, size)) for _ in range(shards)]

    def row(self, shard: Shard) -> np.ndarray:
        """Where a shard writes its row (1, size)."""
        return self._rows[shard.index]

    def read(self) -> np.ndarray:
        """The rows (shards, size)."""
        return np.concatenate(self._rows)

    def total(self) -> np.ndarray:
        """The sum over the shards (size,), in the first row."""
        first, *others = self._rows
        for row in others:
            first += row
        return first[0]


def _sum_columns(shard: Shard) -> Sequence[float]:
    """Job that adds up some columns of a table."""
    (columns,), (out,) = shard.inputs, shard.outputs
    if shard.stream is None:
        np.sum(host_view(columns), axis=0, out=host_view(out))
    else:
        import torch

        own = torch.cuda.ExternalStream(shard.stream)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(own):
            source = torch.utils.dlpack.from_dlpack(columns)
            torch.utils.dlpack.from_dlpack(out).copy_(source.sum(dim=0))
    return (0.0,) * (STATUS - 1)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: in a task's thread it may free a store, which aborts the process.

    Stores get into cycles with the traceback of any exception that passed by them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _submit(
    local_id: int,
    number: int,
    target: TaskTarget,
    rows: LogicalStore,
    inputs: Sequence[Part] = (),
    outputs: Sequence[LogicalStorePartition] = (),
) -> LogicalStore:
    """Launch one of the two tasks; its first output, one row (width,) per shard."""
    runtime = get_legate_runtime()
    shards, width = rows.shape
    with runtime.get_machine().only(target):
        task = runtime.create_manual_task(_library(), local_id, (shards,))
        task.add_output(rows.partition_by_tiling((1, width)))
        for part in outputs:
            task.add_output(part)
        for part in inputs:
            task.add_input(part)
        task.add_scalar_arg(number, types.int64)
        task.execute()
    return rows


def _run(context: TaskContext) -> None:
    """Body of the task that runs a job."""
    stores = [array.data() for array in context.outputs]
    (index,) = context.task_index
    shard = Shard(
        index=index,
        inputs=tuple(array.data() for array in context.inputs),
        outputs=tuple(stores[1:]),
        stream=context.task_stream,
    )
    number = context.scalars[0].value()
    status = np.zeros((1, STATUS))
    try:
        status[0, 1:] = _jobs[number](shard)
    except Exception as failure:  # noqa: BLE001  one that leaves the task aborts the process
        _failures[number, index] = failure
        status[0, 0] = 1.0
    write(stores[0], status, context.task_stream)


def _tell(context: TaskContext) -> None:
    """Body of the task that writes what a failed job raised, as text in JSON."""
    (index,) = context.task_index
    failure = _failures.get((context.scalars[0].value(), index))
    text = b"" if failure is None else _encode(failure)
    row = np.zeros((1, TEXT), dtype=np.uint8)
    row[0, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    write(context.outputs[0].data(), row, context.task_stream)


def write(store: PhysicalStore, values: np.ndarray, stream: int | None) -> None:
    """Fill a store, in a GPU's memory where the task runs on one."""
    if stream is None:
        host_view(store)[...] = values
        return
    import torch

    own = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(own):
        torch.utils.dlpack.from_dlpack(store).copy_(torch.from_numpy(values))


def _encode(failure: Exception) -> bytes:
    """Kind, text and traceback of an exception, cut to what travels."""
    kind = type(failure)
    # str() of a KeyError is the repr of its message.
    message = failure.args[0] if failure.args and isinstance(failure.args[0], str) else str(failure)
    trace = "".join(traceback.format_exception(failure))
    for keep in (TEXT // 2, TEXT // 8, TEXT // 16):
        # The end of a traceback is what one reads first.
        fields = [kind.__module__, kind.__qualname__, message[:keep], trace[len(trace) - keep :]]
        text = json.dumps(fields).encode()
        if len(text) <= TEXT:
            return text
    return json.dumps(["builtins", "RuntimeError", "", ""]).encode()


def _raise_first(number: int, texts: np.ndarray) -> None:
    """Raise the exception of the first failed shard: the object itself where it was raised."""
    for index, row in enumerate(texts):
        text = row.tobytes().rstrip(b"\0")
        if text:
            raise _failures.get((number, index)) or _decode(text)


def _decode(text: bytes) -> Exception:
    """An exception of another rank, of its own kind if this rank can make one of that kind."""
    module, name, message, trace = json.loads(text)
    kind = getattr(sys.modules.get(module, builtins), name, None)
    failure: Exception = RuntimeError(f"{name}: {message}")
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # where the exception asks for other arguments
            failure = kind(message)
    failure.add_note(f"Raised on another rank:\n{trace}")
    return failure


@cache
def _row_store(shards: int, width: int) -> LogicalStore:
    """A store of one row per shard, kept: a new one per launch took two ranks twice the time."""
    return _new_rows(shards, width)


@cache
def _unread_store(shards: int) -> LogicalStore:
    """A store for statuses that nobody reads: one that is mapped would hold the caller."""
    return _new_rows(shards, STATUS)


def _new_rows(shards: int, width: int) -> LogicalStore:
    """A store of one row per shard."""
    dtype = types.float64 if width == STATUS else types.uint8
    return get_legate_runtime().create_store(dtype, (shards, width))


_RUN, _TELL = 0, 1


@cache
def _library() -> Library:
    """Our library of tasks, registered on first use: Legate never forgets a task."""
    resources = ResourceConfig()
    resources.max_tasks = resources.max_dyn_tasks = 2
    library, _ = get_legate_runtime().find_or_create_library("lmsolve", config=resources)
    for name, body in (("job", _run), ("tell", _tell)):
        variants = [(VariantCode.CPU, body), (VariantCode.GPU, body)]
        library.register_task(TaskInfo.from_variants(library.get_new_task_id(), name, variants))
    return library
