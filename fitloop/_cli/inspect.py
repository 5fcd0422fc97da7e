"""``fitloop inspect``: what is in a file that fitloop wrote, without reading a tensor of it.

Owns the printed text. What a file is and holds is asked of the modules that know.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fitloop._checkpointing.snapshot import KIND
from fitloop._cli.common import Commands, add_command, read_header, say
from fitloop._storage.layout import TensorEntry
from fitloop._storage.metric_log import LOG_NAME, read_metrics
from fitloop._types import Phase

MOST_TENSORS = 40
"""listed by default"""

_ABOUT = """\
Print what is in a snapshot, a weights file or a log of metrics: which training it is of and how
far that had come, its metrics, its tensors. No tensor is read, so that it is quick whatever the
file's size."""

_EXAMPLES = """\
  fitloop inspect runs/a/snapshots/snapshot-000012.msgpack
  fitloop inspect runs/a                           the last metrics of a run, also of one going on
  fitloop inspect model.msgpack --json | jq .nbytes"""


def add_inspect(commands: Commands) -> None:
    """Add the command ``inspect``."""
    does = "what is in a snapshot, a weights file or a log of metrics"
    parser = add_command(commands, "inspect", does, _ABOUT, _EXAMPLES, _inspect)
    parser.add_argument("file", type=Path, help="the file, or the save_path of a trainer")
    parser.add_argument("--all", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tensor")


def _inspect(given: argparse.Namespace) -> int:
    path: Path = given.file
    if path.is_dir() or path.name == LOG_NAME:
        _inspect_log(path, as_json=given.json)
        return 0
    header, entries, size = read_header(path)
    shown = {key: value for key, value in header.items() if key not in _LEFT_OUT}
    if given.json:
        shown["tensors"] = [
            {"name": e.name, "same_as": e.same_as}
            if e.same_as is not None
            else {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
            for e in entries
        ]
        say(json.dumps({**shown, "nbytes": size}, indent=1))
        return 0
    say(f"{path}: {header['kind']}, {_size(size)}")
    if header["kind"] == KIND:
        _say_snapshot(shown)
    _say_tensors(entries, everything=given.all)
    return 0


_LEFT_OUT = {"format", "tensors", "header_crc32", "state", "modules"}


def _inspect_log(path: Path, *, as_json: bool) -> None:
    history = read_metrics(path)
    last = {
        str(phase): {name: series.last for name, series in getattr(history, phase).items()}
        for phase in Phase
    }
    if as_json:
        say(json.dumps({"kind": "metrics", "last": last}, indent=1))
        return
    say(f"{path}: metrics, {history.train_runs} runs of fit, {history.test_runs} of test")
    for phase, metrics in last.items():
        if metrics:
            say(f"  {phase}: " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _say_snapshot(header: dict[str, Any]) -> None:
    trainer, position = header["trainer"], header["position"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    say(f"  written    {header['written']}, {versions}")
    seed = "no seed" if trainer["seed"] is None else f"seed {trainer['seed']}"
    say(
        f"  trainer    {trainer['name']!r} of {trainer['model']}, {trainer['device']}, "
        f"{trainer['dtype']}, {seed}, {trainer['num_threads']} threads"
    )
    say(f"  position   {_where(trainer, position)}")
    if trainer["best_score"] is not None:
        best = f"{trainer['criteria'][0]} {trainer['best_score']:.4f}"
        say(f"  best       {best} in epoch {trainer['best_epoch']}")
    for phase, metrics in trainer["metrics"].items():
        if metrics:
            say(f"  {phase:10} " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _where(trainer: dict[str, Any], position: dict[str, Any]) -> str:
    if not position:
        return f"after epoch {trainer['epoch_num']}, between two runs"
    of_run = f"{position['epochs_done']} of {position['epochs']} epochs of fit {position['fit']}"
    if position["finished"]:
        return f"{of_run} done, {position['stop_reason']}"
    batch = f", in epoch {position['epoch']} after batch {position['batch']}"
    return f"{of_run} done{batch if position['batch'] else ''}"


def _say_tensors(entries: list[TensorEntry], *, everything: bool) -> None:
    total = sum(entry.nbytes for entry in entries)
    say(f"  tensors    {len(entries)}, {_size(total)}")
    shown = entries if everything else entries[:MOST_TENSORS]
    width = max((len(entry.name) for entry in shown), default=0)
    for entry in shown:
        if entry.same_as is not None:
            say(f"    {entry.name:{width}}  the same as {entry.same_as}")
            continue
        shape = "x".join(map(str, entry.shape)) or "scalar"
        say(f"    {entry.name:{width}}  {entry.dtype:9} {shape:>16}  {_size(entry.nbytes):>10}")
    if len(shown) < len(entries):
        say(f"    ... and {len(entries) - len(shown)} more, see --all")


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
