"""`Checkpoint`, the policy of a run for its snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fitloop._arguments import expect
from fitloop._engine.config import check_flag, check_optional, check_seconds
from fitloop._public import public


@public
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The policy of ``fit`` for snapshots: when one is taken, and how many are kept.

    A snapshot is due when any of the intervals is over, and when the run ends. Training waits
    while its state is copied in memory; a thread writes the copy to ``save_path/snapshots``. A
    snapshot that becomes due during a write is taken at the first batch boundary after it.

    Raises ConfigurationError for values that cannot work.
    """

    every_epochs: int | None = 1
    every_batches: int | None = None
    """interval in train batches"""
    every_seconds: float | None = None
    """interval in wall-clock time"""
    keep: int | None = 2
    """snapshots of the running fit to keep; None keeps all. The last of each fit always stays"""
    keep_best: int | None = None
    """number of weights files of the best validations to keep in ``save_path/best_models``, written
    as by ``save_model``; None keeps none. `FitLoop.best_models` lists them. They are compared by
    the criteria over all fits of the trainer; the later of equal ones is the better. Files that
    this training has not written are never removed"""
    on_error: Literal["raise", "warn"] = "raise"
    """"raise": a snapshot that cannot be written ends the run with a CheckpointError at the next
    batch boundary; "warn": it causes a `SnapshotFailed` event, and training goes on"""
    overwrite: bool = False
    """whether a run that is not resumed removes the snapshots and the best models of an earlier
    training; otherwise snapshots cause a CheckpointError"""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_batches", "keep", "keep_best"):
            check_optional(f"Checkpoint({name}=)", getattr(self, name), 1)
        check_flag("Checkpoint(overwrite=)", self.overwrite)
        check_seconds("Checkpoint(every_seconds=)", self.every_seconds)
        fits = self.on_error in ("raise", "warn")
        expect(fits, "Checkpoint(on_error=)", self.on_error, "'raise' or 'warn'")


def check_checkpoint(checkpoint: Any) -> Any:
    """Return a `Checkpoint`, or None; raise ConfigurationError for anything else."""
    fits = checkpoint is None or isinstance(checkpoint, Checkpoint)
    expected = "a fitloop.Checkpoint, such as Checkpoint(every_epochs=1)"
    expect(fits, "checkpoint", checkpoint, expected)
    return checkpoint


class FileOptions(NamedTuple):
    """The files of a run: always the metric log, and snapshots if there is a ``checkpoint``."""

    checkpoint: Checkpoint | None = None
    resume: bool = False
