"""``fitloop export``: copies the weights of one file to another, perhaps in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from fitloop._cli.common import print_line
from fitloop._errors import CheckpointError

ABOUT = """\
Write the weights of a snapshot or of a weights file to OUT. Its suffix sets the format:
.safetensors, .pt or .msgpack."""

EXAMPLES = """\
  fitloop export runs/a/snapshots/snapshot-000012.msgpack model.safetensors
  fitloop export snapshot-000012.msgpack best.pt --best --overwrite"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a snapshot or a weights file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--best", action="store_true", help="the best weights of a snapshot")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run(options: argparse.Namespace) -> int:
    """Write the weights; return the exit status."""
    from fitloop._checkpointing.snapshot import read_model_weights  # --help needs no torch
    from fitloop._storage.weight_files import write_weights

    path, out = options.file, options.out
    if out.exists() and not options.overwrite:
        raise CheckpointError(f"{out} exists already; give --overwrite to replace it")
    weights = read_model_weights(path, best=options.best)
    write_weights(out, weights, overwrite=options.overwrite)
    print_line(f"{out}: {len(weights)} tensors")
    return 0
