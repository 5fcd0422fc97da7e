"""Import, construction and runs leave the process and the calling thread as they were."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch
from support.checked_trainer import QUIET, CheckedTrainer, fitloop_threads
from support.event_loops import HANG_TIMEOUT
from support.models import BATCHES, batches, process_generators
from support.run_endings import cancel_run, complete_run, fail_run

from fitloop import LoopState, default_batch_step


def _process() -> dict[str, Any]:
    """Return what belongs to the process or to the calling thread, and a run must not change."""
    numpy = np.geterr()
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "warnings": list(warnings.filters),
        "directory": os.getcwd(),
        "numpy": numpy,
        "thread_of_a_new_thread": _threads_of_a_new_thread(),
    }


def _threads_of_a_new_thread() -> int:
    actual: list[int] = []
    thread = threading.Thread(target=lambda: actual.append(torch.get_num_threads()))
    thread.start()
    thread.join(HANG_TIMEOUT)
    return actual[0]


@pytest.mark.parametrize("num_threads", [None, 1, 2, 3])
@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_process_when_a_run_is_over_is_as_before(
    anyio_backend: Any, end: str, num_threads: int | None
) -> None:
    run = {"completed": complete_run, "failed": fail_run, "cancelled": cancel_run}[end]
    before = _process()
    generators = process_generators()
    checked = CheckedTrainer(num_threads=num_threads, valid_dl=batches(14), seed=1)
    await run(checked)
    assert _process() == before
    assert process_generators() == generators
    assert fitloop_threads() == []


@pytest.mark.parametrize("num_threads", [1, 3])
async def test_number_of_threads_when_given_holds_in_every_plain_stage(
    anyio_backend: Any, num_threads: int
) -> None:
    seen: list[int] = []
    outside = torch.get_num_threads()

    def look(state: LoopState) -> None:
        seen.append(torch.get_num_threads())

    checked = CheckedTrainer(
        num_threads=num_threads,
        train_epoch_start=look,
        train_step=look,
        train_epoch_end=look,
    )
    await checked.fit()
    assert seen == [num_threads] * (BATCHES + 2)
    assert torch.get_num_threads() == outside


@pytest.mark.filterwarnings("ignore::fitloop.ThreadModeWarning")
@pytest.mark.parametrize("enabled", [True, False])
async def test_grad_mode_of_the_caller_when_stages_are_async_is_untouched(
    anyio_backend: Any, enabled: bool
) -> None:
    inside: list[bool] = []
    outside: list[bool] = []

    async def step(state: LoopState) -> Any:
        inside.append(torch.is_grad_enabled())
        await anyio.lowlevel.checkpoint()
        inside.append(torch.is_grad_enabled())
        return default_batch_step(state)

    checked = CheckedTrainer(train_step=step, valid_step=step, valid_dl=batches(14))
    with torch.set_grad_enabled(enabled), anyio.fail_after(HANG_TIMEOUT):
        async with anyio.create_task_group() as group:
            group.start_soon(checked.fit)
            while checked.trainer.epoch_num == 0:
                outside.append(torch.is_grad_enabled())
                await anyio.lowlevel.checkpoint()
        assert torch.is_grad_enabled() is enabled
    assert set(outside) == {enabled}
    assert inside == [True] * 2 * BATCHES + [False] * 4


def test_quiet_run_when_it_is_over_has_printed_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    checked = CheckedTrainer()
    anyio.run(lambda: checked.trainer.fit(**QUIET))
    assert capfd.readouterr() == ("", "")
