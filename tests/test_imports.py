"""Imports run one way, and importing lmsolve is cheap and leaves no trace."""

from __future__ import annotations

import ast
import graphlib
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "lmsolve"

# What each file may import besides the standard library and HARD: files of the package by their
# path, other packages by their name. A file that is missing here fails the test, so that a new one
# starts with a decision about where it stands.
HARD = {"numpy", "scipy"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {
        "_least_squares", "_leastsq", "_curve_fit", "_lm", "_state", "_result", "_uncertainty",
        "_batched", "_check_jac", "_history",
    },
    "__main__": {"__init__", "torch", "legate/_start"},
    "_xp": {"array_api_compat"},
    "_linalg": {"_xp", "array_api_compat"},
    "_threads": set(),
    "_qr": {"_xp", "_threads"},
    "_loss": {"_xp"},
    "_bounds": {"_xp"},
    "_numdiff": {"_xp", "array_api_compat"},
    "_validate": {"_xp", "_bounds", "_loss"},
    "_damping": set(),
    "_files": set(),
    "_state": {"_damping", "_files", "_xp"},
    "_packed": set(),
    "_factored": {"_xp", "_linalg", "_qr"},
    "_subproblem": {"_xp", "_factored", "_linalg", "_packed"},
    "_schur": {"_linalg"},
    "_sparse": {"_linalg", "_schur", "_subproblem"},
    "_functions": {"_xp"},
    "_sums": {"_xp", "_factored", "_functions", "_loss", "_subproblem", "_sparse"},
    "_problem": {
        "_xp", "_factored", "_functions", "_loss", "_numdiff", "_sparse", "_subproblem", "_sums",
    },
    "_complex": {"_xp", "_functions"},
    "_trust": {"_xp", "_linalg", "_bounds", "_damping", "_subproblem"},
    "_start": {"_xp"},
    "_status": {"_state"},
    "_anderson": {"_xp", "_state", "_trust"},
    "_lm": {
        "_xp", "_anderson", "_linalg", "_bounds", "_damping", "_problem", "_start", "_state",
        "_status", "_trust",
    },
    "_tiny": {
        "_xp", "_damping", "_factored", "_functions", "_history", "_lm", "_numdiff", "_problem",
        "_start", "_state", "_status", "_subproblem", "_trust",
    },
    "_uncertainty": {"_xp", "_linalg", "_qr"},
    "_report": {"_xp"},
    "_result": {"_xp", "_loss", "_uncertainty", "_report"},
    "_history": {"_state"},
    "_hooks": set(),
}  # fmt: skip
CORE = set(MAY_IMPORT) - {"__init__", "__main__"}
MAY_IMPORT |= {
    "_fit": CORE,
    "_least_squares": CORE | {"_fit", "legate/_arrays"},
    "_curve_data": {"_xp", "_validate"},
    "_leastsq": {"_xp", "_result", "_least_squares", "_validate"},
    "_curve_fit": CORE | {"_curve_data", "_fit", "_least_squares", "_leastsq"},
    "_check_jac": CORE,
    "_batched_model": {"_xp", "_loss", "torch"},
    "_batched_lm": {"_xp", "_batched_model"},
    "_batched_inputs": {"_xp", "_loss", "_batched_model", "_batched_lm"},
    "_batched_run": {"_xp", "_batched_model", "_batched_lm", "_batched_inputs", "tqdm"},
    "_batched_result": {"_xp", "_batched_model", "_batched_lm"},
    "_batched": {"_xp", "_batched_model", "_batched_inputs", "_batched_run", "_batched_result"},
}
# Optional parts, each a folder: its files import one another (without cycles, as everywhere) and
# these. Nothing above imports one of them at the top of a file.
FOLDERS: dict[str, set[str]] = {
    "torch": {"torch", "tqdm", "array_api_compat", "__init__", "legate"}
    | {"legate/_start", "legate/_tasks", "legate/_memory", "legate/_cholesky"}
    | CORE,
    "legate": {"legate", "cupynumeric", "torch", "__init__"} | CORE,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def table_key(path: pathlib.Path) -> str:
    """The file's name in the table: "_xp", "torch/_fit"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def allowed_names(key: str) -> set[str]:
    folder, _, file = key.rpartition("/")
    if file and folder in FOLDERS:
        siblings = {table_key(path) for path in FILES if path.parent == PACKAGE / folder}
        return FOLDERS[folder] | siblings | HARD
    assert key in MAY_IMPORT, f"add {key} to MAY_IMPORT, and to the table in the design"
    return MAY_IMPORT[key] | HARD


def runtime_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Import statements anywhere in a file, those under `if TYPE_CHECKING` left out."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        else:
            found.extend(runtime_imports(node))
    return found


def own_file(parts: list[str]) -> str:
    """The table's name for a dotted name in lmsolve: its file, or the file it is an object of."""
    path = PACKAGE.joinpath(*parts)
    if path.is_dir():
        return "/".join([*parts, "__init__"])
    if path.with_suffix(".py").is_file():
        return "/".join(parts)
    return own_file(parts[:-1])


def imported_names(path: pathlib.Path, source: str) -> set[str]:
    """Files of the package and top-level packages that a file imports."""
    names: set[str] = set()
    here = ["lmsolve", *path.relative_to(PACKAGE).parent.parts]
    for node in runtime_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            base = here[: len(here) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        for first, *rest in targets:
            names.add(own_file(rest) if first == "lmsolve" else first)
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=table_key)
def test_imports_keep_to_the_table(path: pathlib.Path) -> None:
    key = table_key(path)
    extra = imported_names(path, path.read_text()) - allowed_names(key)
    assert not extra, f"{key}.py may not import {sorted(extra)}"


def test_the_table_names_no_file_that_is_gone() -> None:
    missing = set(MAY_IMPORT) - {table_key(path) for path in FILES}
    assert not missing


def test_no_two_files_import_each_other() -> None:
    keys = {table_key(path) for path in FILES}
    graph = {table_key(p): imported_names(p, p.read_text()) & keys for p in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from lmsolve._xp import to_floats", "_xp"),
        ("from . import _xp", "_xp"),
        ("from . import __version__", "__init__"),
        ("from ._xp import to_floats", "_xp"),
        ("import lmsolve._xp", "_xp"),
        ("import lmsolve", "__init__"),
        ("from scipy.linalg import cho_solve", "scipy"),
        ("def f():\n    import torch.func", "torch"),
        ("if True:\n    from legate.core import task", "legate"),
    ],
)
def test_every_form_of_import_is_seen(statement: str, name: str) -> None:
    assert imported_names(PACKAGE / "_lm.py", statement) == {name}


