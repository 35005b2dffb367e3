"""Imports run one way, and importing lmsolve is cheap and leaves no trace."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "lmsolve"

# What each file may import besides the standard library: names with a leading underscore are files
# of the package, the rest are top-level packages. A file that is missing here fails the test, so
# that a new one starts with a decision about where it stands.
FRONT_DOOR = {
    "_xp", "_linalg", "_loss", "_bounds", "_numdiff", "_subproblem", "_problem", "_damping",
    "_state", "_lm", "scipy", "numpy",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"_least_squares", "_curve_fit", "_lm", "_state"},
    "_xp": {"numpy", "array_api_compat"},
    "_linalg": {"_xp"},
    "_loss": {"_xp"},
    "_bounds": {"_xp"},
    "_numdiff": {"_xp"},
    "_subproblem": {"_xp", "_linalg"},
    "_problem": {"_xp", "_loss", "_bounds", "_numdiff", "_subproblem"},
    "_damping": set(),
    "_state": {"_damping", "_xp"},
    "_lm": {"_xp", "_damping", "_state", "_bounds"},
    "_least_squares": FRONT_DOOR,
    "_curve_fit": FRONT_DOOR | {"_least_squares"},
    "_batched": {"_xp", "_linalg", "_loss"},
    "_legate": {"_xp", "legate", "cupynumeric", "numpy"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def table_key(path: pathlib.Path) -> str:
    """The file's name in MAY_IMPORT: "_xp", "torch/_fit"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


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


def imported_names(path: pathlib.Path, source: str) -> set[str]:
    """Files of the package and top-level packages that a file imports."""
    names: set[str] = set()
    here = ["lmsolve", *path.relative_to(PACKAGE).parent.parts]
    for node in runtime_imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            own = base[0] == "lmsolve"
            is_package = own and PACKAGE.joinpath(*base[1:]).is_dir()
            targets = [[*base, a.name] for a in node.names] if is_package else [base]
        for target in targets:
            own_file = "/".join(target[1:]) if target[0] == "lmsolve" else ""
            names.add(own_file or target[0])
    return names - set(sys.stdlib_module_names) - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=table_key)
def test_imports_keep_to_the_table(path: pathlib.Path) -> None:
    key = table_key(path)
    assert key in MAY_IMPORT, f"add {key} to MAY_IMPORT, and to the table in the design"
    extra = imported_names(path, path.read_text()) - MAY_IMPORT[key]
    assert not extra, f"{key}.py may not import {sorted(extra)}"


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from lmsolve._xp import to_floats", "_xp"),
        ("from . import _xp", "_xp"),
        ("from ._xp import to_floats", "_xp"),
        ("import lmsolve._xp", "_xp"),
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
