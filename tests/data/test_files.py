"""Files are written whole or not at all, and what stands in the way is said."""

import errno

import pytest

from lmjax.data.files import replacing, write_bytes, writing
from lmjax.errors import InputError
from lmjax.paths import sha256_of

pytestmark = pytest.mark.fast


def test_a_failure_half_way_leaves_the_old_content_and_nothing_else(tmp_path):
    file = tmp_path / "a"
    write_bytes(file, b"old")

    def fail():
        with replacing(file) as unfinished:
            unfinished.write_bytes(b"ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert file.read_bytes() == b"old"
    with replacing(file) as unfinished:
        unfinished.write_bytes(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"


def test_a_path_beneath_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InputError, match=r"file/inside: cannot be written \(Not a directory\); .* another place"):
        write_bytes(tmp_path / "file" / "inside", b"y")


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EFBIG, "limit on file")])
def test_a_full_disk_is_an_input_error_and_other_trouble_is_not(tmp_path, number, remedy):
    with pytest.raises(InputError, match=remedy), writing(tmp_path / "a"):
        raise OSError(number, "full")
    with pytest.raises(OSError, match="broken pipe"), writing(tmp_path / "a"):
        raise OSError(errno.EPIPE, "broken pipe")


def test_sha256(tmp_path):
    write_bytes(tmp_path / "a", b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
