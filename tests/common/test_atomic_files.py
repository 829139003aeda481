"""Atomic files: after any failure a path has the old or the new content, and other files are unchanged."""

import errno
import fcntl
import os
import signal
import stat
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from grank_kernels.common import atomic_files
from grank_kernels.common.atomic_files import create_folder, replace_file, write_text

real_fsync, real_flock, real_rename = os.fsync, fcntl.flock, os.rename


def write_folder(path: Path, text: str) -> None:
    with create_folder(path) as new:
        (new / "inner").mkdir()
        (new / "inner" / "content").write_text(text)


def content(path: Path) -> str | None:
    """Content of a file or folder made by the writers above."""
    path = path / "inner" / "content" if path.is_dir() else path
    return path.read_text() if path.exists() else None


WRITERS = pytest.mark.parametrize("write", [write_text, write_folder])
Write = Callable[[Path, str], None]


@WRITERS
def test_new_content(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old and longer")
    write_text(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "new"


def test_an_empty_folder_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(0o700)
    write_folder(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "new"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "x" / "inner" / "content").stat().st_mode) == 0o600


def test_a_folder_with_content_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", "old")
    with pytest.raises(FileExistsError, match=r"path must be new or an empty folder: .*x"):
        write_folder(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_the_mode_of_a_replaced_file_is_kept(mode: int, tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    (tmp_path / "x").chmod(mode)
    write_text(tmp_path / "x", "new")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_holds_for_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "x", "new")
        write_folder(tmp_path / "y", "new")
    finally:
        os.umask(before)
    for path in (tmp_path / "x", tmp_path / "y" / "inner" / "content"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@WRITERS
@pytest.mark.parametrize("name", ["n" * 255, "名" * 85, "é" * 127, "n" * 240, "a\n'\"b", "x" + chr(0xDC80)], ids=len)
def test_any_name_that_the_file_system_takes(write: Write, name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "new")
    assert content(tmp_path / name) == "new"
    assert os.listdir(tmp_path) == [name]


@WRITERS
def test_a_name_that_is_too_long_is_named(write: Write, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"File name too long: .*{'n' * 256}"):
        write(tmp_path / ("n" * 256), "new")
    assert os.listdir(tmp_path) == []


@WRITERS
def test_links_in_the_place_of_a_temporary_are_not_followed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if an attacker knows the random part of the name."""
    (victim := tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(atomic_files.secrets, "token_hex", lambda _: "01234567")
    os.symlink(victim, tmp_path / ".x.01234567.partial")
    with pytest.raises(FileExistsError, match="/x'"):
        write(tmp_path / "x", "new")
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == [".x.01234567.partial", "victim"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (target := tmp_path / "target").write_text("precious")
    (tmp_path / "x").symlink_to(target)
    write_text(tmp_path / "x", "new")
    assert (target.read_text(), content(tmp_path / "x")) == ("precious", "new")


@pytest.mark.parametrize("name", ["x.partial", ".x.partial", ".x.0123456z.partial", ".x.012345678.partial"])
def test_files_of_similar_names_are_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / name).read_text() == "precious"


def test_paths_that_cannot_be_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"path must be a regular file, got a device, pipe or socket: .*pipe"):
        write_text(tmp_path / "pipe", "new")
    with pytest.raises(IsADirectoryError, match="path must be a file, got a folder"):
        write_text(tmp_path, "new")
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_text(tmp_path / "no folder" / "x", "new")


@WRITERS
def test_an_error_in_the_block_leaves_nothing(write: Write, tmp_path: Path) -> None:
    context: Callable[[Path], AbstractContextManager[Any]] = replace_file if write is write_text else create_folder
    with pytest.raises(ZeroDivisionError), context(tmp_path / "x"):
        _ = 1 // 0
    assert os.listdir(tmp_path) == []


def test_errors_of_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), replace_file(tmp_path / "x"):
        os.stat("elsewhere")


# ---- processes that end, and several writers ----


@WRITERS
def test_the_temporary_of_a_killed_process_is_deleted_by_the_next(write: Write, tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        os.rename = lambda *_: os._exit(9)  # type: ignore[assignment]
        write(tmp_path / "x", "never")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".x.")
    write(tmp_path / "y", "another name")
    assert left in os.listdir(tmp_path)
    write(tmp_path / "x", "new")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_temporary_in_use_is_kept(tmp_path: Path) -> None:
    with replace_file(tmp_path / "x") as file:
        write_text(tmp_path / "x", "first")
        file.write(b"second")
    assert content(tmp_path / "x") == "second"
    assert os.listdir(tmp_path) == ["x"]


def test_a_temporary_that_is_deleted_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = []

    def late(descriptor: int, operation: int) -> None:
        if not deleted and not operation & fcntl.LOCK_NB:
            deleted.extend(os.listdir(tmp_path))
            os.unlink(tmp_path / deleted[0])
        real_flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_text(tmp_path / "x", "new")
    assert deleted
    assert content(tmp_path / "x") == "new"


def test_many_writers(tmp_path: Path) -> None:
    texts = [str(i) * 5000 for i in range(4)]
    writers = [threading.Thread(target=lambda t=t: [write_text(tmp_path / "x", t) for _ in range(20)]) for t in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert content(tmp_path / "x") in texts
    assert os.listdir(tmp_path) == ["x"]


@WRITERS
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupt_at_the_rename(write: Write, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*names: Any) -> None:
        if after:
            real_rename(*names)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", "new")
    assert content(tmp_path / "x") == ("new" if after else None)
    assert os.listdir(tmp_path) == (["x"] if after else [])


# ---- hostile file systems ----


def failing(number: int, only: Callable[[int], bool] = lambda _: True) -> Callable[..., None]:
    """A system call on a descriptor that fails with an OSError if `only` holds."""

    def call(descriptor: int, *_: object) -> None:
        if only(descriptor):
            raise OSError(number, os.strerror(number))

    return call


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@WRITERS
@pytest.mark.parametrize(
    ("module", "call", "number", "only", "warning"),
    [
        (fcntl, "flock", errno.ENOLCK, None, "has no file locks"),
        (fcntl, "flock", errno.ENOSYS, None, "has no file locks"),
        (fcntl, "flock", errno.ENOTSUP, None, "has no file locks"),
        (os, "fsync", errno.EINVAL, is_folder, "cannot bring it to disk"),
        (os, "fsync", errno.ENOSYS, None, "cannot bring it to disk"),
        (os, "fsync", errno.ENOTSUP, None, "cannot bring it to disk"),
    ],
)
def test_file_systems_without_a_call(
    write: Write,
    module: Any,
    call: str,
    number: int,
    only: Callable[[int], bool] | None,
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, call, failing(number, only or (lambda _: True)))
    with pytest.warns(RuntimeWarning, match=f"the file system of .*x {warning}"):
        write(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "new"
    assert os.listdir(tmp_path) == ["x"]


FAILURES = [(fcntl, "flock", errno.EIO), (os, "fsync", errno.EIO), (os, "fsync", errno.ENOSPC),
            (os, "rename", errno.EACCES), (os, "rename", errno.EROFS), (os, "open", errno.EMFILE)]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "module", "call", "number"),
    [
        (write_folder, os, "mkdir", errno.EDQUOT),
        *((write, *failure) for write in (write_text, write_folder) for failure in FAILURES),
    ],
)
def test_calls_that_fail(
    write: Write, module: Any, call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fails)
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '.*x'"):
            write(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == []


@WRITERS
def test_a_folder_that_fails_after_the_rename(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        failing(errno.EIO, lambda it: os.path.samestat(os.fstat(it), tmp_path.stat()))(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"the new content is in place, but its folder cannot be brought to disk .*x"):
        write(tmp_path / "x", "new")
    assert content(tmp_path / "x") == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
@WRITERS
def test_a_folder_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    folder.chmod(0o300)
    with pytest.warns(RuntimeWarning, match="does not let its folder be read"):
        write(folder / "x", "new")
    folder.chmod(0o700)
    assert os.listdir(folder) == ["x"]
