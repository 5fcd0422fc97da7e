"""What can be asked of a trainer without waiting: the half that both kinds of it share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fitloop._engine.event_bus import EventStream
from fitloop._metrics.history import History, PhaseHistory
from fitloop._plotting.draw import plot_history
from fitloop._plotting.selection import BestEpoch
from fitloop._training.layers import configure_optimizer as default_configure_optimizer
from fitloop._training.trainer_state import TrainerState
from fitloop._types import LossFunction

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TrainerView:
    """Attributes of a trainer, and its verbs that do not wait. Safe to use while a run goes on."""

    _state: TrainerState

    def stop(self) -> None:
        """End the run that goes on after the batch in hand; any thread. Does nothing without one.

        A train phase that is cut short still has its ``epoch_end``, on what was seen; a
        validation that is cut short counts as not done.
        """
        control = self._state.control
        if control is not None:
            control.stop()

    def events(self) -> EventStream:
        """Return the trainer's events, to be read by any task: ``async with ... as events``."""
        return EventStream(self._state.event_bus)

    def plot(
        self,
        name: str,
        run: int | Literal["all"] | None = None,
        *,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> Axes:
        """Draw a metric of the train and valid phases, with a ring around the best epoch.

        Arguments and errors are those of `fitloop._plotting.draw.plot_history`. Any thread;
        blocking.
        """
        score, epoch, criteria = self.best_score, self.best_epoch, self.criteria
        best = None
        if score is not None and epoch is not None and criteria is not None:
            best = BestEpoch(criteria, score, epoch)
        return plot_history(self.M, name, run, ax=ax, best=best, **kwargs)

    def configure_optimizer(self, lr: Any = None, unlock: int | bool | None = None) -> None:
        """Set rates and unlocked layers, as `fitloop.configure_optimizer` does.

        Without arguments the ``configure_optimizer`` of the constructor is called.

        Raises ConfigurationError, having changed nothing, for what cannot be done.
        """
        if lr is None and unlock is None:
            self._state.config.configure_optimizer(self)
        else:
            default_configure_optimizer(self, lr=lr, unlock=unlock)

    @property
    def M(self) -> History:  # noqa: N802 - the users' name for it
        """The metrics of all runs."""
        return self._state.history

    @property
    def train_metrics(self) -> PhaseHistory:
        """``M.train``."""
        return self.M.train

    @property
    def valid_metrics(self) -> PhaseHistory:
        """``M.valid``."""
        return self.M.valid

    @property
    def test_metrics(self) -> PhaseHistory:
        """``M.test``."""
        return self.M.test

    @property
    def best_score(self) -> float | None:
        """The best value of the criteria so far; None before the first."""
        return self._state.best_score

    @property
    def best_epoch(self) -> int | None:
        """Number of the epoch of `best_score`, counted from 1."""
        return self._state.best_epoch

    @property
    def epoch_num(self) -> int:
        """Epochs trained so far, in all runs since the last reset."""
        return self._state.epoch_num

    @property
    def name(self) -> str:
        """The label of the trainer; the model's class unless one was given."""
        return self._state.config.name

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._state.config.model

    @property
    def optimizer(self) -> Any:
        """The optimizer, or the list of them, as given."""
        return self._state.config.optimizer

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, always as a list."""
        return self._state.config.optimizers

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler, or the list of them, as given; None without."""
        return self._state.config.lr_scheduler

    @property
    def lr_schedulers(self) -> list[Any]:
        """The schedulers, always as a list."""
        return self._state.config.lr_schedulers

    @property
    def loss_function(self) -> LossFunction:
        """The loss function."""
        return self._state.config.loss_function

    @property
    def train_dl(self) -> Any:
        """The constructor's train loader."""
        return self._state.config.train_dl

    @property
    def valid_dl(self) -> Any:
        """The constructor's validation loader."""
        return self._state.config.valid_dl

    @property
    def test_dl(self) -> Any:
        """The constructor's test loader."""
        return self._state.config.test_dl

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""
        return self._state.config.device

    @property
    def dtype(self) -> torch.dtype:
        """What floating tensors of the batches are cast to."""
        return self._state.config.dtype

    @property
    def criteria(self) -> str | None:
        """Name of the metric by which models are compared."""
        criteria = self._state.criteria
        return None if criteria is None else criteria.name

    @property
    def save_path(self) -> Path:
        """The directory for files."""
        return self._state.config.save_path

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._state.control is not None

    def __repr__(self) -> str:
        best = ""
        if self.best_score is not None:
            best = f", best {self.criteria} {self.best_score:.4f} in epoch {self.best_epoch}"
        doing = "running" if self.running else "idle"
        kind = type(self.model).__name__
        of = "" if self.name == kind else f" of {kind}"  # which is the name if none was given
        told = f"epoch {self.epoch_num}{best}, {doing} on {self.device}"
        return f"<{type(self).__name__} {self.name!r}{of}: {told}>"
