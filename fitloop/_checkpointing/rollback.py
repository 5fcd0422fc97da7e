"""The state of a trainer at one moment of a run, in memory, and the way back to it.

Exact and in place, as a dry run's: what a snapshot on disk would hold, with the same limits, but
parameters and state dicts keep their identity. Taken and returned to between two epochs, on the
step thread, while no stream of random numbers is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fitloop._data.inspection import generator_states, is_stateful, set_generator_states
from fitloop._metrics.results import EpochMetricsRecorder
from fitloop._training.best import BestTracker
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


class RollbackPoint:
    """A copy of all that training changes: of the trainer, its loaders, and of what a run counts.

    Batches that are read meanwhile from a loader that can be read once stay read; so does what a
    loader's worker processes draw. Without a seed the process's generators are put back.
    """

    def __init__(
        self,
        core: TrainerState,
        loaders: Sequence[tuple[Phase, Any]],
        log: EpochMetricsRecorder,
        tracker: BestTracker | None,
    ) -> None:
        self._ways_back: list[Callable[[], object]] = [
            core.capture().restore,
            core.rng.save(),
            partial(core.history.rollback, core.history.mark()),
            partial(log.restore, log.export()),
            _best(core),  # before the numbers, which tell whether it changed
            _numbers(core),
        ]
        if tracker is not None:
            self._ways_back.append(partial(setattr, tracker, "tracked", tracker.tracked))
        for _phase, loader in loaders:
            self._ways_back.append(partial(set_generator_states, loader, generator_states(loader)))
            if is_stateful(loader) and not isinstance(loader, DataLoader):
                self._ways_back.append(partial(loader.load_state_dict, loader.state_dict()))

    def restore(self) -> None:
        """Go back; what fails does not keep the rest from it."""
        with ExitStack() as stack:
            for way in reversed(self._ways_back):
                stack.callback(way)


def _numbers(core: TrainerState) -> Callable[[], None]:
    names = ("epoch_num", "best_score", "best_epoch", "best_is_stale")
    values = [getattr(core, name) for name in names]
    criteria = core.criteria
    chosen = None if criteria is None else (criteria.name, criteria.direction)

    def restore() -> None:
        for name, value in zip(names, values, strict=True):
            setattr(core, name, value)
        if criteria is not None and chosen is not None:
            criteria.name, criteria.direction = chosen

    return restore


def _best(core: TrainerState) -> Callable[[], None]:
    name, store, epoch = core.config.best_model_name, core.store, core.best_epoch
    kept = store.borrow(name) if store.exists(name) else None

    def restore() -> None:
        if core.best_epoch == epoch:
            return
        if kept is not None:
            store.save(name, kept)
        elif store.exists(name):
            store.delete(name)

    return restore
