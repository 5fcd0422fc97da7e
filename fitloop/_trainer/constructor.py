"""The constructor of a trainer, which both kinds of it share.

Turns the users' arguments into checked `TrainerConfig` and makes the `TrainerState`; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._engine.config import (
    Interval,
    TrainerConfig,
    check_callbacks,
    check_optional,
    checked_path,
)
from fitloop._errors import ConfigurationError
from fitloop._run.prompts import Ask
from fitloop._trainer.view import TrainerView
from fitloop._training.layers import configure_optimizer as default_configure_optimizer
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Loader, LossFunction, StageFunction
from fitloop.callbacks.callback import Callback

DEFAULT_SAVE_PATH = "fitloop_state"


class Trainer(TrainerView):
    """A trainer as it was constructed; `FitLoop` and `SyncFitLoop` have its verbs."""

    # The constructor is the one long signature of the library: it names every part once.
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        loss_function: LossFunction,
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
        configure_optimizer: Callable[[Any], object] | None = None,
        criteria: str | None = None,
        criteria_direction: int | None = None,
        save_to_disk: bool = False,
        save_path: str | Path | None = None,
        best_model_name: str = "best_model",
        name: str | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
        prefetch: int | None = None,
        loader_randomness: Literal["global", "own"] = "global",
        loader_grace: float = 5.0,
        callbacks: Sequence[Callback] = (),
        on_continue: Ask | None = None,
        scaler: Any = None,
        stateful: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the arguments; nothing is run, moved or changed.

        Args:
            model: what is trained. It is moved to ``device`` when the first run begins.
            optimizer: one, or a list of them.
            loss_function: ``(prediction, target) -> 0-d tensor``.
            train_dl, valid_dl, test_dl: iterables of batches, with or without length, async ones
                too, or functions that return one; each may also be passed to the call.
            train_epoch_start, train_step, train_epoch_end: stage functions of the train phase.
            valid_epoch_start, valid_step, valid_epoch_end: those of the validation.
            test_epoch_start, test_step, test_epoch_end: those of the test.
            preloop, postloop: called with the trainer before the first and after the last epoch.
            lr_scheduler: one learning-rate scheduler, or a list of them.
            scheduler_interval: when they are stepped: ``"batch"``, ``"epoch"`` or ``"valid"``
                (after validation, with the criteria), for all or as a list. By default, with
                the default ``train_step``: OneCycleLR and CyclicLR per batch, ReduceLROnPlateau
                after validation, others per epoch; your own ``train_step`` steps them itself.
            device: CUDA if there is one, else the CPU.
            dtype: what floating tensors of the batches are cast to, and the model with them. By
                default that of the model's first floating parameter, which is float32 as a rule.
            configure_optimizer: called with the trainer whenever weights were restored, so that
                training can go on; the default is `fitloop.configure_optimizer`.
            criteria: name of a metric of ``valid_epoch_end`` by which models are compared. With the
                default ``valid_epoch_end``: ``accuracy``, or ``loss`` where there is no accuracy.
            criteria_direction: 1, more is better, or -1; needed for a criteria that names a loss.
            save_to_disk: keep the pretrained and the best weights as files under ``save_path``
                instead of in CPU memory. An older best or pretrained file there is replaced.
            save_path: directory for files, ``fitloop_state`` by default; nothing is written before
                something is to be saved.
            best_model_name: name of the best weights.
            name: label in lines, prompts, events and messages.
            seed: of the trainer's own randomness; without one it draws from the process's
                generators, as a hand-written loop would. See ``docs/randomness.md``.
            num_threads: intra-op threads of the steps; torch's own number by default.
            prefetch: batches loaded ahead of the steps, in a thread or on the event loop; 0 for
                none. By default 2 where that is found to be faster, by measuring.
            loader_randomness: ``"own"`` promises that the loaders draw nothing from the process's
                random generators, so that a seeded run may load beside its steps.
            loader_grace: seconds that a run that ends waits for a loader that does not return.
            callbacks: called with every event of every run. A plain function is called on the
                thread of the run, which waits for it; an ``async def`` one on the event loop, which
                the training does not wait for, except at its end.
            on_continue: asked instead of the terminal with ``continue_loop``; an ``async def`` that
                takes a `PromptAsked` and returns whether to go on.
            scaler: a ``torch.amp.GradScaler``; the default ``train_step`` scales its loss with it.
            stateful: by name, more objects with ``state_dict`` and ``load_state_dict`` that
                snapshots are to hold and dry runs to put back: an EMA, a metric, your own.

        Raises:
            ConfigurationError: an argument cannot work; the message says what was expected.
            StageSignatureError: a function cannot be called as the run will call it.
        """
        share = TRAINER_DEFAULTS.get()
        parts = TrainerConfig(
            model=model,
            optimizer=optimizer,
            loss_function=loss_function,
            train_dl=train_dl,
            valid_dl=valid_dl,
            test_dl=test_dl,
            train_epoch_start=train_epoch_start,
            train_step=train_step,
            train_epoch_end=train_epoch_end,
            valid_epoch_start=valid_epoch_start,
            valid_step=valid_step,
            valid_epoch_end=valid_epoch_end,
            test_epoch_start=test_epoch_start,
            test_step=test_step,
            test_epoch_end=test_epoch_end,
            preloop=preloop,
            postloop=postloop,
            lr_scheduler=lr_scheduler,
            scheduler_interval=scheduler_interval,
            device=_device(share.device if device is None else device),
            dtype=_dtype_of(model) if dtype is None else dtype,
            cast_model=dtype is not None,
            configure_optimizer=configure_optimizer or default_configure_optimizer,
            criteria=criteria,
            criteria_direction=_direction(criteria, criteria_direction),
            save_to_disk=save_to_disk,
            save_path=checked_path(_first(save_path, share.save_path, DEFAULT_SAVE_PATH)),
            best_model_name=best_model_name,
            name=_first(name, share.name, type(model).__name__),
            named=name is not None or share.name is not None,
            seed=check_optional("seed", seed, 0),
            num_threads=check_optional("num_threads", num_threads, 1),
            prefetch=check_optional("prefetch", prefetch, 0),
            loader_randomness=loader_randomness,
            loader_grace=loader_grace,
            callbacks=check_callbacks(callbacks),
            on_continue=on_continue,
            scaler=scaler,
            stateful=_stateful(stateful),
        )
        self._state = TrainerState(parts)


def _first(*values: Any) -> Any:
    """Return the first that is not None."""
    return next(value for value in values if value is not None)


def _stateful(given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(f"stateful is {given!r:.60}; expected objects by name, as a dict")
    return {str(name): item for name, item in (given or {}).items()}


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device is {device!r}; expected a torch.device or a name such as 'cpu' or 'cuda:0'"
        ) from error


def _dtype_of(model: object) -> torch.dtype:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def _direction(criteria: str | None, direction: int | None) -> int:
    if direction is not None:
        return direction
    if isinstance(criteria, str) and "loss" in criteria.lower():
        raise ConfigurationError(
            f"criteria is {criteria!r} and criteria_direction is not given; give "
            "criteria_direction=-1 if less is better, 1 if more is"
        )
    return 1
