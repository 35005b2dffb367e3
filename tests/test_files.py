"""A file is replaced by a whole one or stays as it was."""

import pytest

from lmsolve._files import replacing


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    with replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
def test_one_that_breaks_off_leaves_nothing(tmp_path, there):
    path = tmp_path / "state"
    if there:
        path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == [(path, b"old")] * there
