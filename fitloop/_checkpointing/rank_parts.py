"""The part of one rank in a snapshot of a training on several ranks.

Rank 0 writes the file. The list ``ranks`` in it has an entry for each rank: the random streams of
its steps, its position in its loader, and the values that it has collected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fitloop._checkpointing.snapshot import Snapshot
from fitloop._errors import CheckpointError, ResumeWarning, warn_user
from fitloop._rng.states import RngState
from fitloop._training.capture import copy_values
from fitloop._training.trainer_state import TrainerState


def rank_part(snapshot: Snapshot, trainer: TrainerState, rank: int, size: int) -> Snapshot:
    """Return a snapshot as one rank of ``size`` applies it.

    On another number of ranks than before, the steps draw other random numbers, and a
    `ResumeWarning` says so. Raises `CheckpointError` if it is in the middle of an epoch then.
    """
    run = snapshot.state["run"]
    if not isinstance(run, dict) or ("ranks" not in run and size == 1):
        return snapshot
    seed = snapshot.trainer["seed"]
    if trainer.config.may_adopt_seed and seed is not None and seed != trainer.config.seed:
        trainer.adopt_seed(seed)
    run = dict(run)
    parts = run.pop("ranks", [{}])
    shared = replace(snapshot, state={**snapshot.state, "run": run})
    try:
        if len(parts) != size:
            return _on_other_ranks(shared, trainer, len(parts), rank, size)
        rank_state = parts[rank]
        run.update(rank_state["parts"], **{"pass": rank_state["pass"]})
        return replace(shared, random=_states(rank_state["random"]))
    except CheckpointError:
        raise
    except Exception as error:  # any error that a forged tree causes
        raise CheckpointError(
            f"{snapshot.path} cannot be read: its ranks are not as fitloop writes them: {error!r}"
        ) from error


def _on_other_ranks(
    snapshot: Snapshot, trainer: TrainerState, before: int, rank: int, size: int
) -> Snapshot:
    if snapshot.state["run"]["pass"] is not None:
        raise CheckpointError(
            f"{snapshot.path} is in the middle of an epoch of {before} ranks, and there are {size} "
            f"now; resume on {before}, or remove this file to go on from the end of an epoch"
        )
    if not snapshot.position.get("finished"):
        warn_user(
            f"resuming: {snapshot.path} is of {before} ranks, and there are {size} now; what steps "
            "draw, such as dropout, differs from then on, and an optimizer step has "
            f"{size} batches instead of {before}",
            ResumeWarning,
        )
    if rank == 0:
        return snapshot
    trees = trainer.rng.state_tree().items()
    steps: dict[str, Any] = {name: tree for name, tree in trees if name.endswith(" steps")}
    return replace(snapshot, random={**snapshot.random, **_states(steps)})


def _states(trees: dict[str, Any]) -> dict[str, RngState]:
    return {name: RngState.from_tree(copy_values(tree)) for name, tree in trees.items()}
