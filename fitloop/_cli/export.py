"""``fitloop export``: the weights of one file in another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fitloop._checkpointing.snapshot import KIND, read_snapshot
from fitloop._checkpointing.training_state import module_weights
from fitloop._cli.common import Commands, add_command, read_header, say
from fitloop._errors import CheckpointError
from fitloop._storage.weight_store import read_weights, write_weights

_ABOUT = """\
Write the weights of a snapshot or of a weights file to OUT, whose suffix says the format:
.safetensors, .pt or .msgpack."""

_EXAMPLES = """\
  fitloop export runs/a/snapshots/snapshot-000012.msgpack model.safetensors
  fitloop export snapshot-000012.msgpack best.pt --best --overwrite"""


def add_export(commands: Commands) -> None:
    """Add the command ``export``."""
    does = "write the weights of a snapshot or a weights file to another file"
    parser = add_command(commands, "export", does, _ABOUT, _EXAMPLES, _export)
    parser.add_argument("file", type=Path, help="a snapshot or a weights file")
    parser.add_argument("out", type=Path, help="where to")
    parser.add_argument("--best", action="store_true", help="the best weights of a snapshot")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _export(given: argparse.Namespace) -> int:
    path: Path = given.file
    if given.out.exists() and not given.overwrite:
        raise CheckpointError(f"{given.out} exists already; give --overwrite to replace it")
    if path.suffix.lower() == ".msgpack" and read_header(path)[0]["kind"] == KIND:
        state = read_snapshot(path).state
        weights: dict[str, Any]
        if given.best:
            if state["best"] is None:
                raise CheckpointError(f"{path} holds no best weights: none were tracked")
            weights = module_weights({"weights": state["best"], "versions": state["best_modules"]})
        else:
            weights = module_weights(state["training"]["modules"][0])
    elif given.best:
        raise CheckpointError(f"{path} is no snapshot; --best is for snapshots")
    else:
        weights = read_weights(path)
    write_weights(given.out, weights, overwrite=given.overwrite)
    say(f"{given.out}: {len(weights)} tensors")
    return 0
