"""Atomic files and folders: a path holds the old content or all of the new content, also after a kill or a power loss.

New content is written under a temporary name in the same folder, brought to disk (fsync) and renamed. The temporary's
name is `.NAME.XXXXXXXX.partial` with a random part; it is opened with O_EXCL and O_NOFOLLOW, so no other file is
followed or overwritten. Its writer holds a lock on it (flock): the next writer of NAME deletes the temporaries without
one, which killed processes have left.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_SUFFIX = ".partial"
_LONGEST_STEM = 200  # bytes: with the random part and the suffix below the usual limit of a name, 255
_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
NO_FLOCK = _NO_FSYNC | {errno.ENOLCK, errno.EBADF}  # EBADF: a folder on NFS, which locks what is open for writing


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """An empty binary file that replaces `path` when the block ends; if the block raises, `path` is as before.

    The mode of a replaced file is kept. A symbolic link at `path` is replaced, not followed.

    Args:
        path: the file to create or replace.

    Raises:
        OSError: the file cannot be written, and `path` is as before; or the message says that the new file is in place
            and its folder could not be brought to disk. The error names `path`.
        KeyboardInterrupt: `path` is the old or the new file, and complete.
    """
    path = os.fsdecode(path)
    with _named(path):
        mode = _mode(path)
        temporary, file = _locked_file(path, mode)
    try:
        with _named(path, temporary):
            with open(file, "w+b", closefd=False) as stream:
                yield stream
            _to_disk(file, path)
            os.rename(temporary, path)
    except BaseException:
        _delete(temporary)  # which is gone if a signal has arrived after the rename
        raise
    finally:
        os.close(file)
    _folder_to_disk(path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file by a text in UTF-8; as `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def create_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends; if the block raises, it is deleted.

    Parents are created. The mode of a replaced folder is kept; files get the folder's mode without the x bits.

    Args:
        path: the folder to create; an empty folder there is replaced.

    Raises:
        FileExistsError: there is a file at `path`, or a folder that is not empty.
        OSError: as `replace_file`.
        KeyboardInterrupt: `path` is complete or was not created.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "path must be new or an empty folder", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _named(str(folder)):
        name, descriptor = _locked_folder(str(folder))
    temporary = Path(name)
    try:
        if folder.exists():
            os.chmod(descriptor, stat.S_IMODE(folder.stat().st_mode))
        yield temporary
        with _named(str(folder), name):
            file_mode = stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o666
            inside = [inner for inner in temporary.rglob("*") if not inner.is_symlink()]
            for inner in sorted(inside, reverse=True):  # the contents of a folder before the folder
                if inner.is_file():
                    inner.chmod(file_mode)  # safetensors creates files that only their owner can read
                _path_to_disk(inner, str(folder))
            _to_disk(descriptor, str(folder))
            os.rename(temporary, folder)
    except BaseException:
        _delete(name)  # which is gone if a signal has arrived after the rename
        raise
    finally:
        os.close(descriptor)
    _folder_to_disk(str(folder))


# ---- temporaries ----


def _stem(path: str) -> str:
    """What the names of all temporaries of a path begin with."""
    readable = os.fsencode(os.path.basename(path))[:_LONGEST_STEM].decode(errors="ignore")
    return f".{readable}."


def _temporary(path: str) -> str:
    return os.path.join(os.path.dirname(path), f"{_stem(path)}{secrets.token_hex(4)}{_SUFFIX}")


def _mode(path: str) -> int | None:
    """Permissions of the file at `path`, or None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "path must be a file, got a folder", path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "path must be a regular file, got a device, pipe or socket", path)
    return stat.S_IMODE(status.st_mode)


def _locked_file(path: str, mode: int | None) -> tuple[str, int]:
    """Name and descriptor of a new temporary of `path`, an empty file with a lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

    def create(temporary: str) -> int:
        file = os.open(temporary, flags, 0o666 if mode is None else 0o600)
        if mode is not None:
            os.fchmod(file, mode)
        return file

    return _locked(path, create)


def _locked_folder(path: str) -> tuple[str, int]:
    """The same of a folder."""

    def create(temporary: str) -> int:
        os.mkdir(temporary)
        try:
            return os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except BaseException:
            os.rmdir(temporary)
            raise

    return _locked(path, create)


def _locked(path: str, create: Callable[[str], int]) -> tuple[str, int]:
    _delete_abandoned(path)
    while True:
        temporary = _temporary(path)
        with _named(path, temporary):
            descriptor = create(temporary)
        try:
            _lock(descriptor, path)
            if os.path.exists(temporary):
                return temporary, descriptor
        except BaseException:
            os.close(descriptor)
            _delete(temporary)
            raise
        os.close(descriptor)  # another writer found it before it was locked, and has deleted it


def _lock(descriptor: int, path: str) -> None:
    """Marks a temporary as in use; on a file system without locks a warning."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        _warn(path, "has no file locks: what killed processes leave (.*.partial) must be deleted by hand", error)


def _delete(temporary: str) -> None:
    """A file or a folder; it may be gone."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        else:
            os.unlink(temporary)


def _delete_abandoned(path: str) -> None:
    """Deletes the temporaries of `path` that no process has locked."""
    try:
        names = os.listdir(os.path.dirname(path) or ".")
    except PermissionError:  # a folder may be writable and not readable
        return
    stem = _stem(path)
    for name in names:
        if not _is_temporary(name, stem):
            continue
        beside = os.path.join(os.path.dirname(path), name)
        try:
            descriptor = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # deleted or renamed by its writer, a link, or another user's: not ours to delete
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _delete(beside)
        except OSError:  # in use, or no locks here
            continue
        finally:
            os.close(descriptor)


def _is_temporary(name: str, stem: str) -> bool:
    random = name[len(stem) : -len(_SUFFIX)]
    hexadecimal = len(random) == 8 and set(random) <= set("0123456789abcdef")
    return name == f"{stem}{random}{_SUFFIX}" and hexadecimal


# ---- to disk ----


def _to_disk(descriptor: int, path: str) -> None:
    """Waits until a file, or the names in a folder, would survive a power loss."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        _warn(path, "cannot bring it to disk (fsync): a power loss may lose the new content", error)


def _path_to_disk(path: str | Path, named: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _to_disk(descriptor, named)
    finally:
        os.close(descriptor)


def _folder_to_disk(path: str) -> None:
    """The rename of `path`, which has happened."""
    try:
        _path_to_disk(os.path.dirname(path) or ".", path)
    except PermissionError as error:  # a folder may be writable and not readable
        _warn(path, "does not let its folder be read: a power loss may undo the rename", error)
    except OSError as error:
        message = f"the new content is in place, but its folder cannot be brought to disk ({error.strerror})"
        raise OSError(error.errno, message, path) from None


def _warn(path: str, what: str, error: OSError) -> None:
    warnings.warn(f"the file system of {path} {what} ({error.strerror})", RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def _named(path: str, temporary: str | None = None) -> Iterator[None]:
    """Errors that name no file, or the temporary, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, temporary):
            error.filename = path
            if error.filename2 is not None:
                del error.filename2
        raise
