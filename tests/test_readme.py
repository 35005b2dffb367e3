"""The README's Python blocks run as they stand, and its sample output is what they print."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks that need nothing optional define, run one after the other."""
    return run(block for block in blocks("python") if "torch" not in block)


def run(sources: Iterable[str]) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, str(README), "exec"), namespace)
    return namespace


def test_the_report_is_the_one_shown(names: dict[str, Any]) -> None:
    shown = blocks("text")[0].strip().splitlines()
    printed = str(names["fit"]).strip().splitlines()
    assert [line.split()[:3] for line in printed[3:]] == [line.split()[:3] for line in shown[3:]]


def test_the_fits_are_right(names: dict[str, Any]) -> None:
    assert np.allclose(names["popt"], [2.5, 1.3, 0.5], rtol=0.1)
    assert np.all(np.abs(names["popt"] - [2.5, 1.3, 0.5]) < 4 * np.sqrt(np.diag(names["pcov"])))
    assert names["result"].success
    assert np.allclose(names["many"].x[:, 1], names["rates"], rtol=1e-6)


def test_the_network_is_trained() -> None:
    pytest.importorskip("torch")
    assert run(block for block in blocks("python") if "torch" in block)["trained"].cost < 1e-6


def test_the_guide_runs() -> None:
    guide = README.parent / "docs" / "guide.md"
    found = re.findall(r"^```python\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) > 8
    assert run(found)["peak"].success
