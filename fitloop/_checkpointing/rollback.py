"""A copy in memory of a trainer's state between two epochs of a run, and the return to it.

The content and the limits are those of a snapshot on disk, but parameters and state dicts keep
their identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fitloop._data.carried_state import carried_states, set_carried_states
from fitloop._data.inspection import is_stateful
from fitloop._metrics.results import EpochMetricsRecorder
from fitloop._training.best import BestTracker
from fitloop._training.capture import copy_values
from fitloop._training.parts import StatePart
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


class RollbackPoint:
    """A copy of the state of trainer, loaders and run, made on the step thread between two epochs.

    Not restored are batches read from a loader that can be read only once, and the random
    generators in the worker processes of a loader.
    """

    def __init__(
        self,
        trainer: TrainerState,
        loaders: Sequence[tuple[Phase, Any]],
        log: EpochMetricsRecorder,
        tracker: BestTracker | None,
        parts: Mapping[str, StatePart],
    ) -> None:
        self._restores: list[Callable[[], object]] = [
            trainer.capture().restore,
            trainer.rng.save(),
            partial(trainer.history.rollback, trainer.history.mark()),
            partial(log.restore, log.export()),
            _best(trainer),  # restored before the numbers, which show whether the best changed
            _numbers(trainer),
        ]
        if tracker is not None:
            self._restores.append(partial(setattr, tracker, "tracked", tracker.tracked))
        for item in parts.values():
            self._restores.append(partial(item.load_state_dict, copy_values(item.state_dict())))
        for _phase, loader in loaders:
            self._restores.append(partial(set_carried_states, loader, carried_states(loader)))
            if is_stateful(loader) and not isinstance(loader, DataLoader):
                self._restores.append(partial(loader.load_state_dict, loader.state_dict()))

    def restore(self) -> None:
        """Restore everything, also if a part fails; raise the first error."""
        with ExitStack() as stack:
            for restore in reversed(self._restores):
                stack.callback(restore)


def _numbers(trainer: TrainerState) -> Callable[[], None]:
    names = ("epoch_num", "best_score", "best_epoch", "best_is_stale")
    values = [getattr(trainer, name) for name in names]
    criteria = trainer.criteria
    chosen = None if criteria is None else (criteria.name, criteria.direction)

    def restore() -> None:
        for name, value in zip(names, values, strict=True):
            setattr(trainer, name, value)
        if criteria is not None and chosen is not None:
            criteria.name, criteria.direction = chosen

    return restore


def _best(trainer: TrainerState) -> Callable[[], None]:
    epoch, weights = trainer.best_epoch, trainer.borrow_best()

    def restore() -> None:
        if trainer.best_epoch != epoch:
            trainer.put_best(weights)

    return restore
