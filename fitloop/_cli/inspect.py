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
    RUN_ID_NAME,
    count,
    describe_file,
    file_size,
    files_in,
    position_text,
    safetensors_entries,
)
from fitloop._cli.logger_files import SUFFIXES, last_rows, row_text
from fitloop._errors import CheckpointError, FitLoopError
from fitloop._format import format_duration, format_metrics, format_number, json_ready, printable
from fitloop._metrics.history import History
from fitloop._runner.records import Record, read_outcome, read_record
from fitloop._runner.results import Results, read_results
from fitloop._storage.durable import LOCK_NAME, LOG_NAME, is_locked, open_regular
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
        _print_any(path, options)
    except FitLoopError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is not as fitloop writes it: {type(error).__name__}: {error}"
        ) from error
    return 0


def _print_any(path: Path, options: argparse.Namespace) -> None:
    """Print what is at a path. A forged file may raise anything."""
    if path.is_dir():
        _print_directory(path, as_json=options.json)
    elif path.name in (LOCK_NAME, PROGRESS_NAME, RUN_ID_NAME) and path.is_file():
        _print_small_file(path, as_json=options.json)
    elif path.name == OUTCOME_NAME and os.path.lexists(path):
        _print_outcome(path, as_json=options.json)
    elif path.name == LOG_NAME or _first_bytes(path, 1) == LOG_MARK:
        _print_log(path, as_json=options.json)
    elif path.suffix.lower() in OTHER_WEIGHTS:
        _print_weights(path, options)
    elif path.suffix.lower() in SUFFIXES:
        _print_logged(path, as_json=options.json)
    else:
        _print_file(path, options)


def _first_bytes(path: Path, count: int) -> bytes:
    with suppress(OSError):
        descriptor = open_regular(path)
        try:
            return os.read(descriptor, count)
        finally:
            os.close(descriptor)
    return b""


def _print_json(values: dict[str, Any]) -> None:
    print_line(json.dumps(json_ready(values), indent=1))


# -- directories -----------------------------------------------------------------------------------


def _print_directory(path: Path, *, as_json: bool) -> None:
    record = read_record(path)
    jobs = Results([]) if record is not None else read_results(path)
    files = files_in(path)
    if record is not None:
        _print_training(path, record, files, as_json=as_json)
    elif jobs:
        _print_jobs(path, jobs, as_json=as_json)
    elif files:
        _print_files(path, files, as_json=as_json)
    else:
        raise CheckpointError(
            f"{path} holds no file of fitloop; expected a file of fitloop, or the save_path of a "
            "trainer or a Runner"
        )


def _print_jobs(path: Path, results: Results[Record], *, as_json: bool) -> None:
    """Print the jobs of a Runner's directory."""
    if as_json:
        _print_json({"kind": "jobs", "jobs": results.sorted().rows()})
        return
    print_line(f"{path}: {count(len(results), 'job')}")
    print_line(str(results))


def _print_training(path: Path, record: Record, files: list[Path], *, as_json: bool) -> None:
    """Print the training whose ``save_path`` is a directory."""
    if as_json:
        names = [str(file.relative_to(path)) for file in files]
        _print_json({"kind": "training", **Results([record]).rows()[0], "files": names})
        return
    log = read_log(path) if os.path.lexists(path / LOG_NAME) else None
    is_job = log is None or os.path.lexists(path / OUTCOME_NAME)
    name = record.name if log is None or is_job else log.trainer
    print_line(f"{path}: training of {name!r}, {count(len(files), 'file')}")
    lines = _record_lines(record)
    if log is not None and log.run is not None and log.run.call != "fit":
        reason = log.end.stop_reason if log.end is not None else record.status
        lines = [f"  status     {log.run.call} {reason}"]
    print_line("\n".join([*lines, *([] if log is None else _metrics_lines(log.history))]))
    _print_file_list(path, files)


def _print_files(path: Path, files: list[Path], *, as_json: bool) -> None:
    if as_json:
        names = [str(file.relative_to(path)) for file in files]
        _print_json({"kind": "files", "files": names})
        return
    print_line(f"{path}: {count(len(files), 'file')}")
    _print_file_list(path, files)


