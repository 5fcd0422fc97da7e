"""`JSONLines`: metrics as lines of JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fitloop._format import json_ready
from fitloop.loggers.file_logger import FileLogger
from fitloop.loggers.logger import LoggedRun, Row, RowKey


class JSONLines(FileLogger):
    """A logger that appends a line of JSON for each row to a file.

    A line has ``run`` (the id of the training), ``trainer``, ``kind`` (``"phase"`` or ``"steps"``),
    ``phase``, ``epoch``, ``step``, ``time`` (seconds since 1970), and the metrics by names such as
    ``train/loss``. A number that is not finite is null. Each training begins with a line of the
    kind ``"start"``, which has its ``sweep`` and ``parameters``.

    Lines are only appended: a new training follows the earlier ones, with another ``run``. Several
    trainings can share a file at the same time, also of several processes. When a training is
    resumed, its lines after the snapshot are removed.

    Args:
        path: the file. By default ``metrics.jsonl`` in the ``save_path`` of the trainer.
        options: arguments of `Logger`.
    """

    file_name = "metrics.jsonl"

    def start(self, run: LoggedRun) -> None:
        """Write the first line of a new run."""
        super().start(run)
        file = self.file(run)
        if file.has(f'{{"run": "{run.id}"'.encode()):
            return
        settings = {"sweep": run.sweep, "parameters": run.parameters}
        line = _encoded({"run": run.id, "trainer": run.name, "kind": "start", **settings})
        file.append(lambda _first: line)

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Append a line for each row."""
        lines = b"".join(_line(run, row) for row in rows)
        self.file(run).append(lambda _first: lines)

    @staticmethod
    def is_torn(line: bytes) -> bool:
        """See `LineFile`."""
        beginning = b'{"run": '
        is_ours = line[: len(beginning)] == beginning[: len(line)]
        return is_ours and _object(line) is None

    @staticmethod
    def key_of_line(line: bytes, run: LoggedRun) -> RowKey | None:
        """See `FileLogger`."""
        if run.id.encode() not in line:  # quicker than to read each line of a large file
            return None
        values = _object(line)
        if values is None or values.get("run") != run.id or not isinstance(values.get("step"), int):
            return None
        return RowKey(str(values.get("kind")), str(values.get("phase")), values["step"])


def _line(run: LoggedRun, row: Row) -> bytes:
    values = {
        **{"run": run.id, "trainer": run.name, "kind": row.kind, "phase": row.phase},
        **{"epoch": row.epoch, "step": row.step, "time": row.time},
        **row.named(),
    }
    return _encoded(values)


def _encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(json_ready(values), allow_nan=False, default=str).encode() + b"\n"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
