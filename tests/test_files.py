"""Files that are whole or absent, links and devices among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robench.errors import UserError
from robench.files import write_atomic

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full")


def test_a_link_stays_one_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "file")
    for text in ("first", "second"):
        write_atomic(link, text)
        assert link.is_symlink()
        assert (tmp_path / "far" / "file").read_text() == text
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        write_atomic(pipe, "through")
        assert reader.communicate()[0] == b"through"
    assert pipe.is_fifo()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot write .*: Is a directory$"):
        write_atomic(tmp_path, "text")


@full
def test_what_is_full_is_named() -> None:
    with pytest.raises(UserError, match=r"^cannot write /dev/full: No space left on device$"):
        write_atomic(FULL, "text")
    assert FULL.is_char_device()


@full
def test_output_that_has_no_room_is_one_line() -> None:
    with FULL.open("w") as out:
        done = subprocess.run([sys.executable, "-m", "robench", "zoo", "list"], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "robench: error: cannot write what is printed: No space left on device\n")
