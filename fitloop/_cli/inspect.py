"""``fitloop inspect``: shows the contents of a file of fitloop, without reading a tensor."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fitloop._cli.common import print_line, read_header
from fitloop._storage.layout import TensorEntry
from fitloop._storage.metric_log import LOG_NAME, read_metrics
from fitloop._types import Phase

SNAPSHOT = "snapshot"
"""the kind of file that `_checkpointing.snapshot` writes; importing its name would import torch"""

MAX_TENSORS = 40
"""tensors listed without ``--all``"""

HIDDEN_KEYS = {"format", "tensors", "header_crc32", "state", "modules"}
"""keys of a header that say nothing to a person"""

ABOUT = """\
Print the contents of a snapshot, a weights file or a log of metrics: the training it comes from,
how far that training was, its metrics and its tensors. No tensor is read, so it is quick for a
file of any size."""

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
    if path.is_dir() or path.name == LOG_NAME:
        _print_log(path, as_json=options.json)
        return 0
    header, entries, size = read_header(path)
    fields = {key: value for key, value in header.items() if key not in HIDDEN_KEYS}
    if options.json:
        fields["tensors"] = [
            {"name": e.name, "same_as": e.same_as}
            if e.same_as is not None
            else {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
            for e in entries
        ]
        print_line(json.dumps({**fields, "nbytes": size}, indent=1))
        return 0
    print_line(f"{path}: {header['kind']}, {_size(size)}")
    if header["kind"] == SNAPSHOT:
        _print_snapshot(fields)
    _print_tensors(entries, everything=options.all)
    return 0


def _print_log(path: Path, *, as_json: bool) -> None:
    history = read_metrics(path)
    last = {
        str(phase): {name: series.last for name, series in getattr(history, phase).items()}
        for phase in Phase
    }
    if as_json:
        print_line(json.dumps({"kind": "metrics", "last": last}, indent=1))
        return
    runs = f"{history.train_runs} runs of fit, {history.test_runs} of test"
    print_line(f"{path}: metrics, {runs}")
    for phase, metrics in last.items():
        if metrics:
            print_line(f"  {phase}: " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _print_snapshot(header: dict[str, Any]) -> None:
    trainer, position = header["trainer"], header["position"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    print_line(f"  written    {header['written']}, {versions}")
    seed = "no seed" if trainer["seed"] is None else f"seed {trainer['seed']}"
    print_line(
        f"  trainer    {trainer['name']!r} of {trainer['model']}, {trainer['device']}, "
        f"{trainer['dtype']}, {seed}, {trainer['num_threads']} threads"
    )
    print_line(f"  position   {_position(trainer, position)}")
    if trainer["best_score"] is not None:
        best = f"{trainer['criteria'][0]} {trainer['best_score']:.4f}"
        print_line(f"  best       {best} in epoch {trainer['best_epoch']}")
    for phase, metrics in trainer["metrics"].items():
        if metrics:
            print_line(f"  {phase:10} " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _position(trainer: dict[str, Any], position: dict[str, Any]) -> str:
    if not position:
        return f"after epoch {trainer['epoch_num']}, between two runs"
    progress = f"{position['epochs_done']} of {position['epochs']} epochs of fit {position['fit']}"
    if position["finished"]:
        return f"{progress} done, {position['stop_reason']}"
    batch = f", in epoch {position['epoch']} after batch {position['batch']}"
    return f"{progress} done{batch if position['batch'] else ''}"


def _print_tensors(entries: list[TensorEntry], *, everything: bool) -> None:
    total = sum(entry.nbytes for entry in entries)
    print_line(f"  tensors    {len(entries)}, {_size(total)}")
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
