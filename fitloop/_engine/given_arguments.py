"""The arguments of a trainer's constructor, as attributes of a `LoopState`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from fitloop._data.loaders import Loading
from fitloop._engine.config import Interval, Reaction
from fitloop._engine.precision import Precision
from fitloop._types import StageFunction


def _argument(name: str, doc: str) -> Any:
    # The getter is written in C, since batch steps read arguments.
    return property(attrgetter(f"_config.{name}"), doc=doc)


class GivenArguments:
    """Attributes that read the checked arguments of a trainer, with their defaults filled in."""

    __slots__ = ()

    accumulate: int = _argument("accumulate", "Batches for one optimizer step.")
    average: Any = _argument("average", "The `EMA` or `SWA` of the weights, or None.")
    batch_size_of: Callable[[Any], int] | None = _argument(
        "batch_size_of", "The function of a batch that returns its number of samples, or None."
    )
    best_model_name: str = _argument("best_model_name", "The name of the best weights.")
    callbacks: tuple[Callable[[Any], object], ...] = _argument(
        "callbacks", "The functions that are called with every event of every run."
    )
    clip_grad: float | Callable[[list[Any]], Any] | None = _argument(
        "clip_grad", "The largest norm of the gradients, or the function that clips them, or None."
    )
    compile: dict[str, Any] | None = _argument(
        "compile", "Arguments of ``torch.compile``; None if the model is not compiled for the run."
    )
    configure_optimizer: Callable[..., object] = _argument(
        "configure_optimizer", "The function that is called each time weights were restored."
    )
    criteria: str | None = _argument(
        "criteria", "The name of the metric that compares models; None for the default."
    )
    criteria_direction: int = _argument(
        "criteria_direction", "1 if more of the criteria is better, -1 if less is."
    )
    device: torch.device = _argument("device", "The device of the model and of the batches.")
    dtype: torch.dtype = _argument("dtype", "The dtype of floating tensors in batches.")
    loader_grace: float = _argument(
        "loader_grace", "Seconds that an ending run waits for a loader that does not return."
    )
    loader_randomness: Literal["global", "own"] = _argument(
        "loader_randomness",
        'Whether the loaders may use the global random generators, or ``"own"``.',
    )
    loading: Loading | None = _argument(
        "loading", "Where loaders are read; None where that is decided by measuring."
    )
    lr_schedulers: list[Any] = _argument("lr_schedulers", "The schedulers, always as a list.")
    name: str = _argument("name", "The name of the trainer.")
    parallel: Any = _argument(
        "parallel",
        '``"ddp"``, ``"fsdp"`` or a function of the model, in several processes; None in one.',
    )
    nonfinite: Reaction = _argument("nonfinite", "What a loss or gradient that is not finite does.")
    num_threads: int | None = _argument(
        "num_threads", "Intra-op threads of the steps; None for torch's own number."
    )
    on_continue: Callable[[Any], Awaitable[bool]] | None = _argument(
        "on_continue", "The function that is asked whether to go on; None for the terminal."
    )
    postloop: Callable[[Any], object] | None = _argument(
        "postloop", "The function that is called after the last epoch, or None."
    )
    precision: Precision | None = _argument(
        "precision", '``"bf16"`` or ``"fp16"`` for steps in mixed precision, or None.'
    )
    prefetch: int | None = _argument(
        "prefetch", "Batches loaded ahead; None where that is decided by measuring."
    )
    preloop: Callable[[Any], object] | None = _argument(
        "preloop", "The function that is called before the first epoch, or None."
    )
    save_path: Path = _argument("save_path", "The directory for files of the trainer.")
    save_to_disk: bool = _argument(
        "save_to_disk", "Whether the pretrained and the best weights are kept as files."
    )
    scheduler_interval: Interval | Sequence[Interval] | None = _argument(
        "scheduler_interval", "When schedulers are stepped; None for the default."
    )
    seed: int | None = _argument("seed", "The seed of the trainer's random numbers, or None.")
    stateful: dict[str, Any] = _argument(
        "stateful", "More objects by name whose states are in snapshots."
    )
    test_dl: Any = _argument("test_dl", "The loader of the test that the constructor got, or None.")
    test_epoch_end: StageFunction | None = _argument(
        "test_epoch_end", "The function at the end of a test; None for the default."
    )
    test_epoch_start: StageFunction | None = _argument(
        "test_epoch_start", "The function at the start of a test, or None."
    )
    test_step: StageFunction | None = _argument(
        "test_step", "The batch step of a test; None for the default."
    )
    train_dl: Any = _argument(
        "train_dl", "The loader of the train phase that the constructor got, or None."
    )
    train_epoch_end: StageFunction | None = _argument(
        "train_epoch_end", "The function at the end of a train phase; None for the default."
    )
    train_epoch_start: StageFunction | None = _argument(
        "train_epoch_start", "The function at the start of a train phase, or None."
    )
    train_step: StageFunction | None = _argument(
        "train_step", "The batch step of the train phase; None for the default."
    )
    valid_dl: Any = _argument(
        "valid_dl", "The loader of the validation that the constructor got, or None."
    )
    valid_epoch_end: StageFunction | None = _argument(
        "valid_epoch_end", "The function at the end of a validation; None for the default."
    )
    valid_epoch_start: StageFunction | None = _argument(
        "valid_epoch_start", "The function at the start of a validation, or None."
    )
    valid_step: StageFunction | None = _argument(
        "valid_step", "The batch step of the validation; None for the default."
    )
