"""What the benchmarks share: turns, counts, peak memory, tables, the environment, raw figures.

Importing it puts the checkout first on the path, so that a checkout needs no installation.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

PEERS = (
    "lmfit", "nlsq", "optimistix", "jax", "torch", "torch_levenberg_marquardt", "lumafit", "numba",
    "legate",
)  # fmt: skip


class Counter:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


Clock = Callable[[], float]
#: Wall time is what a user waits for; processor time (of all threads) leaves out other processes.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_of(run: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    began = clock()
    run()
    return clock() - began


def take_turns(
    runs: dict[str, Callable[[], Any]],
    budget: float,
    least: int = 5,
    most: int = 300,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every run; all take turns, so that the machine's other work falls on all alike.

    Each is warmed up once; then as many rounds as fit into ``budget`` seconds, within limits.
    """
    for run in runs.values():
        run()
    one_round = sum(seconds_of(run) for run in runs.values())
    rounds = int(min(max(budget / one_round, least), most))
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            seconds[name].append(seconds_of(runs[name], clock))
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def peak_rss() -> float:
    """Peak resident memory of this process since it started, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_beyond_now(run: Callable[[], Any]) -> float:
    """Peak resident memory of a run beyond what this process holds before it, in MiB (Linux)."""
    forget_peak()
    before = status("VmRSS")
    kept = run()
    peak = status("VmHWM") - before
    del kept
    return peak


def forget_peak() -> None:
    """Let the peak of resident memory start from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> float:
    """Resident memory in MiB: VmRSS now, VmHWM at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def in_fresh_process(script: str, *arguments: str) -> float | None:
    """The last word that a script prints, as a number; None if it fails."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Text columns, the first one left-aligned, numbers right-aligned."""
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def environment() -> dict[str, Any]:
    """Versions and machine, as they stand in every raw file."""
    import lmsolve

    installed = [name for name in PEERS if importlib.util.find_spec(name)]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "lmsolve": lmsolve.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        **{name: importlib.metadata.version(name) for name in installed},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "blas": np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def footer() -> str:
    """One line that says where a table comes from."""
    e = environment()
    versions = " ".join(f"{k} {e[k]}" for k in ("lmsolve", "numpy", "scipy", *PEERS) if k in e)
    return (
        f"{e['date']}: python {e['python']}, {versions}; {e['processor']}, {e['cpus']} CPUs, "
        f"load {e['load']}, OMP_NUM_THREADS={e['OMP_NUM_THREADS'] or 'unset'}"
    )


def save(path: Path, figures: dict[str, Any]) -> None:
    """Raw figures as JSON, one entry of a list a line."""
    parts = [f'"environment": {json.dumps(environment())}']
    for name, value in figures.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(entry) for entry in value)
            parts.append(f'"{name}": [\n{lines}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    print(f"\nRaw figures: {path}")
