"""`LineFile`: a text file of lines to which several threads and processes append.

Owns the locking and the integrity of such a file. Must not know the meaning of the lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from fitloop._blocks import contextmanager
from fitloop._storage.durable import make_directory, open_regular, read_file, write_all, write_bytes

try:
    import fcntl
except ImportError:  # Windows: a file is for one process there
    fcntl = None  # type: ignore[assignment]

_BLOCK = 2**12
"""bytes that are read at first for the last line"""


class LineFile:
    """A file of lines at a path, which is created when it is first written to.

    It is opened and locked for each access, so that any number of loggers can share it; on a file
    system without locks, and on Windows, those of one process at a time may. All methods block, and
    raise OSError.

    Args:
        path: the file.
        is_torn: returns whether a last line without a line end is the beginning of one that was
            not written completely, since its process died. The next `append` removes it; any other
            one is completed by a line end.
    """

    def __init__(self, path: Path, is_torn: Callable[[bytes], bool]) -> None:
        self.path = path
        self._is_torn = is_torn

    def lines(self) -> list[bytes]:
        """Return all complete lines, without their ends; none if there is no file."""
        try:
            lines = read_file(self.path).split(b"\n")
        except FileNotFoundError:
            return []
        last = lines.pop()
        return lines if not last or self._is_torn(last) else [*lines, last]

    def has(self, text: bytes) -> bool:
        """Return whether some text is anywhere in the file."""
        try:
            return text in read_file(self.path)
        except FileNotFoundError:
            return False

    def append(self, make: Callable[[bytes], bytes]) -> None:
        """Append the lines that a function of the first line returns, which is empty at first.

        If that fails, the file is as before.
        """
        with self._locked() as descriptor:
            size = self._mend(descriptor)
            lines = make(_first_line(descriptor))
            try:
                write_all(descriptor, lines)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise

    def rewrite(self, change: Callable[[list[bytes]], list[bytes]]) -> None:
        """Replace the lines by those that a function returns, completely or not at all."""
        with self._locked():
            lines = change(self.lines())
            write_bytes(self.path, b"".join(line + b"\n" for line in lines))

    def sync(self) -> None:
        """Make the file durable."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self.path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _mend(self, descriptor: int) -> int:
        """Complete or remove a last line without an end; return the size of the file."""
        size = os.fstat(descriptor).st_size
        last_line = b""
        for length in (_BLOCK, size):  # all of it only for a last line that is long
            tail = _read(descriptor, max(0, size - length), length)
            last_line = tail[tail.rfind(b"\n") + 1 :]
            if len(last_line) < len(tail):
                break
        if not last_line:
            return size
        if self._is_torn(last_line):
            os.ftruncate(descriptor, size - len(last_line))
            return size - len(last_line)
        write_all(descriptor, b"\n")
        return size + 1

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Open and lock the file, also against other threads; yield its descriptor."""
        while True:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            try:
                descriptor = open_regular(self.path, flags)
            except FileNotFoundError:
                make_directory(self.path.parent)
                descriptor = open_regular(self.path, flags)
            try:
                if fcntl is not None:
                    with suppress(OSError):  # a file system without locks
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(self.path, descriptor):  # else another one has replaced it meanwhile
                    yield descriptor
                    return
            finally:
                os.close(descriptor)


def _read(descriptor: int, start: int, length: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(start)
        return file.read(length)


def _first_line(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.readline().removesuffix(b"\n")


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
