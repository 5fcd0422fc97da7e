"""Forks of a process whose other threads are inside the generators."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT

from fitloop._rng.forks import protect_forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


def _draw_with_torch() -> None:
    torch.randn(300_000)


def _draw_with_numpy() -> None:
    np.random.normal(size=300_000)


def _seed_devices() -> None:
    torch.manual_seed(0)


def _seed_all() -> None:
    torch.manual_seed(1)
    np.random.seed(1)


@pytest.mark.parametrize("use", [_draw_with_torch, _draw_with_numpy, _seed_devices])
def test_fork_when_another_thread_uses_a_generator_then_the_child_can_seed_it(
    use: Callable[[], None],
) -> None:
    """Without the locks, most of these children never end."""
    protect_forks()
    began, over = threading.Event(), threading.Event()
    interval = sys.getswitchinterval()

    def work() -> None:
        while not over.is_set():
            use()
            began.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        began.wait()
        for _fork in range(5):
            child = multiprocessing.get_context("fork").Process(target=_seed_all)
            child.start()
            child.join(HANG_TIMEOUT)
            hangs = child.is_alive()
            child.kill()
            child.join()
            child.close()
            assert not hangs
    finally:
        over.set()
        thread.join()
    assert sys.getswitchinterval() == interval


def test_fork_when_there_was_one_then_the_locks_are_free(capfd: pytest.CaptureFixture[str]) -> None:
    protect_forks()
    child = multiprocessing.get_context("fork").Process(target=_seed_all)
    child.start()
    child.join(HANG_TIMEOUT)
    assert child.exitcode == 0
    child.close()
    _seed_all()
    assert capfd.readouterr().err == ""  # of an error in a hook
