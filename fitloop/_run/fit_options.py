"""The arguments of ``fit`` for ``Runner.submit``: their types, and checks that need no trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

from fitloop._arguments import expect
from fitloop._checkpointing.policy import Checkpoint, check_checkpoint
from fitloop._data.inspection import check_loader
from fitloop._display.printed import PRINT_STYLES, PrintStyle
from fitloop._engine.config import (
    as_list,
    check_callable,
    check_callbacks,
    check_flag,
    check_number,
    check_optional,
    check_seconds,
)
from fitloop._run.prompts import Ask
from fitloop._training.early_stop import EarlyStop, check_early_stop
from fitloop._types import Loader
from fitloop.callbacks.callback import Callback


class FitOptions(TypedDict, total=False):
    """The keyword arguments of ``fit`` besides ``epochs``."""

    train_dl: Loader | Callable[[], Loader] | None
    valid_dl: Loader | Callable[[], Loader] | None
    print_every: int
    print_style: PrintStyle
    display_metrics: str | Sequence[str] | None
    continue_loop: int
    load_best: bool
    track_batch_metrics: bool
    define_all: bool
    steps: int | None
    cast: bool
    verbose: bool
    progress: bool
    callbacks: Sequence[Callback]
    on_continue: Ask | None
    continue_timeout: float | None
    continue_default: bool
    continue_while_asking: bool
    early_stop: int | EarlyStop | None
    log_every: int | None
    checkpoint: Checkpoint | None
    resume: bool


def fit_option(name: str, value: Any) -> Any:
    """Return the checked value of an argument of ``fit``, or raise ConfigurationError."""
    check = _CHECKS.get(name)
    return value if check is None else check(name, value)


def _number(least: int, meaning: str = "") -> Callable[[str, Any], int]:
    return lambda name, value: check_number(name, value, least, meaning=meaning)


def _names(name: str, value: Any) -> list[str] | None:
    names = None if value is None else as_list(value)
    fits = names is None or all(isinstance(one, str) for one in names)
    expect(fits, name, value, "the name of a metric, or a list of names")
    return names


def _print_style(name: str, value: Any) -> PrintStyle:
    expect(value in PRINT_STYLES, name, value, "'block' or 'line'")
    return cast("PrintStyle", value)


def _on_continue(name: str, value: Any) -> Any:
    if value is not None:
        check_callable(name, value, "the PromptAsked event")
    return value


def _loader(name: str, value: Any) -> Any:
    if value is not None:
        check_loader(name, value)
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("train_dl", "valid_dl", "test_dl"), _loader),
    **dict.fromkeys(("load_best", "track_batch_metrics", "define_all", "cast"), check_flag),
    **dict.fromkeys(("verbose", "progress", "resume"), check_flag),
    **dict.fromkeys(("continue_default", "continue_while_asking"), check_flag),
    "epochs": _number(0),
    "print_every": _number(0, "0 prints nothing"),
    "print_style": _print_style,
    "display_metrics": _names,
    "continue_loop": _number(0, "epochs between questions"),
    "steps": lambda name, value: check_optional(
        name, value, 1, meaning="batches of each phase at most"
    ),
    "callbacks": lambda _name, value: check_callbacks(value),
    "on_continue": _on_continue,
    "continue_timeout": check_seconds,
    "log_every": lambda name, value: (
        check_optional(name, value, 0, meaning="optimizer steps from one MetricsLogged to the next")
        or None
    ),
    "early_stop": lambda _name, value: check_early_stop(value),
    "checkpoint": lambda _name, value: check_checkpoint(value),
}
