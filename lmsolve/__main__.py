"""``python -m lmsolve info``: versions, and what is missing for Legate and how to mend it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys

from . import __version__
from .legate._start import Machine, inspect_machine, obstacle


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m lmsolve", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args(arguments)
    sys.stdout.write("\n".join(report(inspect_machine())) + "\n")
    return 0


def report(machine: Machine) -> list[str]:
    """Lines of ``info``."""
    trouble = obstacle(machine)
    lines = [
        f"lmsolve {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {_version(name)}" for name in ("numpy", "scipy", "array-api-compat")),
        f"torch        {_torch()}",
        f"cuPyNumeric  {machine.cupynumeric or 'not installed'}",
        f"libcuda.so.1 {'found' if machine.libcuda else 'missing'}",
        f"GPUs         {', '.join(machine.gpus) or 'none'}",
        f"LEGATE_CONFIG is {machine.config!r}" if machine.config else "LEGATE_CONFIG is not set",
        f"Legate:      {trouble or 'ready to start'}",
        f"Several processes: {_processes(machine)}",
    ]
    namespaces = ["numpy"]
    namespaces += ["torch"] if importlib.util.find_spec("torch") else []
    namespaces += ["cupynumeric"] if trouble is None else []
    return [*lines, f"Arrays that least_squares takes here: {', '.join(namespaces)}"]


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _torch() -> str:
    """Version and devices of torch."""
    if importlib.util.find_spec("torch") is None:
        return "not installed: `pip install lmsolve[torch]`"
    import torch

    count = torch.cuda.device_count()
    devices = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "CPU only"
    return f"{torch.__version__}, {devices}"


def _processes(machine: Machine) -> str:
    """What `legate --launcher mpirun` would need on this machine."""
    if machine.cupynumeric is None:
        return "no, for want of cuPyNumeric"
    if not machine.networks:
        return (
            "no, this build of Legate has no networking; conda's builds have, and of the wheels "
            "26.1.0 (scripts/legate-env.sh ranks)"
        )
    if machine.mpirun is None:
        return "no, mpirun is missing: install OpenMPI (Debian: openmpi-bin and libopenmpi-dev)"
    return f"yes, over {' and '.join(machine.networks)} with {machine.mpirun}"


if __name__ == "__main__":
    sys.exit(main())
