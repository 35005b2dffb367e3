"""One thread per test process, and doctests only of modules whose dependencies are installed."""

import os
from importlib.util import find_spec

# Processes of pytest-xdist that each start a thread per core slow one another down. Set
# before anything imports NumPy or torch; make test sets it for a single process too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing these starts Legate, and the second is a script that `legate` launches on its ranks.
collect_ignore_glob = ["lmsolve/legate/*", "tests/ranks/*"]
if find_spec("torch") is None:
    collect_ignore_glob += ["lmsolve/torch/*"]
