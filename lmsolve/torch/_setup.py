"""What can be wrong with the set-up of a run on Legate, each told with its remedy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ._network import Network

if TYPE_CHECKING:
    from lmsolve.legate._tasks import Shard

#: Bytes that torch takes of a GPU for itself, workspaces and modules of its libraries: an estimate.
CONTEXT = 512 << 20
# What copy.deepcopy raises for objects that cannot be copied.
_COPY_ERRORS = (TypeError, RuntimeError, AttributeError, NotImplementedError, pickle.PicklingError)


def gpus_of_legate() -> int:
    """Number of GPUs of each process of Legate, which has started."""
    from legate.core import TaskTarget, get_legate_runtime

    runtime = get_legate_runtime()
    return int(runtime.get_machine().count(TaskTarget.GPU)) // int(runtime.node_count)


def check_copy(network: Network) -> None:
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


def check_launched(ranks: int, environment: Mapping[str, str]) -> None:
    """RuntimeError where a launcher started several processes, and Legate runs alone in each."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE"):
        started = environment.get(name, "1")
        if ranks == 1 and started.isdecimal() and int(started) > 1:
            raise RuntimeError(
                f"{started} processes were started ({name}), and Legate runs alone in each: every "
                "one would train by itself. Start with `legate --launcher mpirun --nodes N "
                "script.py`, on a build of Legate that has networking."
            )


def check_torch_memory(free: int, need: int, pool: int | None) -> None:
    """MemoryError where a GPU has fewer free bytes than torch needs beside Legate's pool."""
    if free >= need:
        return
    less = "less than it holds now"
    if pool is not None:
        less = f"{max(0, pool - (need - free)) >> 20} or less; it has {pool >> 20} now"
    raise MemoryError(
        f"torch needs about {need / 1e9:.1f} GB of a GPU beside Legate's pool, and "
        f"{free / 1e9:.1f} GB are free: start Legate with --fbmem {less}."
    )


def free_gpu_bytes(shard: Shard) -> tuple[float]:
    """Bytes that torch may still take on the GPU of a task, those that it keeps for itself too."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return (float(torch.cuda.mem_get_info()[0] + kept),)


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
