"""What Legate needs of this machine, and a polite start of it.

Importing cuPyNumeric starts Legate, and a start that fails can't be tried again in the same
process. So everything it needs is looked at first, which takes about 30 ms. The import itself
seeds the generators of NumPy and ``random`` anew, wraps their ``seed``, and takes the signals
over in C so that Ctrl-C ends the process: ``start`` puts all of that back.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from lmsolve import _xp

#: An unlimited product cache keeps ``J.T @ J`` from scattering J over the processors: for a
#: 160 MB J on two CPUs 18 ms instead of 43, and 5 MB more memory instead of 154.
MATMUL_CACHE = ("CUPYNUMERIC_MATMUL_CACHE_SIZE", "1000000000000")

CPU_CONFIG = '"--cpus 2 --gpus 0 --sysmem 8000"'


@dataclass(frozen=True)
class Machine:
    """What was found of the parts that Legate needs."""

    system: str
    cupynumeric: str | None  # its version
    networks: tuple[str, ...]  # what the wheel of Legate can talk to other processes over
    libcuda: bool
    gpus: tuple[str, ...]  # names of the devices
    cuda_status: int | None  # what cuInit returned: 0 is well, 100 no device
    config: str | None  # LEGATE_CONFIG
    auto_config: bool  # LEGATE_AUTO_CONFIG
    mpirun: str | None


def inspect_machine() -> Machine:
    """Look at this machine without starting anything."""
    libcuda, status, gpus = _cuda()
    return Machine(
        system=platform.system(),
        cupynumeric=_version("nvidia-cupynumeric", "cupynumeric"),
        networks=_networks(),
        libcuda=libcuda,
        gpus=gpus,
        cuda_status=status,
        config=os.environ.get("LEGATE_CONFIG"),
        auto_config=os.environ.get("LEGATE_AUTO_CONFIG") != "0",
        mpirun=shutil.which("mpirun"),
    )


def obstacle(machine: Machine) -> ImportError | RuntimeError | None:
    """What keeps Legate from starting, with the remedy in its text; None if nothing does."""
    if machine.cupynumeric is None:
        where = (
            ""
            if machine.system == "Linux"
            else f" Its wheels are for Linux, not for {machine.system}."
        )
        return ImportError(
            "cuPyNumeric is not installed: `pip install lmsolve[legate]` (about 2 GB)." + where
        )
    if not machine.libcuda:
        return ImportError(
            "libcuda.so.1 is missing, which cuPyNumeric loads even on a machine without a GPU: "
            "install NVIDIA's driver, or unpack Debian's package libcuda1 (non-free) and put its "
            "folder on LD_LIBRARY_PATH."
        )
    if machine.gpus or _asks_for_no_gpu(machine):
        return None
    if machine.cuda_status not in (0, 100):
        return RuntimeError(
            f"The CUDA driver does not start (cuInit returned {machine.cuda_status}). Mend it, or "
            f"run on CPUs only: set LEGATE_CONFIG={CPU_CONFIG} before Python starts."
        )
    return RuntimeError(
        "Legate finds no GPU here and would fail to start, for good in this process: set "
        f"LEGATE_CONFIG={CPU_CONFIG} before the first call, or launch with "
        "`legate --cpus 2 --gpus 0 script.py`."
    )


def _asks_for_no_gpu(machine: Machine) -> bool:
    """Whether the configuration keeps Legate from looking for GPUs."""
    asked = re.search(r"--gpus[ =](\d+)", machine.config or "")
    if asked:
        return asked.group(1) == "0"
    return not machine.auto_config


def check_startable() -> None:
    """Raise ImportError or RuntimeError, with the remedy, where Legate would fail to start."""
    if "cupynumeric" in sys.modules:
        return
    trouble = obstacle(inspect_machine())
    if trouble is not None:
        raise trouble


def start() -> ModuleType:
    """The module cupynumeric, imported on first use with nothing of the user's changed.

    The first import sets CUPYNUMERIC_MATMUL_CACHE_SIZE unless it is set (see MATMUL_CACHE).
    """
    if "cupynumeric" not in sys.modules:
        check_startable()
        os.environ.setdefault(*MATMUL_CACHE)
        with _manners():
            import cupynumeric  # noqa: F401
    return sys.modules["cupynumeric"]


def is_first_rank() -> bool:
    """Whether this process is the one of its run that prints, draws and writes.

    A run of several processes runs the whole script in each of them. Starts Legate.

    Returns
    -------
    bool
        True in the first process of a run, and in a run of one.

    Examples
    --------
    >>> import lmsolve.legate
    >>> if lmsolve.legate.is_first_rank():  # doctest: +SKIP
    ...     print(result)
    """
    start()
    return _xp.is_first_rank()


@contextmanager
def _manners() -> Iterator[None]:
    """Keep NumPy's and random's generators and the handler of Ctrl-C as they are."""
    seeds = np.random.seed, random.seed
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        np.random.seed, random.seed = seeds
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
        main = threading.current_thread() is threading.main_thread()
        if main and interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)


def _cuda() -> tuple[bool, int | None, tuple[str, ...]]:
    """Whether libcuda is there, what its cuInit returns, and the names of the devices."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False, None, ()
    status = int(cuda.cuInit(0))
    count = ctypes.c_int(0)
    if status != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return True, status, ()
    name = ctypes.create_string_buffer(256)
    names = []
    for ordinal in range(count.value):
        device = ctypes.c_int(0)
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode())
    return True, status, tuple(names)


def _version(*distributions: str) -> str | None:
    """Version of the first of the distributions (names on PyPI, on conda) that is installed."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _networks() -> tuple[str, ...]:
    """Networks that Legate was built with, read from its files: importing it would start it."""
    spec = importlib.util.find_spec("legate")
    if spec is None or spec.origin is None:
        return ()
    file = Path(spec.origin).with_name("install_info.py")
    found = re.search(r'networks: .*str\("(.*?)"\)', file.read_text()) if file.exists() else None
    return tuple(found.group(1).split()) if found else ()