def _print_file_list(path: Path, files: list[Path]) -> None:
    names = [printable(str(file.relative_to(path))) for file in files]
    width = max(map(len, names), default=0)
    for name, file in zip(names, files, strict=True):
        print_line(f"    {name:{width}}  {describe_file(file)}")


# -- trainings -------------------------------------------------------------------------------------


def _print_outcome(path: Path, *, as_json: bool) -> None:
    record = read_outcome(path.parent)
    assert record is not None
    if as_json:
        _print_json({"kind": "outcome", **Results([record]).rows()[0]})
        return
    print_line(f"{path}: outcome of job {record.name!r}")
    print_line("\n".join(_record_lines(record)))


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


def _print_log(path: Path, *, as_json: bool) -> None:
    log = read_log(path)
    if as_json:
        _print_json({"kind": "metrics", "trainer": log.trainer, "last": _last(log.history)})
        return
    train, test = log.history.train_runs, log.history.test_runs
    runs = f"{count(train, 'run')} of fit" + (f", {test} of test" if test else "")
    print_line(f"{path}: log of the metrics of {log.trainer!r}, {runs}")
    print_line("\n".join(_metrics_lines(log.history)))


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


def _print_small_file(path: Path, *, as_json: bool) -> None:
    """Print the lock of a directory, the progress of the present phase, or the id of a training."""
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
    if as_json:
        _print_json(values)
        return
    kind, *fields = values.items()
    print_line(f"{path}: {kind[1]}, " + ", ".join(f"{key} {value}" for key, value in fields))


def _print_logged(path: Path, *, as_json: bool) -> None:
    """Print the last metrics of the newest training in the file of a logger."""
    rows = last_rows(path)
    if as_json:
        _print_json({"kind": "logged", "last": rows})
        return
    print_line(f"{path}: {SUFFIXES[path.suffix.lower()]}, training of {rows[-1]['trainer']!r}")
    for row in rows:
        print_line(f"  {row['phase']:10} {row_text(row)}")


# -- files with tensors ----------------------------------------------------------------------------


def _print_file(path: Path, options: argparse.Namespace) -> None:
    header, entries, size = read_header(path)
    fields = {key: value for key, value in header.items() if key not in HIDDEN_KEYS}
    if options.json:
        _print_json({**fields, "tensors": _tensors_json(entries), "nbytes": size})
        return
    lines = [f"{path}: {describe_file(path)}"]
    if header["kind"] == SNAPSHOT:
        lines += _snapshot_lines(fields)
    print_line("\n".join(map(printable, lines)))
    _print_tensors(entries, everything=options.all)


def _print_weights(path: Path, options: argparse.Namespace) -> None:
    """Print the tensors of a file of safetensors, or of torch, which must read all of it."""
    if path.suffix.lower() == ".safetensors":
        entries = safetensors_entries(path)
    else:
        from fitloop._storage.weight_files import read_weights

        entries = [
            TensorEntry(name, None, str(value.dtype)[6:], tuple(value.shape), value.nbytes, 0)
            for name, value in read_weights(path).items()
        ]
    size = path.stat().st_size
    if options.json:
        _print_json({"kind": "weights", "tensors": _tensors_json(entries), "nbytes": size})
        return
    print_line(f"{path}: weights, {file_size(size)}")
    _print_tensors(entries, everything=options.all)


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


def _print_tensors(entries: list[TensorEntry], *, everything: bool) -> None:
    total = sum(entry.nbytes for entry in entries)
    print_line(f"  tensors    {len(entries)}, {file_size(total)}")
    entries = [entry._replace(name=printable(entry.name)) for entry in entries]
    listed = entries if everything else entries[:MAX_TENSORS]
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        if entry.same_as is not None:
            print_line(f"    {entry.name:{width}}  the same as {entry.same_as}")
            continue
        shape = "x".join(map(str, entry.shape)) or "scalar"
        print_line(
            f"    {entry.name:{width}}  {entry.dtype:9} {shape:>16}  {file_size(entry.nbytes):>10}"
        )
    if len(listed) < len(entries):
        print_line(f"    ... and {len(entries) - len(listed)} more, see --all")
