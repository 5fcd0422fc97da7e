"""``fitloop inspect``: shows the contents of a file of fitloop, without reading a tensor."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fitloop._cli.common import print_line, read_header
from fitloop._errors import CheckpointError, FitLoopError
from fitloop._format import format_metrics, format_number, json_ready, printable
from fitloop._storage.durable import open_regular
from fitloop._storage.layout import TensorEntry
from fitloop._storage.metric_log import LOG_NAME, read_metrics
from fitloop._types import Phase

SNAPSHOT = "snapshot"
"""the kind of file that `_checkpointing.snapshot` writes; importing its name would import torch"""

OUTCOME_NAME = "outcome.msgpack"
"""the file of a job, see `_runner.outcomes`; importing that would import torch"""
OTHER_WEIGHTS = {".safetensors", ".pt", ".pth"}
LOG_MARK = b"\x92"
"""first byte of a log of metrics; no other file of fitloop begins with it"""

MAX_TENSORS = 40
"""tensors listed without ``--all``"""

HIDDEN_KEYS = {"format", "tensors", "header_crc32", "state", "modules"}
"""keys of a header that say nothing to a person"""

ABOUT = """\
Print the contents of a snapshot, a weights file or a log of metrics: the training it comes from,
how far that training was, its metrics and its tensors; or the jobs of a Runner, of its save_path.
No tensor of a .msgpack is read, so it is quick for a file of any size."""

EXAMPLES = """\
  fitloop inspect runs/a/snapshots/snapshot-000012.msgpack
  fitloop inspect runs/a                           the last metrics of a run, even while it trains
  fitloop inspect model.msgpack --json | jq .nbytes"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", type=Path, help="the file, or the save_path of a trainer")
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
    if path.is_dir() and not os.path.lexists(path / LOG_NAME):
        _print_jobs(path, as_json=options.json)
    elif path.is_dir() or path.name == LOG_NAME or _first_byte(path) == LOG_MARK:
        _print_log(path, as_json=options.json)
    elif path.name == OUTCOME_NAME and os.path.lexists(path):
        _print_jobs(path.parent, as_json=options.json)
    elif path.suffix.lower() in OTHER_WEIGHTS:
        _print_weights(path, options)
    else:
        _print_file(path, options)


def _first_byte(path: Path) -> bytes:
    with suppress(OSError):
        descriptor = open_regular(path)
        try:
            return os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    return b""


def _print_json(values: dict[str, Any]) -> None:
    print_line(json.dumps(json_ready(values), indent=1))


def _print_file(path: Path, options: argparse.Namespace) -> None:
    header, entries, size = read_header(path)
    fields = {key: value for key, value in header.items() if key not in HIDDEN_KEYS}
    if options.json:
        fields["tensors"] = [
            {"name": e.name, "same_as": e.same_as}
            if e.same_as is not None
            else {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
            for e in entries
        ]
        _print_json({**fields, "nbytes": size})
        return
    lines = [f"{path}: {header['kind']}, {_size(size)}"]
    if header["kind"] == SNAPSHOT:
        lines += _snapshot_lines(fields)
    print_line("\n".join(map(printable, lines)))
    _print_tensors(entries, everything=options.all)


def _print_weights(path: Path, options: argparse.Namespace) -> None:
    """Print the tensors of a file of safetensors or torch, whose format needs all of it read."""
    from fitloop._storage.weight_files import read_weights

    weights = read_weights(path)
    entries = [
        TensorEntry(name, None, str(value.dtype)[6:], tuple(value.shape), value.nbytes, 0)
        for name, value in weights.items()
    ]
    size = path.stat().st_size
    if options.json:
        tensors = [
            {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
            for e in entries
        ]
        _print_json({"kind": "weights", "tensors": tensors, "nbytes": size})
        return
    print_line(f"{path}: weights, {_size(size)}")
    _print_tensors(entries, everything=options.all)


def _print_jobs(path: Path, *, as_json: bool) -> None:
    """Print the jobs of a Runner's directory, or the job whose directory it is."""
    from fitloop._runner.outcomes import Results, read_outcome, read_results

    one = read_outcome(path)
    results = Results([one]) if one is not None else read_results(path)
    if not results:
        raise CheckpointError(
            f"{path} holds no log of metrics and no jobs of a Runner; expected a file of fitloop, "
            "or the save_path of a trainer or a Runner"
        )
    if as_json:
        fields = ("name", "status", "epochs", "error", "seconds")
        jobs = [{name: getattr(record, name) for name in fields} for record in results]
        _print_json({"kind": "jobs", "jobs": jobs})
        return
    print_line(f"{path}: {_count(len(results), 'job')}")
    print_line(str(results))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_log(path: Path, *, as_json: bool) -> None:
    history = read_metrics(path)
    last = {
        str(phase): {name: series.last for name, series in getattr(history, phase).items()}
        for phase in Phase
    }
    if as_json:
        _print_json({"kind": "metrics", "last": last})
        return
    runs = f"{_count(history.train_runs, 'run')} of fit, {history.test_runs} of test"
    print_line(f"{path}: metrics, {runs}")
    for phase, metrics in last.items():
        if metrics:
            print_line(f"  {phase}: {format_metrics(metrics, None)}")


def _snapshot_lines(header: dict[str, Any]) -> list[str]:
    trainer, position = header["trainer"], header["position"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [f"  written    {header['written']}, {versions}"]
    seed = "no seed" if trainer["seed"] is None else f"seed {trainer['seed']}"
    lines.append(
        f"  trainer    {trainer['name']!r} of {trainer['model']}, {trainer['device']}, "
        f"{trainer['dtype']}, {seed}, {_count(trainer['num_threads'], 'thread')}"
    )
    lines.append(f"  position   {_position(trainer, position)}")
    if trainer["best_score"] is not None:
        best = f"{trainer['criteria'][0]} {format_number(trainer['best_score'])}"
        lines.append(f"  best       {best} in epoch {trainer['best_epoch']}")
    for phase, metrics in trainer["metrics"].items():
        if metrics:
            lines.append(f"  {phase:10} {format_metrics(metrics, None)}")
    return lines


def _position(trainer: dict[str, Any], position: dict[str, Any]) -> str:
    if not position:
        return f"after epoch {trainer['epoch_num']}, between two runs"
    epochs = _count(position["epochs"], "epoch")
    progress = f"{position['epochs_done']} of {epochs} of fit {position['fit']}"
    if position["finished"]:
        return f"{progress} done, {position['stop_reason']}"
    batch = f", in epoch {position['epoch']} after batch {position['batch']}"
    return f"{progress} done{batch if position['batch'] else ''}"


def _print_tensors(entries: list[TensorEntry], *, everything: bool) -> None:
    total = sum(entry.nbytes for entry in entries)
    print_line(f"  tensors    {len(entries)}, {_size(total)}")
    entries = [replace(entry, name=printable(entry.name)) for entry in entries]
    listed = entries if everything else entries[:MAX_TENSORS]
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        if entry.same_as is not None:
            print_line(f"    {entry.name:{width}}  the same as {entry.same_as}")
            continue
        shape = "x".join(map(str, entry.shape)) or "scalar"
        print_line(
            f"    {entry.name:{width}}  {entry.dtype:9} {shape:>16}  {_size(entry.nbytes):>10}"
        )
    if len(listed) < len(entries):
        print_line(f"    ... and {len(entries) - len(listed)} more, see --all")


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
