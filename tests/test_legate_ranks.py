"""Two ranks take the same decisions, end with the same bits, and tell each other's exceptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmsolve import least_squares
from tests.decay import X0, T, Y, curved, jacobian, residual, wide

#: A second per Legate operation and rank on a busy machine of two cores; a hang takes for ever.
LIMIT = 540

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).resolve().parent.parent


def launch(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks of this machine."""
    legate = Path(sys.executable).with_name("legate")
    command = [
        str(legate) if legate.exists() else shutil.which("legate") or "legate",
        *("--launcher", "mpirun", "--ranks-per-node", "2", "--cpus", "1", "--gpus", "0"),
        *("--sysmem", "1000", "--launcher-extra=--oversubscribe", script, *arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LEGATE_CONFIG", None)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(str(ROOT / "tests" / "ranks" / "checks.py"), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    "check",
    [
        "fitted",
        "fitted_from_host_data",
        "fitted_by_torch",
        "fitted_arrays",
        "streamed_arrays",
        "wide_arrays",
        "wide_trials",
        "iterated_arrays",
        "reduced_by_qr",
    ],
)
def test_ranks_end_with_the_same_bits(found: list[dict[str, Any]], check: str) -> None:
    assert found[0]["ranks"] == 2
    assert found[0][check] == found[1][check]


def test_two_ranks_fit_as_one_process_does(found: list[dict[str, Any]]) -> None:
    expected = least_squares(residual, X0, jacobian, args=(T, Y))
    np.testing.assert_allclose(found[0]["fitted"]["x"], expected.x, rtol=1e-12)
    assert float.fromhex(found[0]["fitted"]["cost"]) == pytest.approx(expected.cost, rel=1e-13)
    robust = least_squares(residual, X0, jacobian, args=(T, Y), loss="huber", f_scale=0.01)
    one = found[0]["fitted_from_host_data"]
    np.testing.assert_allclose(one["x"], robust.x, rtol=1e-6)
    there = least_squares(
        residual, X0, jacobian, args=(T, Y), loss="huber", f_scale=0.01, max_nfev=12
    )
    np.testing.assert_allclose(one["covariance"], there.covariance(), rtol=1e-8)


def test_arrays_of_two_ranks_fit_as_those_of_one_process(found: list[dict[str, Any]]) -> None:
    expected = least_squares(residual, X0, jacobian, args=(T, Y), max_nfev=4)
    for check in ("fitted_arrays", "streamed_arrays"):
        assert float.fromhex(found[0][check]["cost"]) == pytest.approx(expected.cost, rel=1e-9)


def test_iterations_of_two_ranks_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    expected = least_squares(residual, X0, jacobian, args=(T, Y), tr_solver="lsmr", max_nfev=4)
    cost = float.fromhex(found[0]["iterated_arrays"]["cost"])
    assert cost == pytest.approx(expected.cost, rel=1e-6)


def test_wide_arrays_of_two_ranks_fit_as_those_of_one_process(found: list[dict[str, Any]]) -> None:
    fun, jac = wide(np, 30, 4)
    expected = least_squares(fun, np.zeros(30), jac, bounds=(-0.01, 0.01), max_nfev=3)
    assert float.fromhex(found[0]["wide_arrays"]["cost"]) == pytest.approx(expected.cost, rel=1e-9)
    errors = expected.standard_errors(absolute_sigma=True)
    np.testing.assert_allclose(found[0]["wide_arrays"]["errors"], errors, rtol=1e-6)


def test_wide_trials_of_two_ranks_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    fun, jac = curved(np, 30, 4)
    x0 = 3.0 * np.random.default_rng(3).standard_normal(30)
    expected = least_squares(fun, x0, jac, loss="soft_l1", max_nfev=5)
    two = found[0]["wide_trials"]
    assert float.fromhex(two["cost"]) == pytest.approx(expected.cost, rel=1e-9)
    assert two["accepted"] == [trial.accepted for trial in expected.history]
    assert not all(two["accepted"])


def test_ill_conditioned_rows_of_two_ranks_are_reduced_by_qr(found: list[dict[str, Any]]) -> None:
    np.testing.assert_allclose(found[0]["reduced_by_qr"]["x"], [1.0, 2.0, 3.0, 4.0], rtol=1e-6)


def test_exception_of_one_rank_is_raised_on_both(found: list[dict[str, Any]]) -> None:
    here, there = (rank["exception_of_one_rank"] for rank in found)
    assert here["message"] == there["message"] == "the last shard"
    assert "in fun" in here["notes"]  # the traceback of the rank where it was raised
    assert there["notes"] == ""


def test_trouble_of_one_rank_rejects_the_step_on_both(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["trouble_of_one_rank"]["finite"] == [False, False]


def test_every_problem_of_the_backends_agrees_with_numpy_on_both_ranks(tmp_path: Path) -> None:
    suite = str(ROOT / "tests" / "ranks" / "suite.py")
    options = ("-x", "-q", "-p", "no:cacheprovider", "-k", "cupynumeric")
    done = launch(suite, str(tmp_path), *options, str(ROOT / "tests" / "test_backends.py"))
    reports = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert done.returncode == 0, "".join(reports)[-4000:] + done.stderr[-4000:]
    ran = [re.findall(r"(\d+) (passed|failed|skipped|error)", report) for report in reports]
    assert ran[0] == ran[1]
    ((count, outcome),) = ran[0]
    assert outcome == "passed"
    assert int(count) >= 70


def test_parameters_that_differ_stop_both_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "different parameters" in rank["parameters_that_differ"]["message"]
