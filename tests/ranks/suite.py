"""Tests on every rank of a run: `suite.py FOLDER ARGUMENTS...`, started by the rank tests.

Each rank compares by itself. Its report is FOLDER/RANK.txt, and its exit status that of pytest.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from lmsolve.legate._start import start

start()
from legate.core import get_legate_runtime  # noqa: E402  starts Legate, which start() does politely

if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    rank = get_legate_runtime().node_id
    with Path(folder, f"{rank}.txt").open("w") as report, redirect_stdout(report):
        status = pytest.main([*arguments, f"--basetemp={folder}/{rank}"])
    sys.exit(status)
