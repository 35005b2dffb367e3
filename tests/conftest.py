"""The `xp` fixture. Tests of Legate are skipped, with the reason, where Legate can't start."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from lmsolve.legate._start import Machine, inspect_machine, obstacle
from tests.tools import LIBRARIES, Library


@cache
def machine() -> Machine:
    return inspect_machine()


def missing(marker: str) -> str | None:
    """What this machine lacks for the tests of a marker."""
    found = machine()
    if marker == "ranks" and found.cupynumeric is not None and found.libcuda:
        if not found.networks:
            return "this build of Legate has no networking: make test-legate"
        return None if found.mpirun else "mpirun is missing: make test-legate"
    if marker == "gpu" and not found.gpus:
        return "no CUDA device"
    if marker == "multigpu" and len(found.gpus) < 2:
        return "fewer than two CUDA devices"
    if marker in ("legate", "ranks"):
        trouble = obstacle(found)
        return None if trouble is None else str(trouble)
    return None


def takes_cupynumeric(item: pytest.Item) -> bool:
    """Whether a test runs on cuPyNumeric: front doors do, which keep n-sized work in NumPy."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("xp") != "cupynumeric" or item.path.stem == "test_backends"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if takes_cupynumeric(item)]
    for item in items:
        for marker in ("legate", "ranks", "gpu", "multigpu"):
            if item.get_closest_marker(marker) and (reason := missing(marker)):
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.fixture(params=LIBRARIES)
def xp(request: pytest.FixtureRequest) -> Iterator[Library]:
    """An array library with a dtype: NumPy, array-api-strict, torch, cuPyNumeric."""
    name = request.param
    module = pytest.importorskip(name.partition(":")[0])
    if name != "array_api_strict":
        yield Library.named(name)
        return
    with module.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False):
        yield Library.named(name)
