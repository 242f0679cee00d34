import errno
import os
import signal
import subprocess
import sys

import pytest

from schemas.errors import UserError
from schemas.storage import is_aside, write_aside


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folders" / "table.parquet"
    with write_aside(path) as aside:
        aside.write_bytes(b"half")
        assert not path.exists()
        assert aside.parent == path.parent
        aside.write_bytes(b"half and half")
    assert path.read_bytes() == b"half and half"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_exists_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "table.parquet"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with write_aside(path) as aside:
            aside.write_bytes(b"new and longer")
            assert path.read_bytes() == b"old"
        assert reader.read() == b"old"  # one who is reading keeps the file as it was
    assert path.read_bytes() == b"new and longer"


@pytest.mark.parametrize(
    ("fault", "told"), [(ValueError, ValueError), (OSError, UserError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_an_exception_leaves_nothing_behind_and_what_was_there_whole(fault, told, tmp_path):
    path = tmp_path / "table.parquet"
    path.write_bytes(b"old")
    with pytest.raises(told), write_aside(path) as aside:
        aside.write_bytes(b"half")
        raise fault
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_file_that_cannot_be_written_is_told_with_its_path_and_the_reason(tmp_path):
    path = tmp_path / "table.parquet"
    with pytest.raises(UserError) as caught, write_aside(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_told_too(tmp_path):
    (tmp_path / "cache").write_bytes(b"")
    for path in (tmp_path / "cache" / "table.parquet", tmp_path / "cache" / "deep" / "table.parquet"):
        with pytest.raises(UserError) as caught, write_aside(path) as aside:
            aside.write_bytes(b"half")
        assert str(caught.value).startswith(f"{path}: cannot be written: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_an_exception_before_a_byte_is_written_leaves_nothing_either(tmp_path):
    with pytest.raises(ValueError), write_aside(tmp_path / "table.parquet"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_writing_leaves_no_file_of_that_name_but_a_leftover_that_is_known_as_one(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from schemas.storage import write_aside\n"
        "with write_aside(Path(sys.argv[1])) as aside:\n"
        "    aside.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "table.parquet"
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    [leftover] = tmp_path.iterdir()
    assert done.returncode == -signal.SIGKILL
    assert leftover != path and is_aside(leftover)


def test_two_writers_of_one_file_do_not_share_a_name(tmp_path):
    path = tmp_path / "table.parquet"
    with write_aside(path) as first, write_aside(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first != second
    assert path.read_bytes() == b"first"  # the one that ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_products_name_is_no_leftovers(tmp_path):
    assert not is_aside(tmp_path / "table.parquet")
    assert not is_aside(tmp_path / "tmp.parquet")
    assert not is_aside(tmp_path / f"table.{os.getpid()}.parquet")
