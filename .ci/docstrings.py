"""Validate the docstring of every public object of lmsolve with numpydoc."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import sys
import tomllib
from collections.abc import Iterator

from numpydoc.validate import validate

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Each public module and what it needs; one whose need is not installed is named and left out.
MODULES = {"lmsolve": None, "lmsolve.torch": "torch", "lmsolve.legate": "cupynumeric"}


def excluded_codes() -> set[str]:
    """Codes switched off in pyproject.toml ("all" there means all but the ones listed)."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return set(settings["tool"]["numpydoc_validation"]["checks"]) - {"all"}


def public_objects(module_name: str) -> Iterator[str]:
    """Dotted names of what a module's __all__ holds, methods of classes included."""
    module = importlib.import_module(module_name)
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield f"{module_name}.{name}"
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and (
                    inspect.isroutine(member) or isinstance(member, property)
                ):
                    yield f"{module_name}.{name}.{attribute}"


def complaints(name: str, excluded: set[str]) -> list[str]:
    """What numpydoc finds wrong with one object."""
    result = validate(name)
    if not result["docstring"]:
        return ["has no docstring"]
    # A record documents its fields once, as Attributes; its constructor takes the same ones.
    record = result["type"] == "type" and "\nAttributes\n" in result["docstring"]
    skipped = excluded | ({"PR01"} if record else set())
    return [f"{code} {text}" for code, text in result["errors"] if code not in skipped]


def main() -> int:
    excluded = excluded_codes()
    checked = wrong = 0
    for module_name, need in MODULES.items():
        if importlib.util.find_spec(module_name) is None:
            continue
        if need and importlib.util.find_spec(need) is None:
            print(f"docstrings: {module_name} left out, {need} is not installed")
            continue
        for name in public_objects(module_name):
            checked += 1
            for text in complaints(name, excluded):
                wrong += 1
                print(f"{name}: {text}")
    print(f"docstrings: {checked} public objects checked, {wrong} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
