"""`FileLogger`: the base of the loggers that write lines into a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar, Unpack

from fitloop._arguments import absolute_path, checked_arguments
from fitloop._errors import ConfigurationError
from fitloop.loggers.line_file import LineFile
from fitloop.loggers.logger import LoggedRun, Logger, LoggerOptions, RowKey


class FileLogger(Logger):
    """A logger with a line for each row in a file, which several trainings can share.

    A subclass also has `write`.

    Args:
        path: the file; by default `file_name` in the ``save_path`` of the trainer.
        options: arguments of `Logger`.
    """

    file_name: ClassVar[str]

    @checked_arguments(passed_on=LoggerOptions.__annotations__)
    def __init__(
        self, path: str | os.PathLike[str] | None = None, **options: Unpack[LoggerOptions]
    ) -> None:
        super().__init__(**options)
        self._path = None if path is None else absolute_path("path", path, "a path, or None")

    def start(self, run: LoggedRun) -> None:
        """Refuse a directory, a pipe or a device, to which no attempt can write a table."""
        path = self.file(run).path
        if path.is_dir():
            raise ConfigurationError(
                f"{path} is a directory; expected the path of a file, such as "
                f"{path / self.file_name}"
            )
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"{path} is a pipe or a device; expected the path of a file")

    @staticmethod
    def is_torn(line: bytes) -> bool:
        """See `LineFile`."""
        raise NotImplementedError

    @staticmethod
    def key_of_line(line: bytes, run: LoggedRun) -> RowKey | None:
        """Return the key of the row in a line; None for a line of another run, or of no row."""
        raise NotImplementedError

    def file(self, run: LoggedRun) -> LineFile:
        """Return the file with the lines of a run."""
        return LineFile(self._path or run.save_path / self.file_name, self.is_torn)

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        """Return the keys of the lines of a run."""
        lines = self.file(run).lines()
        return [key for line in lines if (key := self.key_of_line(line, run)) is not None]

    def cut(self, run: LoggedRun, step: int) -> bool:
        """Remove the lines of a run with a larger step; the file is replaced by one without them.

        Lines of other runs, and those of no row, stay.
        """

        def stays(line: bytes) -> bool:
            key = self.key_of_line(line, run)
            return key is None or key.step <= step

        self.file(run).rewrite(lambda lines: list(filter(stays, lines)))
        return True

    def sync(self, run: LoggedRun) -> None:
        """Make the lines durable."""
        self.file(run).sync()
