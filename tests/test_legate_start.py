"""What keeps Legate from starting is told with its remedy; a start is polite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lmsolve.__main__ import main, report
from lmsolve.legate._start import Machine, obstacle

READY = Machine(
    system="Linux",
    cupynumeric="26.6.1",
    networks=("ucx",),
    libcuda=True,
    gpus=("H200",),
    cuda_status=0,
    config=None,
    auto_config=True,
    mpirun="/usr/bin/mpirun",
)
NO_GPU = replace(READY, gpus=(), cuda_status=100)


@pytest.mark.parametrize(
    "machine",
    [
        READY,
        replace(NO_GPU, config="--cpus 2 --gpus 0"),
        replace(NO_GPU, config="--cpus=2 --gpus=0"),
        replace(NO_GPU, config="--cpus 2", auto_config=False),
    ],
)
def test_a_machine_with_all_parts_has_no_obstacle(machine: Machine) -> None:
    assert obstacle(machine) is None


@pytest.mark.parametrize(
    ("machine", "kind", "remedy"),
    [
        (replace(READY, cupynumeric=None), ImportError, "pip install lmsolve[legate]"),
        (replace(READY, cupynumeric=None, system="Darwin"), ImportError, "not for Darwin"),
        (replace(READY, libcuda=False), ImportError, "libcuda1"),
        (NO_GPU, RuntimeError, 'LEGATE_CONFIG="--cpus 2 --gpus 0'),
        (replace(NO_GPU, config="--cpus 2"), RuntimeError, "--gpus 0"),
        (replace(NO_GPU, config="--gpus 1"), RuntimeError, "--gpus 0"),
        (replace(NO_GPU, cuda_status=803), RuntimeError, "cuInit returned 803"),
    ],
)
def test_each_missing_part_is_told_with_its_remedy(
    machine: Machine, kind: type[Exception], remedy: str
) -> None:
    trouble = obstacle(machine)
    assert type(trouble) is kind
    assert remedy in str(trouble)


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (READY, "over ucx with /usr/bin/mpirun"),
        (replace(READY, networks=()), "no networking"),
        (replace(READY, mpirun=None), "openmpi-bin"),
        (replace(READY, cupynumeric=None), "pip install lmsolve[legate]"),
    ],
)
def test_info_says_what_several_processes_need(machine: Machine, text: str) -> None:
    assert text in "\n".join(report(machine))


def test_info_runs_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "numpy" in capsys.readouterr().out


def run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.legate
def test_a_start_leaves_generators_and_their_seeds_alone() -> None:
    done = run("""
        import random
        import numpy as np
        from lmsolve.legate._start import start

        np.random.seed(7)
        random.seed(7)
        before = np.random.seed, random.seed
        start()
        assert (np.random.seed, random.seed) == before
        after = np.random.rand(), random.random()
        np.random.seed(7)
        random.seed(7)
        assert after == (np.random.rand(), random.random())
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.legate
@pytest.mark.parametrize(("node", "first"), [(0, True), (1, False)])
def test_one_rank_prints(monkeypatch: pytest.MonkeyPatch, node: int, first: bool) -> None:
    import lmsolve.legate

    assert lmsolve.legate.is_first_rank()
    monkeypatch.setattr("legate.core.get_legate_runtime", lambda: SimpleNamespace(node_id=node))
    assert lmsolve.legate.is_first_rank() == first


@pytest.mark.legate
def test_ctrl_c_is_a_keyboard_interrupt_after_a_start() -> None:
    source = """
        import signal, time
        from lmsolve.legate._start import start

        # A shell's background job starts with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        start()
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("caught", flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line == "ready\n" for line in lines)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "caught\n" in list(lines)
    assert process.returncode == 0


@pytest.mark.legate
def test_a_start_that_would_fail_is_refused_and_can_be_mended() -> None:
    done = run(
        """
        import os
        from lmsolve.legate._start import inspect_machine, start

        if inspect_machine().gpus:
            print("mended")
        else:
            try:
                start()
            except RuntimeError as refused:
                assert "LEGATE_CONFIG" in str(refused)
                os.environ["LEGATE_CONFIG"] = "--cpus 1 --gpus 0 --sysmem 500"
                print("mended", start().arange(3).sum())
        """,
        LEGATE_CONFIG="--cpus 1",
    )
    assert "mended" in done.stdout, done.stderr


@pytest.mark.legate
def test_without_libcuda_the_error_is_an_import_error() -> None:
    done = run(
        "from lmsolve.legate._start import inspect_machine, start\n"
        "if inspect_machine().libcuda:\n    raise ImportError('libcuda1')\nstart()",
        LD_LIBRARY_PATH="",
    )
    assert "ImportError" in done.stderr
    assert "libcuda1" in done.stderr
