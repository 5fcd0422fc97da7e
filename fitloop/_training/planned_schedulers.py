"""Learning-rate schedulers that functions of the user make for the number of steps of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fitloop._blocks import contextmanager
from fitloop._data.inspection import length_of
from fitloop._engine.config import TrainerConfig, as_list
from fitloop._engine.plan import RunPlan
from fitloop._errors import ConfigurationError, add_note_safely
from fitloop._types import Phase


def planned_steps(loader: Any, epochs: int, steps: int | None, accumulate: int) -> int | None:
    """Return the optimizer steps of a fit; None if the batches of an epoch are not known.

    ``steps`` is the largest number of batches in an epoch, and the number if there is no length.
    """
    batches = length_of(loader, steps)
    batches = steps if batches is None else batches
    return None if batches is None else epochs * math.ceil(batches / accumulate)


class PlannedSchedulers:
    """The functions among the schedulers of a trainer: each fit calls them anew.

    The schedulers that they return are in ``config.scheduler_slots`` until the next fit.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        slots = zip(as_list(config.lr_scheduler), config.scheduler_slots, strict=True)
        self._functions = {
            number: item for number, (item, scheduler) in enumerate(slots) if scheduler is None
        }
        self.steps: int | None = None
        """the steps for which the present schedulers were made; None if there are none"""
        self._undo_first: Callable[[], None] = lambda: None

    @contextmanager
    def made_for(self, plan: RunPlan) -> Iterator[None]:
        """Make the schedulers of a run for a block; after a dry run they are dropped.

        Raises ConfigurationError if the number of its steps is not known.
        """
        phase, loader = plan.phases[0]
        trains = phase is Phase.TRAIN and plan.epochs and plan.call != "find_lr"
        if not self._functions or not trains:
            yield
            return
        steps = planned_steps(loader, plan.epochs, plan.steps, self._config.accumulate)
        if steps is None:
            raise ConfigurationError(
                "lr_scheduler is a function of the number of optimizer steps, and train_dl has no "
                f"length; give {plan.call}(steps=), the batches of an epoch, or a scheduler"
            )
        undo = self.make(steps, is_dry=plan.call != "fit")
        try:
            yield
        finally:
            if plan.call != "fit":
                undo()

    def make(self, steps: int | None, *, is_dry: bool = False) -> Callable[[], None]:
        """Make schedulers for a number of steps, and return a function that undoes it.

        The rates begin where the user has set them, and not where an earlier schedule has ended.
        If ``steps`` is None, drop the schedulers, and restore the param groups as they were before
        the first schedulers.
        """
        if not self._functions:
            return lambda: None
        undo = self._undo()
        if steps is None:
            self._undo_first()
            return undo
        try:
            self._reset_rates()
            for number, function in self._functions.items():
                self._config.scheduler_slots[number] = self._call(function, steps)
        except BaseException:
            undo()
            raise
        if self.steps is None and not is_dry:
            self._undo_first = undo
        self.steps = steps
        return undo

    def _call(self, function: Callable[..., Any], steps: int) -> Any:
        try:
            scheduler = function(self._config.optimizer, steps)
        except Exception as error:
            where = f"in trainer {self._config.name!r}: the function of lr_scheduler="
            add_note_safely(error, f"{where}, for {steps} steps")
            raise
        self._config.check_scheduler(scheduler)
        return scheduler

    def _reset_rates(self) -> None:
        """Set the rate of each group to its ``initial_lr``, unless the user has set it since.

        A scheduler keeps the rate there that it began with.
        """
        if self.steps is None:
            return
        config = self._config
        planned = [config.scheduler_slots[number] for number in self._functions]
        unplanned = [item for item in config.lr_schedulers if item not in planned]
        for optimizer in config.optimizers:
            if any(getattr(item, "optimizer", None) is optimizer for item in unplanned):
                continue
            followers = [item for item in planned if _has_groups_of(item, optimizer)]
            if not followers:
                continue
            last = next((item._last_lr for item in followers if hasattr(item, "_last_lr")), None)
            for number, group in enumerate(optimizer.param_groups):
                is_set = last is not None and (
                    number >= len(last) or float(last[number]) != float(group["lr"])
                )
                if "initial_lr" not in group:
                    continue
                if is_set:
                    _set(group, "initial_lr", group["lr"])
                else:
                    _set(group, "lr", group["initial_lr"])

    def _undo(self) -> Callable[[], None]:
        """Return a function that restores schedulers and groups as they are now."""
        slots, steps = list(self._config.scheduler_slots), self.steps
        groups = [
            (group, {key: _copied(value) for key, value in group.items()})
            for optimizer in self._config.optimizers
            for group in optimizer.param_groups
        ]

        def restore() -> None:
            self._config.scheduler_slots[:], self.steps = slots, steps
            for group, values in groups:
                for key in group.keys() - values.keys():
                    del group[key]
                for key, value in values.items():
                    _set(group, key, value)

        return restore


def _has_groups_of(scheduler: Any, optimizer: Any) -> bool:
    """Return whether a scheduler changes groups of an optimizer, which may wrap its optimizer."""
    groups = getattr(getattr(scheduler, "optimizer", optimizer), "param_groups", ())
    return any(group is own for group in groups for own in optimizer.param_groups)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    """Set an entry of a group; a tensor stays the same object, which a step may have captured."""
    present = group.get(key)
    if isinstance(present, Tensor):
        with torch.no_grad():
            present.copy_(torch.as_tensor(value))
    else:
        group[key] = _copied(value)
