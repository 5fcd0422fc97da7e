"""Durable files: written to a temporary file, synced, renamed; and locks of directories.

Owns the use of the file system: temporary names, and directories that one process at a time may
write to. Knows nothing about the content of files. All functions block.

A temporary file is locked by the process that writes it. One without a lock was left by a process
that died; the next writer in the directory removes it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fitloop._errors import CheckpointError, LockWarning, warn_user

try:
    import fcntl
except ImportError:  # Windows, which does not delete a file that is open
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

TEMPORARY_PREFIX = ".fitloop-"
PART_SUFFIX = ".part"
"""suffix of a second temporary file, which a library writes; removed with the first one"""
LOCK_NAME = ".fitloop.lock"
LOG_NAME = "metrics.msgpack"
"""file of a trainer's metrics, in its ``save_path``"""
RUN_ID_NAME = "run_id"
"""file with the `RunStarted.run_id` of a training, in its ``save_path``"""
PROBE_SECONDS = 0.1
"""longer than `is_locked` ever holds a lock"""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""errors of ``os.link`` on a file system without hard links"""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""errors of ``flock`` on a file system without locks, such as some of NFS, SMB, Lustre and FUSE"""
_file_systems_without_locks: set[int] = set()
"""device numbers of those that were warned of"""
_check_commit: Callable[[], None] = lambda: None  # noqa: E731
"""called before a complete file gets its name"""


def reason(error: BaseException) -> str:
    """Return a short text for an error, without the path that an OSError names."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)


def _file_exists(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} exists already; pass overwrite=True to replace it")


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a file, by default for reading, and return its descriptor; never wait, as for a pipe.

    Raises OSError, also for something that is no regular file: a directory, a pipe, a device.
    """
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", os.fspath(path))
    return descriptor


def read_file(path: Path, limit: int = -1) -> bytes:
    """Return the content of a file, or its first ``limit`` bytes.

    Raises OSError, also for something that is no regular file.
    """
    with open(open_regular(path), "rb") as file:
        return file.read(limit)


def write_file(path: Path, write: Callable[[Path, int], T], *, overwrite: bool) -> T:
    """Write a file at ``path``, which is durable when this returns; make missing directories.

    ``write(temporary path, its descriptor)`` writes the content; its result is returned. After an
    error the directory is as before, unless only the new name could not be made durable: then the
    complete file is at ``path``. Of two writers without ``overwrite`` one succeeds; without hard
    links the later one may win.

    Raises OSError, an exception from ``write``, or `CheckpointError` if the file exists and not
    ``overwrite``.
    """
    make_directory(path.parent)
    if not overwrite and os.path.lexists(path):  # `_move` checks again, but late
        raise _file_exists(path)
    remove_leftovers(path.parent)
    temporary, descriptor = _temporary_in(path.parent)
    try:
        result = write(temporary, descriptor)
        _sync(temporary)  # by name: ``write`` may have replaced the file
        if fcntl is None:  # Windows does not move an open file
            os.close(descriptor)
            descriptor = -1
        _check_commit()
        _move(temporary, path, overwrite)
    finally:
        for leftover in (temporary, temporary.with_suffix(PART_SUFFIX)):
            with suppress(OSError):
                leftover.unlink()
        if descriptor >= 0:
            os.close(descriptor)  # last: it unlocks the file, which others may then remove
    sync_directory(path.parent)
    return result


