"""How a file comes to its place whole, and stays there: temporary file, fsync, rename, fsync.

Owns the ways of the file system: temporary names, whose they are, and directories that belong
to one process at a time. Knows nothing of what is written. Everything here blocks.

A temporary file is locked by the process that writes it. What is not locked was left behind by
a process that died, and is removed by whoever writes next to it.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fitloop._errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows, which does not delete a file that is open
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

TEMPORARY = ".fitloop-"
"""how the names of temporary files begin"""
PART = ".part"
"""suffix of a file that is made on the way to a temporary one, and removed with it"""
LOCK = ".fitloop.lock"
ASKING_SECONDS = 0.1
"""longer than `is_locked` ever holds a lock"""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""what a file system without hard links answers to ``os.link``"""


def reason(error: BaseException) -> str:
    """Return the shortest words for an error."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)


def already_there(path: Path) -> CheckpointError:
    """Return the error of a file that is not to be replaced."""
    return CheckpointError(f"{path} exists already; pass overwrite=True to replace it")


def write_file(path: Path, write: Callable[[Path, int], T], *, overwrite: bool) -> T:
    """Have ``write(temporary path, its descriptor)`` make a file, and move it to ``path``.

    The directory is made if need be. When this returns, the file is durable; when it raises,
    what was there before still is, and nothing else (unless it is the very last step that fails,
    making the new name durable: then the new file is there, whole). Of two writers without
    ``overwrite`` only one succeeds (on a file system without hard links the later one may win).

    Raises OSError, `CheckpointError` when the file exists, and what ``write`` raises.
    """
    make_directory(path.parent)
    if not overwrite and os.path.lexists(path):  # also asked at the end, but that is late
        raise already_there(path)
    remove_leftovers(path.parent)
    temporary, descriptor = _temporary_in(path.parent)
    try:
        result = write(temporary, descriptor)
        _sync(temporary)  # by name: ``write`` may have replaced the file
        if fcntl is None:  # what is open cannot be moved there
            os.close(descriptor)
            descriptor = -1
        _move(temporary, path, overwrite)
    finally:
        for left in (temporary, temporary.with_suffix(PART)):
            with suppress(OSError):
                left.unlink()
        if descriptor >= 0:
            os.close(descriptor)  # and unlock it: from now on it would be taken for a leftover
    sync_directory(path.parent)
    return result


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at ``path`` by one with ``data``, as `write_file` does; raises OSError."""
    write_file(path, lambda _temporary, descriptor: write_all(descriptor, data), overwrite=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write ``data`` to its end, although the system may write less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _temporary_in(directory: Path) -> tuple[Path, int]:
    """Make and lock an empty file."""
    while True:
        path = directory / f"{TEMPORARY}{secrets.token_hex(8)}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
        if fcntl is None:
            return path, descriptor
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody takes it for a leftover, before it was locked
            mine = False
        except OSError:  # a file system without locks
            pass
        if mine and os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of processes that are dead."""
    with suppress(OSError):
        for path in directory.glob(f"{TEMPORARY}*.tmp"):
            with suppress(OSError):
                if fcntl is None:
                    path.unlink()
                    continue
                descriptor = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    path.with_suffix(PART).unlink(missing_ok=True)
                finally:
                    os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, durably; raises OSError."""
    if directory.is_dir():
        return
    if directory.parent != directory:
        make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    if os.name == "nt":  # where a directory cannot be opened
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
    """Give the whole file its name; without ``overwrite`` only if no other has it by now."""
    if not overwrite:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise already_there(path) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                raise already_there(path) from None
        else:
            return
    os.replace(temporary, path)


class DirectoryLock:
    """A directory that only one trainer of one process writes to; ends with the process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        from filelock import FileLock  # slow to import

        self._lock = FileLock(directory / LOCK, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take it.

        Raises `CheckpointError` when somebody else has it, or the directory cannot be made.
        """
        from filelock import Timeout

        try:
            make_directory(self._directory)
            # Not at the first refusal: `is_locked` may be asking at this very moment.
            self._lock.acquire(timeout=ASKING_SECONDS, poll_interval=ASKING_SECONDS / 10)
        except Timeout:
            raise CheckpointError(
                f"{self._directory} is in use by another running trainer, maybe of another "
                "process; wait for it, or give this one another save_path"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self._directory} cannot be written to: {reason(error)}"
            ) from error

    def release(self) -> None:
        """Give it back; does nothing when it is not held."""
        self._lock.release()


def is_locked(directory: Path) -> bool | None:
    """Return whether a trainer, of any process, has the lock of ``directory``; it keeps it.

    None where that cannot be told: on Windows, and on a file system without locks.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that those who ask do not see each other. It takes the lock for a moment if
        # nobody has it, for which `DirectoryLock.acquire` is prepared.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
