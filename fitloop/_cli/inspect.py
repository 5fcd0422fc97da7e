"""``fitloop inspect``: shows the contents of a file or directory of fitloop.

Reads no tensor of a ``.msgpack`` or ``.safetensors``, and imports torch only for a ``.pt``.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fitloop._cli.common import print_line, read_header
from fitloop._cli.files import (
    OTHER_WEIGHTS,
    SUFFIXES,
    count,
    describe_file,
    file_size,
    files_in,
    last_rows,
    position_text,
    row_text,
    safetensors_entries,
)
from fitloop._errors import CheckpointError, FitLoopError
from fitloop._format import format_duration, format_metrics, format_number, json_ready, printable
from fitloop._metrics.history import History
from fitloop._runner.records import Record, read_outcome, read_record
from fitloop._runner.results import Results, read_results
from fitloop._storage.durable import LOCK_NAME, LOG_NAME, RUN_ID_NAME, is_locked, read_file
from fitloop._storage.job_files import OUTCOME_NAME
from fitloop._storage.layout import TensorEntry
from fitloop._storage.log_records import iter_records
from fitloop._storage.metric_log import PROGRESS_NAME, read_log, read_progress
from fitloop._types import Phase

SNAPSHOT = "snapshot"
"""the kind of file that `_checkpointing.snapshot` writes; importing its name would import torch"""
LOG_MARK = b"\x92"
"""first byte of a log of metrics; no other file of fitloop begins with it"""

MAX_TENSORS = 40
"""tensors listed without ``--all``"""

Contents = tuple[dict[str, Any], list[str]]
"""what is in a file or a directory: as values for JSON, and as lines of text"""
HIDDEN_KEYS = {"format", "tensors", "header_crc32", "state", "modules"}
"""keys of a header that say nothing to a person"""

ABOUT = """\
Print the contents of a file or a directory that fitloop wrote: the jobs in the save_path of a
Runner; the progress, metrics and files of a training; or of one file the training it comes from,
how far that was, and its tensors. It is quick for files of any size."""

EXAMPLES = """\
  fitloop inspect runs                             the jobs of a sweep
  fitloop inspect runs/a                           one training, even while it goes on
  fitloop inspect runs/a/snapshots/snapshot-000012.msgpack
  fitloop inspect model.msgpack --json | jq .nbytes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "file", type=Path, metavar="PATH", help="a file, or the save_path of a trainer or Runner"
    )
    parser.add_argument("--all", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")


def run(options: argparse.Namespace) -> int:
    """Print the contents; return the exit status."""
    path: Path = options.file
    try:
        values, lines = _contents(path, show_all=options.all)
        # A name may have a line end.
        text = "\n".join(map(printable, lines))
        print_line(json.dumps(json_ready(values), indent=1) if options.json else text)
    except FitLoopError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error
    return 0


def _contents(path: Path, *, show_all: bool) -> Contents:
    """Return what is at a path. A forged file may raise anything."""
    if path.is_dir():
        return _directory(path)
    if path.name in (LOCK_NAME, PROGRESS_NAME, RUN_ID_NAME) and path.is_file():
        return _small_file(path)
    if path.name == OUTCOME_NAME and os.path.lexists(path):
        return _outcome(path)
    if path.name == LOG_NAME or _first_bytes(path, 1) == LOG_MARK:
        return _log(path)
    if path.suffix.lower() in OTHER_WEIGHTS:
        return _weights(path, show_all=show_all)
    if path.suffix.lower() in SUFFIXES:
        return _logged(path)
    return _container(path, show_all=show_all)


def _first_bytes(path: Path, count: int) -> bytes:
    with suppress(OSError):
        return read_file(path, count)
    return b""


# -- directories -----------------------------------------------------------------------------------


def _directory(path: Path) -> Contents:
    record = read_record(path)
    jobs = Results([]) if record is not None else read_results(path)
    files = files_in(path)
    if record is not None:
        return _training(path, record, files)
    if jobs:
        head = f"{path}: {count(len(jobs), 'job')}"
        return {"kind": "jobs", "jobs": jobs.sorted().rows()}, [head, *str(jobs).split("\n")]
    if files:
        values = {"kind": "files", "files": _names(path, files)}
        return values, [f"{path}: {count(len(files), 'file')}", *_file_lines(path, files)]
    raise CheckpointError(
        f"{path} holds no file of fitloop; expected a file of fitloop, or the save_path of a "
        "trainer or a Runner"
    )


def _training(path: Path, record: Record, files: list[Path]) -> Contents:
    """Return the training whose ``save_path`` is a directory."""
    log = read_log(path) if os.path.lexists(path / LOG_NAME) else None
    is_job = log is None or os.path.lexists(path / OUTCOME_NAME)
    name = record.name if log is None or is_job else log.trainer
    lines = _record_lines(record)
    if log is not None and log.run is not None and log.run.call != "fit":
        reason = log.end.stop_reason if log.end is not None else record.status
        lines = [f"  status     {log.run.call} {reason}"]
    values = {"kind": "training", **Results([record]).rows()[0], "files": _names(path, files)}
    return values, [
        f"{path}: training of {name!r}, {count(len(files), 'file')}",
        *lines,
        *([] if log is None else _metrics_lines(log.history)),
        *_file_lines(path, files),
    ]


def _names(path: Path, files: list[Path]) -> list[str]:
    return [str(file.relative_to(path)) for file in files]


def _file_lines(path: Path, files: list[Path]) -> list[str]:
    names = [printable(name) for name in _names(path, files)]
    width = max(map(len, names), default=0)
    return [
        f"    {name:{width}}  {describe_file(file)}"
        for name, file in zip(names, files, strict=True)
    ]


# -- trainings -------------------------------------------------------------------------------------


def _outcome(path: Path) -> Contents:
    record = read_outcome(path.parent)
    assert record is not None
    values = {"kind": "outcome", **Results([record]).rows()[0]}
    return values, [f"{path}: outcome of job {record.name!r}", *_record_lines(record)]


def _record_lines(record: Record) -> list[str]:
    fit = record.result if record.result is not None else record.progress
    lines = []
    if record.arguments:
        lines.append(f"  arguments  {', '.join(f'{k}={v}' for k, v in record.arguments.items())}")
    status = record.status
    if fit is not None and status != "failed":
        status = fit.stop_reason
    done = "" if fit is None else f" after {fit.epochs} of {count(record.epochs, 'epoch')}"
    time = f", {format_duration(record.seconds)}" if record.seconds else ""
    lines.append(f"  status     {status}{done}{time}")
    if record.error is not None:
        lines.append(f"  error      {record.error.splitlines()[0]}")
    if fit is not None and fit.best_score is not None:
        criteria = fit.criteria or "score"
        best = f"{criteria} {format_number(fit.best_score)} in epoch {fit.best_epoch}"
        lines.append(f"  best       {best}")
    return lines


def _log(path: Path) -> Contents:
    log = read_log(path)
    train, test = log.history.train_runs, log.history.test_runs
    runs = f"{count(train, 'run')} of fit" + (f", {test} of test" if test else "")
    head = f"{path}: log of the metrics of {log.trainer!r}, {runs}"
    values = {"kind": "metrics", "trainer": log.trainer, "last": _last(log.history)}
    return values, [head, *_metrics_lines(log.history)]


def _last(history: History) -> dict[str, dict[str, float]]:
    """Return the metrics of the last epoch by phase; values of batches are no results."""
    return {
        str(phase): {n: s.last for n, s in getattr(history, phase).epoch_end.items()}
        for phase in Phase
    }


def _metrics_lines(history: History) -> list[str]:
    return [
        f"  {phase:10} {format_metrics(metrics, None)}"
        for phase, metrics in _last(history).items()
        if metrics
    ]


def _small_file(path: Path) -> Contents:
    """Return the lock of a directory, the progress of the present phase, or a training's id."""
    if path.name == LOCK_NAME:
        state = {True: "in use", False: "free", None: "unknown"}[is_locked(path.parent)]
        values: dict[str, Any] = {"kind": "lock of the directory", "state": state}
    elif path.name == RUN_ID_NAME:
        values = {
            "kind": "id of the training for loggers",
            "id": _first_bytes(path, 100).decode(errors="replace").strip(),
        }
    else:
        records = [record for record, _end in iter_records(read_progress(path.parent))]
        progress = records[0] if records else {}
        values = {"kind": "progress of a phase"} | {
            key: progress[key]
            for key in ("phase", "epoch", "batch", "batches", "samples")
            if key in progress
        }
    kind, *fields = values.items()
    return values, [f"{path}: {kind[1]}, " + ", ".join(f"{key} {value}" for key, value in fields)]


def _logged(path: Path) -> Contents:
    """Return the last metrics of the newest training in the file of a logger."""
    rows = last_rows(path)
    head = f"{path}: {SUFFIXES[path.suffix.lower()]}, training of {rows[-1]['trainer']!r}"
    lines = [f"  {row['phase']:10} {row_text(row)}" for row in rows]
    return {"kind": "logged", "last": rows}, [head, *lines]


# -- files with tensors ----------------------------------------------------------------------------


def _container(path: Path, *, show_all: bool) -> Contents:
    header, entries, size = read_header(path)
    fields = {key: value for key, value in header.items() if key not in HIDDEN_KEYS}
    snapshot = _snapshot_lines(fields) if header["kind"] == SNAPSHOT else []
    values = {**fields, "tensors": _tensors_json(entries), "nbytes": size}
    return values, [
        f"{path}: {describe_file(path)}",
        *snapshot,
        *_tensor_lines(entries, show_all=show_all),
    ]


def _weights(path: Path, *, show_all: bool) -> Contents:
    """Return the tensors of a file of safetensors, or of torch, which must read all of it."""
    if path.suffix.lower() == ".safetensors":
        entries = safetensors_entries(path)
    else:
        from fitloop._storage.weight_files import read_weights

        entries = [
            TensorEntry(name, None, str(value.dtype)[6:], tuple(value.shape), value.nbytes, 0)
            for name, value in read_weights(path).items()
        ]
    size = path.stat().st_size
    values = {"kind": "weights", "tensors": _tensors_json(entries), "nbytes": size}
    head = f"{path}: weights, {file_size(size)}"
    return values, [head, *_tensor_lines(entries, show_all=show_all)]


def _tensors_json(entries: list[TensorEntry]) -> list[dict[str, Any]]:
    return [
        {"name": e.name, "same_as": e.same_as}
        if e.same_as is not None
        else {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
        for e in entries
    ]


def _snapshot_lines(header: dict[str, Any]) -> list[str]:
    trainer, position = header["trainer"], header["position"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [f"  written    {header['written']}, {versions}"]
    seed = "no seed" if trainer["seed"] is None else f"seed {trainer['seed']}"
    lines.append(
        f"  trainer    {trainer['name']!r} of {trainer['model']}, {trainer['device']}, "
        f"{trainer['dtype']}, {seed}, {count(trainer['num_threads'], 'thread')}"
    )
    lines.append(f"  position   {position_text(trainer, position)}")
    if trainer["best_score"] is not None:
        best = f"{trainer['criteria'][0]} {format_number(trainer['best_score'])}"
        lines.append(f"  best       {best} in epoch {trainer['best_epoch']}")
    for phase, metrics in trainer["metrics"].items():
        if metrics:
            lines.append(f"  {phase:10} {format_metrics(metrics, None)}")
    return lines


def _tensor_lines(entries: list[TensorEntry], *, show_all: bool) -> list[str]:
    total = sum(entry.nbytes for entry in entries)
    lines = [f"  tensors    {len(entries)}, {file_size(total)}"]
    entries = [entry._replace(name=printable(entry.name)) for entry in entries]
    listed = entries if show_all else entries[:MAX_TENSORS]
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        if entry.same_as is not None:
            lines.append(f"    {entry.name:{width}}  the same as {entry.same_as}")
            continue
        shape = "x".join(map(str, entry.shape)) or "scalar"
        lines.append(
            f"    {entry.name:{width}}  {entry.dtype:9} {shape:>16}  {file_size(entry.nbytes):>10}"
        )
    if len(listed) < len(entries):
        lines.append(f"    ... and {len(entries) - len(listed)} more, see --all")
    return lines
