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


def test_the_page_on_networks_runs() -> None:
    """But for cuPyLMA's side of the comparison, and what Legate starts."""
    torch = pytest.importorskip("torch")
    import lmsolve.torch

    class MyModel(torch.nn.Sequential):  # type: ignore[misc]  # torch is optional here
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 40)[:, None]
    loader = [(x, x**2)] * 30
    namespace = {"lmsolve": lmsolve, "torch": torch, "MyModel": MyModel, "model": MyModel(),
                 "x": x, "y": x**2, "loader": loader}  # fmt: skip
    page = (README.parent / "docs" / "torch.md").read_text()
    found = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    blocks = [block for block in found if "cupylma" not in block and "linalg=" not in block]
    assert len(blocks) >= 4 and len(found) - len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/torch.md", "exec"), namespace)
    assert isinstance(namespace["lm"], lmsolve.torch.LM)
    assert namespace["loss"] < 0.1
