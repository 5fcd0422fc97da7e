"""`TrainerBase`: the constructor of the trainers, and everything of them that does not wait."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fitloop._arguments import checked_arguments, leaves_user_frames
from fitloop._data.loaders import Loading
from fitloop._engine.config import (
    PRETRAINED,
    Interval,
    Reaction,
    TrainerConfig,
    check_not_awaitable,
)
from fitloop._engine.event_bus import EventStream
from fitloop._engine.precision import Precision
from fitloop._engine.wrapping import Parallel
from fitloop._errors import ConfigurationError, MissingLoaderError
from fitloop._format import format_number, printable
from fitloop._metrics.history import History, PhaseHistory
from fitloop._run.fit_options import fit_option
from fitloop._run.prompts import Ask
from fitloop._training.averaging import EMA, SWA
from fitloop._training.best_models import BestModel
from fitloop._training.layers import configure_optimizer as default_configure_optimizer
from fitloop._training.planned_schedulers import planned_steps
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Loader, LossFunction, Phase, StageFunction
from fitloop.callbacks.callback import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class TrainerBase:
    """The common part of `FitLoop` and `SyncFitLoop`; `FitLoop` describes the arguments."""

    @checked_arguments()
    # The constructor has the one long signature of the library.
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_function: LossFunction | None = None,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        valid_dl: Loader | Callable[[], Loader] | None = None,
        test_dl: Loader | Callable[[], Loader] | None = None,
        train_epoch_start: StageFunction | None = None,
        train_step: StageFunction | None = None,
        train_epoch_end: StageFunction | None = None,
        valid_epoch_start: StageFunction | None = None,
        valid_step: StageFunction | None = None,
        valid_epoch_end: StageFunction | None = None,
        test_epoch_start: StageFunction | None = None,
        test_step: StageFunction | None = None,
        test_epoch_end: StageFunction | None = None,
        preloop: Callable[[Any], object] | None = None,
        postloop: Callable[[Any], object] | None = None,
        lr_scheduler: Any = None,
        scheduler_interval: Interval | Sequence[Interval] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size_of: Callable[[Any], int] | None = None,
        configure_optimizer: Callable[..., object] | None = None,
        criteria: str | None = None,
        criteria_direction: int | None = None,
        save_to_disk: bool = False,
        save_path: str | Path | None = None,
        best_model_name: str = "best_model",
        name: str | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
        prefetch: int | None = None,
        loading: Loading | None = None,
        loader_randomness: Literal["global", "own"] = "global",
        loader_grace: float = 5.0,
        callbacks: Sequence[Callback] = (),
        on_continue: Ask | None = None,
        precision: Precision | None = None,
        clip_grad: float | Callable[[list[Any]], Any] | None = None,
        nonfinite: Reaction = "raise",
        scaler: Any = None,
        accumulate: int = 1,
        average: EMA | SWA | None = None,
        compile: bool | Mapping[str, Any] = False,
        parallel: Parallel = None,
        stateful: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = locals().copy()
        del arguments["self"]
        arguments["configure_optimizer"] = configure_optimizer or default_configure_optimizer
        self._state = TrainerState(TrainerConfig.from_arguments(arguments))

    def stop(self) -> None:
        """End the present run after the present batch; from any thread. Without a run, do nothing.

        The ``epoch_end`` stage of an incomplete train phase is called with the batches so far. An
        incomplete validation does not count.
        """
        control = self._state.control
        if control is not None:
            control.stop()

    @checked_arguments(fit_option)
    def planned_steps(
        self,
        epochs: int = 1,
        *,
        train_dl: Loader | Callable[[], Loader] | None = None,
        steps: int | None = None,
    ) -> int:
        """Return the optimizer steps of a `fit` with these arguments, for a schedule by steps.

        That is one step for ``accumulate`` batches, and one for those that are left of an epoch.
        A loader without a length gives ``steps`` batches. ``lr_scheduler`` may also be a function
        of this number, which each `fit` calls.

        Raises:
            MissingLoaderError: there is no ``train_dl``.
            ConfigurationError: the loader has no length and there are no ``steps``, or an argument
                cannot work.
        """
        loader = self.train_dl if train_dl is None else train_dl
        if loader is None:
            raise MissingLoaderError(Phase.TRAIN, "planned_steps")
        planned = planned_steps(loader, epochs, steps, self._state.config.accumulate)
        if planned is None:
            raise ConfigurationError(
                "planned_steps() needs the batches of an epoch, and train_dl has no length; give "
                "steps=, or count them once"
            )
        return planned

    def events(self) -> EventStream:
        """Return the events of the trainer, for any task: ``async with ... as events``.

        A reader that comes while a run goes on gets what it has missed; see `EventStream`.
        """
        return EventStream(self._state.event_bus)

    @leaves_user_frames
    def plot(
        self,
        name: str,
        run: int | Literal["all"] | None = None,
        *,
        ax: Axes | None = None,
        **kwargs: Any,
    ) -> Axes:
        """Draw a metric of the train and valid phases, with a ring around the best epoch.

        Arguments and errors are those of ``M.plot``. Blocking; from any thread.
        """
        from fitloop._plotting.draw import plot_history
        from fitloop._plotting.selection import BestEpoch

        score, epoch, criteria = self.best_score, self.best_epoch, self.criteria
        best = None
        if score is not None and epoch is not None and criteria is not None:
            best = BestEpoch(criteria, score, epoch)
        return plot_history(self.M, name, run, ax=ax, best=best, **kwargs)

    def configure_optimizer(self, *args: Any, **options: Any) -> None:
        """Call the ``configure_optimizer`` of the constructor with this trainer and the arguments.

        The default one, `fitloop.configure_optimizer`, takes ``lr`` and ``unlock``. It is also
        called if your own function cannot be called with the arguments, for example because it
        takes only the trainer. The trainer may be given as the first argument, or left out.

        Raises ConfigurationError, with nothing changed, for arguments that cannot work.
        """
        if args and isinstance(args[0], TrainerBase):
            if args[0]._state is not self._state:
                raise ConfigurationError(
                    f"configure_optimizer() of {self!r} was called with {args[0]!r}; expected the "
                    "same trainer, or none"
                )
            args = args[1:]
        function = self._state.config.configure_optimizer
        try:
            inspect.signature(function).bind(self, *args, **options)
        except TypeError:
            function = default_configure_optimizer
        except ValueError:  # a built-in function that has no signature
            pass
        check_not_awaitable("configure_optimizer", function(self, *args, **options))

    @property
    def M(self) -> History:  # noqa: N802 - the public name
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
        """The best value of the criteria so far, or None."""
        return self._state.best_score

    @property
    def best_epoch(self) -> int | None:
        """Number of the epoch of `best_score`, counted from 1."""
        return self._state.best_epoch

    @property
    def best_models(self) -> list[BestModel]:
        """The weights files of the best validations, with ``Checkpoint(keep_best=)``; best first.

        The newest is complete when the run has ended. A file that you remove is in the list until
        the next run begins.
        """
        return list(self._state.best_models.models)

    @property
    def epoch_num(self) -> int:
        """Number of epochs trained in all runs since the last reset."""
        return self._state.epoch_num

    @property
    def name(self) -> str:
        """The label of the trainer, by default the class name of the model."""
        return self._state.config.name

    @property
    def model(self) -> nn.Module:
        """The model; the plain one if steps call it compiled."""
        return self._state.config.model

    @property
    def optimizer(self) -> Any:
        """The ``optimizer`` of the constructor: an optimizer or a list."""
        return self._state.config.optimizer

    @property
    def optimizers(self) -> list[Optimizer]:
        """The list of all optimizers."""
        return self._state.config.optimizers

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler, or the list of them, or None.

        One that a function makes is there from the first `fit` on.
        """
        return self._state.config.present_lr_scheduler

    @property
    def lr_schedulers(self) -> list[Any]:
        """The list of all schedulers."""
        return self._state.config.lr_schedulers

    @property
    def loss_function(self) -> LossFunction | None:
        """The loss function, or None."""
        loss_function: LossFunction | None = self._state.config.loss_function
        return loss_function

    @property
    def train_dl(self) -> Any:
        """The train loader of the constructor."""
        return self._state.config.train_dl

    @property
    def valid_dl(self) -> Any:
        """The validation loader of the constructor."""
        return self._state.config.valid_dl

    @property
    def test_dl(self) -> Any:
        """The test loader of the constructor."""
        return self._state.config.test_dl

    @property
    def device(self) -> torch.device:
        """The device of the training."""
        return self._state.config.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that floating tensors of the batches are cast to."""
        return self._state.config.dtype

    @property
    def criteria(self) -> str | None:
        """Name of the metric that compares models, or None."""
        criteria = self._state.criteria
        return None if criteria is None else criteria.name

    @property
    def best_model_name(self) -> str:
        """The name of the best weights."""
        return self._state.config.best_model_name

    @property
    def pretrained_model_name(self) -> str:
        """The name of the weights that the model had before the first run."""
        return PRETRAINED

    @property
    def save_path(self) -> Path:
        """The directory for files."""
        return self._state.config.save_path

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return self._state.control is not None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled, since it holds locks and files. "
            "Copy model and optimizer together, copy.deepcopy((model, optimizer)), and make a "
            "trainer of them; for a Runner submit a function that makes the trainer"
        )

    def __repr__(self) -> str:
        best = ""
        if self.best_score is not None:
            score = format_number(self.best_score)
            best = f", best {self.criteria} {score} in epoch {self.best_epoch}"
        status = "running" if self.running else "idle"
        model = type(self.model).__name__
        of_model = "" if self.name == model else f" of {model}"
        details = f"epoch {self.epoch_num}{best}, {status} on {self.device}"
        return printable(f"<{type(self).__name__} {self.name!r}{of_model}: {details}>")
