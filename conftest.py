"""Leave out the doctests of modules whose optional dependency is not installed."""

from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("torch") is None:
    collect_ignore_glob += ["lmsolve/torch/*"]
if find_spec("cupynumeric") is None:
    collect_ignore_glob += ["lmsolve/_legate*.py", "lmsolve/legate/*", "lmsolve/legate.py"]
