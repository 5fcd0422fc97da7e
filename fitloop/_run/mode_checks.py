"""Warnings of modes around a run that do not hold in it, or that may belong to another task."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

from fitloop._blocks import contextmanager
from fitloop._concurrency.task_state import TorchState
from fitloop._errors import ThreadModeWarning, warn_user

_runs: list[tuple[int, TorchState]] = []
"""thread of the event loop and modes of each run in progress around which modes are open"""


@contextmanager
def checked_modes(call: str, *, trains: bool) -> Iterator[None]:
    """Warn of modes around the public verb ``call``; the block awaits its run."""
    modes = TorchState.read()
    if trains and (modes.inference or not modes.grad):
        name = "inference_mode" if modes.inference else "no_grad"
        warn_user(
            f"{call}() was called in torch.{name}(), which has no effect on it: a run sets the "
            f"grad mode of each phase itself, and trains with gradients. Call {call}() outside, "
            "or enter the mode in a stage function",
            ThreadModeWarning,
        )
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        warn_user(
            f"{call}() was called while torch's profiler records, which it does for its own thread "
            "only; the run has another one. Start it in preloop and stop it in postloop, or use "
            "run_profiler()",
            ThreadModeWarning,
        )
    if not _are_open(modes):
        yield
        return
    run = threading.get_ident(), modes
    if any(run[0] == thread and _blocks(modes) == _blocks(other) for thread, other in _runs):
        warn_user(
            f"{call}() was called while a mode of torch is open that holds around another run on "
            "this event loop too. torch keeps modes for each thread, so a `with` block around an "
            "await holds in all tasks, and this run takes the mode over. If it is meant for one "
            "run only, enter it in the stage functions of that run",
            ThreadModeWarning,
        )
    _runs.append(run)
    try:
        yield
    finally:
        _runs.remove(run)


def warn_of_process(name: str) -> None:
    """Warn of modes around the submission of a job that trains in another process."""
    if _are_open(TorchState.read()):
        warn_user(
            f"job {name!r} was submitted in a mode of torch, such as autocast or a default device, "
            "and its backend trains in another process, where the mode does not hold. Enter it in "
            "the function that makes the trainer, or in stage functions",
            ThreadModeWarning,
        )


def _blocks(modes: TorchState) -> tuple[object, ...]:
    """Return the modes that a ``with`` block opens."""
    functions = [mode for mode in modes.function_modes if mode is not modes.default_device]
    return modes.autocast_nesting, functions, modes.dispatch_modes, modes.saved_tensor_hooks


def _are_open(modes: TorchState) -> bool:
    return any(_blocks(modes))
