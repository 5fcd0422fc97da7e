"""Compiled models: the model that steps call, apart from the plain one that the trainer owns.

Weights, snapshots, modes and names are those of the plain model. So no name has the prefix
``_orig_mod.``, and a training can go on with or without ``compile``.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from fitloop._arguments import expect
from fitloop._data.inspection import sample_counts
from fitloop._errors import CompileWarning, ConfigurationError, one_line, warn_user
from fitloop._types import Phase

_lock = threading.Lock()


def owned_model(model: Any) -> Any:
    """Return the plain module of a model that was given as ``torch.compile(module)``."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def check_compile(value: Any, model: object) -> dict[str, Any] | None:
    """Return the arguments of ``torch.compile`` for the argument ``compile``; None for False.

    Raises ConfigurationError for another value, or for a model that is compiled already.
    """
    if value is False:
        return None
    expected = "True, False, or a dict of arguments of torch.compile, such as "
    expected += "{'mode': 'reduce-overhead'}"
    expect(value is True or isinstance(value, Mapping), "compile", value, expected)
    options = {} if value is True else dict(value)
    try:
        inspect.signature(torch.compile).bind(nn.Module(), **options)
    except TypeError as error:
        raise ConfigurationError(
            f"compile is {value!r:.80}, which torch.compile does not take: {error}"
        ) from None
    if owned_model(model) is not model or getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigurationError(
            "compile is given, and the model is compiled already; give the plain model, or leave "
            "compile= out"
        )
    return options


def compiled_model(model: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """Return the module that calls ``model`` compiled. Its first calls compile.

    torch compiles one graph at a time in a process; other trainers wait for it. Raises
    ConfigurationError if torch refuses the options.
    """
    copies: Any = {key: copy.copy(value) for key, value in options.items()}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # Otherwise all models of one class have one limit of recompilations in a process, after
        # which torch calls them as they are.
        copies.setdefault("isolate_recompiles", True)
    try:
        with _lock:  # it imports and sets up the compiler
            return cast(nn.Module, torch.compile(model, **copies))
    except Exception as error:
        raise ConfigurationError(
            f"compile is {options!r:.80}, which torch.compile refuses: {one_line(error)}"
        ) from error


def warn_of_compilation(
    model: nn.Module,
    options: Mapping[str, Any] | None,
    phases: Iterable[tuple[Phase, Any]],
    steps: int | None,
) -> None:
    """Warn if a model is not compiled as it seems, or more often than needed, in a fit."""
    forward = getattr(type(model), "forward", None)
    if options is None:
        is_torchs_own = str(getattr(forward, "__module__", "")).startswith("torch.nn.modules")
        if is_torchs_own and getattr(model, "_compiled_call_impl", None) is not None:
            warn_user(
                f"{type(model).__name__}.compile() compiles nothing, since torch skips the code of "
                "its own modules; give FitLoop(compile=True) or torch.compile(model) instead",
                CompileWarning,
            )
        return
    if options.get("dynamic") or options.get("disable"):
        return
    samples, size = sample_counts(dict(phases).get(Phase.TRAIN), steps)
    if samples and size and samples > size and samples % size:
        warn_user(
            f"the last train batch has {samples % size} samples, the others {size}, and a model is "
            "compiled anew for another size; give the DataLoader drop_last=True, or "
            "compile={'dynamic': True}",
            CompileWarning,
        )