def test_imports_for_type_checkers_do_not_count() -> None:
    source = "if TYPE_CHECKING:\n    import torch\n"
    assert imported_names(PACKAGE / "_lm.py", source) == set()


def run_python(source: str) -> str:
    """Standard output of a fresh interpreter that sees this checkout of lmsolve."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_optional_dependency() -> None:
    out = run_python(
        """
        import sys
        import lmsolve
        heavy = {"torch", "cupynumeric", "legate", "matplotlib", "pandas", "tqdm"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert out.strip() == "[]"


def test_import_touches_no_global_state() -> None:
    out = run_python(
        """
        import logging, os, pickle, random, signal, sys, threading, warnings
        import numpy as np
        import scipy.optimize

        def snapshot():
            return {
                "numpy random": pickle.dumps(np.random.get_state()),
                "random": random.getstate(),
                "seed": (np.random.seed, random.seed),
                "errstate": np.geterr(),
                "print options": np.get_printoptions(),
                "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
                "warnings": list(warnings.filters),
                "environment": dict(os.environ),
                "path": list(sys.path),
                "threads": threading.active_count(),
                "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
                "handlers": list(logging.getLogger().handlers),
                "recursion": sys.getrecursionlimit(),
            }

        np.random.seed(7)
        random.seed(7)
        np.seterr(over="raise")
        before = snapshot()
        import lmsolve
        after = snapshot()
        print([name for name in before if before[name] != after[name]])
        """
    )
    assert out.strip() == "[]"
