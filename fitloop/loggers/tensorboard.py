"""`TensorBoard`: metrics as event files of TensorBoard."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Unpack

from fitloop._arguments import absolute_path, checked_arguments
from fitloop._events import RunEnded
from fitloop.loggers.logger import (
    LoggedRun,
    Logger,
    LoggerOptions,
    Row,
    RowKey,
    check_installed,
    key_of_name,
)

_FILES = "*tfevents*"


class TensorBoard(Logger):
    """A logger that writes event files of TensorBoard; needs the package ``tensorboard``.

    Each training has a folder in ``directory``, named after its trainer and its id. Its curves have
    names such as ``train/loss``, over the optimizer steps. The settings of trainings, also those of
    a `Runner`, are on the page HPARAMS.

    When a training is resumed, TensorBoard does not show the points after the snapshot any more.

    Args:
        directory: the argument for ``tensorboard --logdir``. By default the folder
            ``tensorboard`` in the ``save_path`` of the trainer.
        options: arguments of `Logger`.

    Raises:
        ConfigurationError: the package is not installed, or an argument is invalid.
    """

    @checked_arguments(passed_on=LoggerOptions.__annotations__)
    def __init__(
        self, directory: str | os.PathLike[str] | None = None, **options: Unpack[LoggerOptions]
    ) -> None:
        check_installed("tensorboard")
        super().__init__(**options)
        self._directory = (
            None if directory is None else absolute_path("directory", directory, "a path, or None")
        )

    def folder(self, run: LoggedRun) -> Path:
        """Return the folder of a run."""
        parent = self._directory or run.save_path / "tensorboard"
        name = re.sub(r"[^\w.=+,@-]", "_", run.name)[:100].lstrip(".")
        return parent / f"{name}-{run.id}"

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        """Return the keys of the points that TensorBoard shows."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.compat.proto.event_pb2 import SessionLog

        keys: set[RowKey] = set()
        for path in sorted(self.folder(run).glob(_FILES)):
            for event in EventFileLoader(str(path)).Load():
                if event.session_log.status == SessionLog.START:
                    keys = {key for key in keys if key.step < event.step}
                found_keys = (key_of_name(value.tag, event.step) for value in event.summary.value)
                keys.update(key for key in found_keys if key is not None)
        return keys

    def cut(self, run: LoggedRun, step: int) -> bool:
        """Have TensorBoard hide the points with a larger step."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._write(run, [Event(wall_time=time.time(), step=step + 1, session_log=start)])
        return True

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Write the points of rows."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(
            run,
            [
                Event(
                    wall_time=row.time,
                    step=row.step,
                    summary=Summary(
                        value=[
                            Summary.Value(tag=name, simple_value=value)
                            for name, value in row.named().items()
                        ]
                    ),
                )
                for row in rows
            ],
        )

    def _write(self, run: LoggedRun, events: Sequence[Any]) -> None:
        """Append events; if that fails, the file ends with those of the last call."""
        file = self.opened.get(run.id) or self._open(run)
        size = file.tell()
        try:
            _write_records(file, events)
        except BaseException:
            del self.opened[run.id]
            _cut_file(file, size)
            raise

    def _open(self, run: LoggedRun) -> IO[bytes]:
        from tensorboard.compat.proto.event_pb2 import Event

        folder = self.folder(run)
        is_new = not any(folder.glob(_FILES))
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        file = open(folder / name, "xb")  # noqa: SIM115 - `end` closes it
        self.opened[run.id] = file
        events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if is_new:
            events += _hyper_parameters(run, folder.name)
        _write_records(file, events)
        return file

    def sync(self, run: LoggedRun) -> None:
        """Make the points durable."""
        file = self.opened.get(run.id)
        if file is not None:
            os.fsync(file.fileno())

    def end(self, run: LoggedRun, event: RunEnded) -> None:
        """Close the file. The next fit of the training writes another one."""
        file = self.opened.pop(run.id, None)
        if file is not None:
            file.close()


def _write_records(file: IO[bytes], events: Sequence[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())
    writer.flush()


def _cut_file(file: IO[bytes], size: int) -> None:
    try:
        file.close()  # it writes what is in its buffer, and may fail again
    except OSError:
        pass
    finally:
        os.truncate(file.name, size)


def _hyper_parameters(run: LoggedRun, label: str) -> list[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    kinds = bool | int | float | str
    values = {
        name: value if isinstance(value, kinds) else str(value)
        for name, value in run.parameters.items()
    }
    if not values:
        return []
    summary = hparams_pb(values, trial_id=label)
    return [Event(wall_time=time.time(), summary=summary)]
