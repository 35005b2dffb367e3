"""Python functions as Legate tasks, one per row shard. Import this only after Legate has started.

A job is a Python callable; ``launch`` runs it once per shard, on the processor that holds the
shard, and waits. Every rank makes the same launches in the same order, so a job is passed by a
number into a table that every rank fills alike, and anything that every rank holds (the
parameters, host arrays) reaches its own tasks through the job itself, at no cost.

An exception that leaves a task aborts the process. So a job's exception is caught, counted in
the status of its shard, and raised from ``launch``, on every rank. Each shard has its own row of
the status array, and of a table of sums, instead of one Legate reduction for all. Reductions of
one element may differ between ranks in the last bit, and ranks that then branch differently wait
for each other for ever; and two tasks that reduce into one store leave their instances in the
pool until it is full, where Legate 26.6.1 has stopped for good in 2 of 3 runs (n = 1000, 2 CPUs).
"""

from __future__ import annotations

import builtins
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
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

#: Width of a shard's status: whether it failed, and what the job returned.
STATUS = 4
#: Bytes of an exception's text that travel between ranks.
TEXT = 8192


@dataclass(frozen=True)
class Shard:
    """What a job sees: its index, and views of its part of the stores."""

    index: int
    inputs: tuple[PhysicalStore, ...]
    outputs: tuple[PhysicalStore, ...]
    sums: tuple[Any, ...]  # arrays (size,) in the memory of the task: add to these
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
    sums: Sequence[LogicalStore] = (),
) -> np.ndarray:
    """Run a job on every shard and wait; what it returned, array (shards, STATUS - 1).

    ``sums``, stores (size,), start at zero and are added up over the shards. An exception of the
    job is raised here on every rank: the first failed shard's.
    """
    number = next(_numbers)
    _jobs[number] = job
    try:
        status = _submit(_RUN, number, shards, target, STATUS, inputs, outputs, sums)
        if status[:, 0].any():
            texts = _submit(_TELL, number, shards, target, TEXT)
            _raise_first(number, texts)
        if shards > 1:
            _add_up(shards, target, sums)
    finally:
        del _jobs[number]
        for key in [key for key in _failures if key[0] == number]:
            del _failures[key]
    return status[:, 1:]


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


@cache
def _table(shards: int, size: int, dtype: Any) -> LogicalStore:
    """A store of one row (size,) for each shard, kept."""
    return get_legate_runtime().create_store(dtype, (shards, size))


def _add_up(shards: int, target: TaskTarget, sums: Sequence[LogicalStore]) -> None:
    """Fill the sums from their tables: each task adds up some columns, always in one order."""
    for store in sums:
        (size,) = store.extents
        tile = -(-size // shards)
        launch(
            _sum_columns,
            -(-size // tile),
            target,
            (_table(shards, size, store.type).partition_by_tiling((shards, tile)),),
            (store.partition_by_tiling((tile,)),),
        )


def _sum_columns(shard: Shard) -> Sequence[float]:
    """Job that adds up some columns of a table."""
    (columns,), (out,) = shard.inputs, shard.outputs
    if shard.stream is None:
        np.sum(host_view(columns), axis=0, out=host_view(out))
    else:
        with _on(shard.stream):
            _device_view(out).copy_(_device_view(columns).sum(dim=0))
    return (0.0,) * (STATUS - 1)


def _zeroed(store: PhysicalStore, stream: int | None) -> Any:
    """A shard's own sum (size,), zero: a view of host memory, or a tensor on the GPU."""
    if stream is None:
        row = host_view(store)
        row[...] = 0
    else:
        with _on(stream):
            row = _device_view(store).zero_()
    return row[0] if row.ndim == 2 else row


def _device_view(store: PhysicalStore) -> Any:
    """The memory of a store of a GPU task as a tensor."""
    import torch

    return torch.utils.dlpack.from_dlpack(store)


def _on(stream: int) -> AbstractContextManager[Any]:
    """torch computes on the stream of a task."""
    import torch

    own = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
    context: AbstractContextManager[Any] = torch.cuda.stream(own)
    return context


def _submit(
    local_id: int,
    number: int,
    shards: int,
    target: TaskTarget,
    width: int,
    inputs: Sequence[Part] = (),
    outputs: Sequence[LogicalStorePartition] = (),
    sums: Sequence[LogicalStore] = (),
) -> np.ndarray:
    """Launch one of the two tasks; its first output, one row (width,) per shard."""
    runtime = get_legate_runtime()
    rows = _row_store(shards, width)
    with runtime.get_machine().only(target):
        task = runtime.create_manual_task(_library(), local_id, (shards,))
        task.add_output(rows.partition_by_tiling((1, width)))
        for store in sums:
            task.add_output(_parts(store, shards))
        for part in outputs:
            task.add_output(part)
        for part in inputs:
            task.add_input(part)
        task.add_scalar_arg(number, types.int64)
        task.add_scalar_arg(len(sums), types.int64)
        task.execute()
    return read(rows)


def _parts(store: LogicalStore, shards: int) -> LogicalStorePartition:
    """Where each shard makes its own sum: rows of a table, or the store itself for one shard."""
    (size,) = store.extents
    if shards == 1:
        return store.partition_by_tiling((size,))
    return _table(shards, size, store.type).partition_by_tiling((1, size))


def _run(context: TaskContext) -> None:
    """Body of the task that runs a job."""
    stores = [array.data() for array in context.outputs]
    (index,) = context.task_index
    number, count = (scalar.value() for scalar in context.scalars)
    status = np.zeros((1, STATUS))
    try:
        shard = Shard(
            index=index,
            inputs=tuple(array.data() for array in context.inputs),
            outputs=tuple(stores[1 + count :]),
            sums=tuple(_zeroed(store, context.task_stream) for store in stores[1 : 1 + count]),
            stream=context.task_stream,
        )
        status[0, 1:] = _jobs[number](shard)
    except Exception as failure:  # noqa: BLE001  one that leaves the task aborts the process
        _failures[number, index] = failure
        status[0, 0] = 1.0
    _write(stores[0], status, context.task_stream)


def _tell(context: TaskContext) -> None:
    """Body of the task that writes what a failed job raised, as text in JSON."""
    (index,) = context.task_index
    failure = _failures.get((context.scalars[0].value(), index))
    text = b"" if failure is None else _encode(failure)
    row = np.zeros((1, TEXT), dtype=np.uint8)
    row[0, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    _write(context.outputs[0].data(), row, context.task_stream)


def _write(store: PhysicalStore, values: np.ndarray, stream: int | None) -> None:
    """Fill a store, in a GPU's memory where the task runs on one."""
    if stream is None:
        host_view(store)[...] = values
        return
    import torch

    with _on(stream):
        _device_view(store).copy_(torch.from_numpy(values))


def _encode(failure: Exception) -> bytes:
    """Kind, text and traceback of an exception, cut to what travels."""
    kind = type(failure)
    # str() of a KeyError is the repr of its message.
    message = failure.args[0] if failure.args and isinstance(failure.args[0], str) else str(failure)
    trace = "".join(traceback.format_exception(failure))
    for keep in (TEXT // 2, TEXT // 8, 0):
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