def set_commit_check(check: Callable[[], None]) -> None:
    """Have `write_file` call a function in this process before a complete file gets its name."""
    global _check_commit
    _check_commit = check


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at ``path`` by one that holds ``data``; raises OSError."""
    write_file(path, lambda _temporary, descriptor: write_all(descriptor, data), overwrite=True)


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data``, although the system may write less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _temporary_in(directory: Path) -> tuple[Path, int]:
    """Create and lock an empty file; return its path and descriptor."""
    while True:
        path = directory / f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        if fcntl is None:
            return path, descriptor
        is_locked_here = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process locked it first, to remove it as a leftover
            is_locked_here = False
        except OSError:  # a file system without locks
            pass
        if is_locked_here and os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of processes that have died."""
    with suppress(OSError):
        for path in directory.glob(f"{TEMPORARY_PREFIX}*.tmp"):
            with suppress(OSError):
                if fcntl is None:
                    path.unlink()
                    continue
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    path.with_suffix(PART_SUFFIX).unlink(missing_ok=True)
                finally:
                    os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, durably. Raises OSError."""
    if directory.is_dir():
        return
    if directory.parent != directory:
        make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    if os.name == "nt":  # Windows opens no directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename the file to ``path``; without ``overwrite`` only if no file has this name."""
    if not overwrite:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise _file_exists(path) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise _file_exists(path) from None
        else:
            return
    os.replace(temporary, path)


class DirectoryLock:
    """An exclusive lock on a directory, for one trainer of one process; ends with the process."""

    def __init__(self, directory: Path) -> None:
        from filelock import FileLock  # slow to import

        self._directory = directory
        options: dict[str, Any] = {"timeout": 0, "thread_local": False}
        try:  # not a lock that stays when its process is killed
            self._lock = FileLock(directory / LOCK_NAME, **options, fallback_to_soft=False)
        except TypeError:  # an older filelock
            self._lock = FileLock(directory / LOCK_NAME, **options)

    def acquire(self) -> None:
        """Acquire the lock; make the directory if it is missing.

        On a file system without locks, warn once with a `LockWarning`, and go on.

        Raises `CheckpointError` if the directory is locked, or cannot be made or written to.
        """
        from filelock import Timeout

        try:
            make_directory(self._directory)
            # With a timeout: `is_locked` of another process may hold the lock for a moment.
            self._lock.acquire(timeout=PROBE_SECONDS, poll_interval=PROBE_SECONDS / 10)
        except Timeout:
            raise CheckpointError(
                f"{self._directory} is in use by another running trainer, maybe of another "
                f"process{self._holder()}; wait for it, or give this one another save_path. If no "
                "such process runs any more (a network file system may keep the lock of a machine "
                f"that died), delete {self._directory / LOCK_NAME}"
            ) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise CheckpointError(
                    f"{self._directory} cannot be written to: {reason(error)}"
                ) from error
            self._warn_of_no_lock(error)
            return
        self._name_holder()

    def _name_holder(self) -> None:
        """Write this process into the file of the lock, for `_holder`."""
        flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0)
        with suppress(OSError):
            descriptor = os.open(self._directory / LOCK_NAME, flags)
            try:
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
            finally:
                os.close(descriptor)

    def _holder(self) -> str:
        """Return the process that holds the lock, as far as its file says."""
        text = b""
        with suppress(OSError):
            descriptor = open_regular(self._directory / LOCK_NAME)
            try:
                text = os.read(descriptor, 100)
            finally:
                os.close(descriptor)
        match = re.fullmatch(rb"(\d+) ([\w.-]+)", text)
        return f" ({match[1].decode()} on {match[2].decode()})" if match else ""

    def _warn_of_no_lock(self, error: BaseException) -> None:
        device = os.stat(self._directory).st_dev
        if device not in _file_systems_without_locks:
            _file_systems_without_locks.add(device)
            warn_user(
                f"{self._directory} cannot be locked, since its file system has no locks "
                f"({reason(error)}). The training goes on; make sure that no other trainer uses "
                "the same save_path at the same time",
                LockWarning,
            )

    def release(self) -> None:
        """Release the lock, if it is acquired."""
        self._lock.release()


def is_locked(directory: Path) -> bool | None:
    """Return whether a trainer of any process has locked ``directory``.

    None on Windows and on a file system without locks, where this is unknown.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that two processes that call this do not block each other. A free lock is
        # acquired for a moment; `DirectoryLock.acquire` waits for that long.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
