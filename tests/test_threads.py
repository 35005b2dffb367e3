"""The number of threads of BLAS, which is one setting for the process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading

import pytest

from lmsolve import _threads

FORKED = """
import os, threading
import numpy, scipy.linalg
from lmsolve import _threads

libraries = _threads.libraries()
for _, put in libraries:
    put(2)
entered = threading.Event()

def stay():
    with _threads.one_thread(), _threads._users._lock:
        entered.set()
        threading.Event().wait()

threading.Thread(target=stay, daemon=True).start()
entered.wait()
child = os.fork()
if child == 0:
    with _threads.one_thread():
        within = [get() for get, _ in libraries]
    after = [get() for get, _ in libraries]
    os._exit(0 if set(within) == {1} and set(after) == {2} else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture
def two_threads():
    """Functions that tell the number of threads, which is 2 for now, of every library."""
    found = _threads.libraries()
    if not found:
        pytest.skip("no OpenBLAS whose threads can be set")
    before = [get() for get, _ in found]
    for _, put in found:
        put(2)
    yield [get for get, _ in found]
    for (_, put), count in zip(found, before, strict=True):
        put(count)


def test_the_last_of_several_users_restores(two_threads):
    second_is_in, first_is_out = threading.Event(), threading.Event()
    seen = []

    def second():
        with _threads.one_thread():
            second_is_in.set()
            first_is_out.wait(10)
            seen.extend(get() for get in two_threads)

    other = threading.Thread(target=second)
    with _threads.one_thread():
        other.start()
        assert second_is_in.wait(10)
    first_is_out.set()
    other.join()
    assert set(seen) == {1}
    assert {get() for get in two_threads} == {2}


def test_many_users_at_once_leave_it_as_it_was(two_threads):
    seen = set()

    def use():
        for _ in range(300):
            with _threads.one_thread(), _threads.one_thread():
                seen.update(get() for get in two_threads)

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert seen == {1}
    assert {get() for get in two_threads} == {2}


def test_a_signal_that_keeps_a_user_out_changes_nothing(two_threads, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(_threads, "libraries", interrupted)
    with pytest.raises(KeyboardInterrupt), _threads.one_thread():
        pass
    monkeypatch.undo()
    with _threads.one_thread():
        assert {get() for get in two_threads} == {1}
    assert {get() for get in two_threads} == {2}


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no fork on this system")
def test_a_child_has_the_threads_that_another_thread_would_have_restored():
    if not _threads.libraries():
        pytest.skip("no OpenBLAS whose threads can be set")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=60)
    assert done.returncode == 0


def test_a_file_that_is_named_like_the_library_is_none(tmp_path):
    (tmp_path / "openblas.txt").write_bytes(b"notes")
    with (
        open(tmp_path / "openblas.txt", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ),
    ):
        found = _threads.libraries.__wrapped__()
    assert len(found) == len(_threads.libraries())
