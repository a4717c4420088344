from __future__ import annotations

import errno
import os
import stat

import pytest
from safetensors import SafetensorError

from kdkit.api.errors import EnvironmentUnmet, ModelError
from kdkit.models.files import settle, staged, write_errors


def test_staged_appears_whole(tmp_path):
    dest = tmp_path / "deep" / "model"
    with staged(dest) as directory:
        (directory / "a").write_text("a")
        assert not dest.exists()
        assert directory.parent == dest.parent  # the same file system, so that the rename is atomic
    assert [file.name for file in dest.iterdir()] == ["a"]
    assert [path.name for path in dest.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "No space left")])
def test_staged_leaves_nothing_after_a_failure(error, tmp_path):
    def fail() -> None:
        with staged(tmp_path / "model") as directory:
            (directory / "a").write_text("a")
            raise error

    with pytest.raises((KeyboardInterrupt, ValueError, EnvironmentUnmet)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_staged_never_replaces_something(tmp_path):
    (tmp_path / "model").mkdir()
    with staged(tmp_path / "model") as directory:  # an empty directory is nothing
        (directory / "a").write_text("a")
    with pytest.raises(ModelError, match="already exists"), staged(tmp_path / "model"):
        pytest.fail("must not start")
    assert (tmp_path / "model" / "a").read_text() == "a"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("28560 requested and 5920 written"),  # numpy
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(error, tmp_path):
    with (
        pytest.raises(EnvironmentUnmet, match=r"not enough room on the disk \(\d+ MB free\)") as caught,
        write_errors(tmp_path),
    ):
        raise error
    assert str(tmp_path) in str(caught.value)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnmet, match="cannot be written"), staged(tmp_path / "file" / "model"):
        pytest.fail("must not start")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(errno.EIO, "I/O error"), ValueError("x")])
def test_other_errors_pass(error, tmp_path):
    with pytest.raises(type(error)) as caught, write_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_settle_gives_ordinary_permissions(umask, mode, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o600)
    before = os.umask(umask)
    try:
        settle(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "sub/b")} == {mode}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "sub"]
