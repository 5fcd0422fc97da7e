"""Puts back what a job has set for its whole process, so that the next job starts as the first one.

Knows the settings of Python and torch that jobs usually change. It cannot put back attributes of
modules, caches and threads.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

_ATTRIBUTES: list[tuple[Any, str]] = [
    *((torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.mkldnn, "enabled"),
    (torch.utils.deterministic, "fill_uninitialized_memory"),
    *((sys, name) for name in ("stdin", "stdout", "stderr", "excepthook")),
    (threading, "excepthook"),
]


def _default_device() -> torch.device | None:
    device: torch.device = torch.get_default_device()
    return None if device.type == "cpu" else device


def _set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_FUNCTIONS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, torch.set_default_device),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (np.geterr, lambda values: np.seterr(**values)),
    (os.getcwd, os.chdir),
    (lambda: dict(os.environ), _set_environment),
    (_umask, os.umask),
    (lambda: list(sys.path), lambda paths: sys.path.__setitem__(slice(None), paths)),
    (lambda: list(sys.argv), lambda words: sys.argv.__setitem__(slice(None), words)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
    (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    (gc.get_threshold, lambda values: gc.set_threshold(*values)),
]
"""pairs of functions that return and set one setting"""


@contextmanager
def job_isolation() -> Iterator[None]:
    """Seed the global random generators anew; put back the settings of the process afterwards."""
    _seed_anew()
    settings = [
        _current(read, write) for read, write in (*_FUNCTIONS, *map(_accessors, _ATTRIBUTES))
    ]
    loggers, handlers = _loggers(), _signal_handlers()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for restore in settings:
                restore()
            _restore_loggers(loggers)
            _restore_signal_handlers(handlers)


def _seed_anew() -> None:
    """Seed as a new process does. Else two jobs without a seed could get the same numbers."""
    random.seed()
    np.random.seed()
    torch.seed()


def _accessors(attribute: tuple[Any, str]) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    owner, name = attribute
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _current(read: Callable[[], Any], write: Callable[[Any], object]) -> Callable[[], None]:
    """Return a function that sets the present value of a setting, if it differs by then."""
    try:
        value = read()
    except Exception:  # such as a working directory that was removed, or a mode of newer torch
        return lambda: None

    def restore() -> None:
        try:
            differs = read() != value
        except Exception:
            differs = True
        if differs:
            with suppress(Exception):
                write(value)

    return restore


# -- logging ---------------------------------------------------------------------------------------

_LOGGER_FIELDS = ("level", "propagate", "disabled")


def _all_loggers() -> list[logging.Logger]:
    loggers = list(logging.root.manager.loggerDict.values())
    return [logging.root, *(one for one in loggers if isinstance(one, logging.Logger))]


def _loggers() -> tuple[int, dict[logging.Logger, tuple[Any, ...]]]:
    states = {
        one: (
            list(one.handlers),
            list(one.filters),
            *(getattr(one, name) for name in _LOGGER_FIELDS),
        )
        for one in _all_loggers()
    }
    return logging.root.manager.disable, states


def _restore_loggers(before: tuple[int, dict[logging.Logger, tuple[Any, ...]]]) -> None:
    disabled, states = before
    for one in _all_loggers():
        handlers, filters, *values = states.get(one, ([], [], logging.NOTSET, True, False))
        one.handlers[:], one.filters[:] = handlers, filters
        for name, value in zip(_LOGGER_FIELDS, values, strict=True):
            setattr(one, name, value)
    logging.disable(disabled)  # also makes the loggers forget which levels are enabled


# -- signals ---------------------------------------------------------------------------------------


def _signal_handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in signal.Signals}


def _restore_signal_handlers(before: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only there they can be changed
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) != handler:
            with suppress(OSError, ValueError):
                signal.signal(number, handler)
