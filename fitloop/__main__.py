"""The command line: ``fitloop inspect FILE`` and ``fitloop export FILE OUT``.

Owns arguments and printed text. What a file is and holds is asked of the modules that know.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitloop._durable import reason
from fitloop._errors import CheckpointError
from fitloop._layout import Entry, LayoutError, read_file_header
from fitloop._metriclog import LOG_NAME, read_metrics
from fitloop._snapshot import KIND, read_snapshot
from fitloop._training import weights_in
from fitloop._types import Phase
from fitloop._weights import read_weights, write_weights

MOST_TENSORS = 40
"""listed by default"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a file that cannot be used, 2 for usage."""
    given = _parser().parse_args(arguments)
    try:
        status: int = given.run(given)
    except CheckpointError as error:
        print(f"fitloop: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fitloop", description="Look into what fitloop writes, and take weights out of it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what is in a snapshot, a weights file or a log of metrics",
        description="Print what is in a snapshot, a weights file or a log of metrics. No tensor "
        "is read, so that it is quick whatever the file's size.",
        epilog="example: fitloop inspect fitloop_state/snapshots/snapshot-000012.msgpack",
    )
    inspect.add_argument("file", type=Path, help="the file, or the save_path of a trainer")
    inspect.add_argument("--all", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print JSON, with every tensor")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser(
        "export",
        help="write the weights of a snapshot or a weights file to another file",
        description="Write the model's weights to OUT: .safetensors, .pt or .msgpack.",
        epilog="example: fitloop export snapshot-000012.msgpack model.safetensors --best",
    )
    export.add_argument("file", type=Path, help="a snapshot or a weights file")
    export.add_argument("out", type=Path, help="where to; its suffix says the format")
    export.add_argument("--best", action="store_true", help="the best weights of a snapshot")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    export.set_defaults(run=_export)
    return parser


def _header(path: Path) -> tuple[dict[str, Any], list[Entry], int]:
    try:
        return read_file_header(path)
    except (OSError, LayoutError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error


def _say(text: str) -> None:
    print(text)  # noqa: T201 - this is what it is for


# -- inspect -----------------------------------------------------------------------------------


def _inspect(given: argparse.Namespace) -> int:
    path: Path = given.file
    if path.is_dir() or path.name == LOG_NAME:
        _inspect_log(path, as_json=given.json)
        return 0
    header, entries, size = _header(path)
    shown = {key: value for key, value in header.items() if key not in _LEFT_OUT}
    if given.json:
        shown["tensors"] = [
            {"name": e.name, "same_as": e.same_as}
            if e.same_as is not None
            else {"name": e.name, "dtype": e.dtype, "shape": e.shape, "nbytes": e.nbytes}
            for e in entries
        ]
        _say(json.dumps({**shown, "nbytes": size}, indent=1))
        return 0
    _say(f"{path}: {header['kind']}, {_size(size)}")
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
        _say(json.dumps({"kind": "metrics", "last": last}, indent=1))
        return
    _say(f"{path}: metrics, {history.train_runs} runs of fit, {history.test_runs} of test")
    for phase, metrics in last.items():
        if metrics:
            _say(f"  {phase}: " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _say_snapshot(header: dict[str, Any]) -> None:
    trainer, position = header["trainer"], header["position"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    _say(f"  written    {header['written']}, {versions}")
    seed = "no seed" if trainer["seed"] is None else f"seed {trainer['seed']}"
    _say(
        f"  trainer    {trainer['name']!r} of {trainer['model']}, {trainer['device']}, "
        f"{trainer['dtype']}, {seed}, {trainer['num_threads']} threads"
    )
    _say(f"  position   {_where(trainer, position)}")
    if trainer["best_score"] is not None:
        best = f"{trainer['criteria'][0]} {trainer['best_score']:.4f}"
        _say(f"  best       {best} in epoch {trainer['best_epoch']}")
    for phase, metrics in trainer["metrics"].items():
        if metrics:
            _say(f"  {phase:10} " + " | ".join(f"{k}: {v:.4f}" for k, v in metrics.items()))


def _where(trainer: dict[str, Any], position: dict[str, Any]) -> str:
    if not position:
        return f"after epoch {trainer['epoch_num']}, between two runs"
    of_run = f"{position['epochs_done']} of {position['epochs']} epochs of fit {position['fit']}"
    if position["finished"]:
        return f"{of_run} done, {position['stop_reason']}"
    batch = f", in epoch {position['epoch']} after batch {position['batch']}"
    return f"{of_run} done{batch if position['batch'] else ''}"


def _say_tensors(entries: list[Entry], *, everything: bool) -> None:
    total = sum(entry.nbytes for entry in entries)
    _say(f"  tensors    {len(entries)}, {_size(total)}")
    shown = entries if everything else entries[:MOST_TENSORS]
    width = max((len(entry.name) for entry in shown), default=0)
    for entry in shown:
        if entry.same_as is not None:
            _say(f"    {entry.name:{width}}  the same as {entry.same_as}")
            continue
        shape = "x".join(map(str, entry.shape)) or "scalar"
        _say(f"    {entry.name:{width}}  {entry.dtype:9} {shape:>16}  {_size(entry.nbytes):>10}")
    if len(shown) < len(entries):
        _say(f"    ... and {len(entries) - len(shown)} more, see --all")


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


# -- export ------------------------------------------------------------------------------------


def _export(given: argparse.Namespace) -> int:
    path: Path = given.file
    if given.out.exists() and not given.overwrite:
        raise CheckpointError(f"{given.out} exists already; give --overwrite to replace it")
    if path.suffix.lower() == ".msgpack" and _header(path)[0]["kind"] == KIND:
        state = read_snapshot(path).state
        weights: dict[str, Any]
        if given.best:
            if state["best"] is None:
                raise CheckpointError(f"{path} holds no best weights: none were tracked")
            weights = weights_in({"weights": state["best"], "versions": state["best_modules"]})
        else:
            weights = weights_in(state["training"]["modules"][0])
    elif given.best:
        raise CheckpointError(f"{path} is no snapshot; --best is for snapshots")
    else:
        weights = read_weights(path)
    write_weights(given.out, weights, overwrite=given.overwrite)
    _say(f"{given.out}: {len(weights)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
