"""Locks that are held around each fork of this process, so that the child can seed its generators.

A process with threads may be forked while another thread is inside a generator. The child inherits
the lock of that generator, which is never released there: a worker process of a DataLoader, which
seeds the generators first, would wait for ever.

A child of ``fork`` has only the thread that forked. So this thread acquires the locks before, and
releases them afterwards in both processes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import cache
from typing import Any

import torch

from fitloop._rng.streams import get_bits

LOCK_TIMEOUT = 1.0
"""seconds to wait for each lock; after that the fork goes on without the lock"""
SWITCH_INTERVAL = 0.1
"""of the interpreter during a fork; a thread that begins to wait meanwhile may wait for so long"""
_FREE_SECONDS = 50e-6
"""duration of a read of torch's generator above which another thread was inside it"""
_MAX_READS = 100


@cache
def protect_forks() -> None:
    """Hold the locks around each fork from now on."""
    if hasattr(os, "register_at_fork"):
        guard = _ForkGuard()
        os.register_at_fork(before=guard.begin, after_in_parent=guard.end, after_in_child=guard.end)


class _ForkGuard:
    """Holds the locks of one fork at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forking: int | None = None
        """the thread that holds the locks"""
        self._acquired: list[Any] = []
        self._interval = 0.0

    def begin(self) -> None:
        """Acquire the locks; in the thread that is going to fork."""
        if not self._lock.acquire(timeout=LOCK_TIMEOUT):
            return
        self._forking, self._interval = threading.get_ident(), sys.getswitchinterval()
        self._acquired = [lock for lock in _python_locks() if lock.acquire(timeout=LOCK_TIMEOUT)]
        # The lock inside torch's generator can only be waited for. With a long interval no other
        # thread gets the interpreter, and thereby the generator, between the wait and the fork.
        sys.setswitchinterval(SWITCH_INTERVAL)
        for _read in range(_MAX_READS):
            start = time.perf_counter()
            torch.default_generator.get_state()
            if time.perf_counter() - start < _FREE_SECONDS:
                break

    def end(self) -> None:
        """Release the locks, in the parent and in the child."""
        if self._forking != threading.get_ident():
            return
        sys.setswitchinterval(self._interval)
        acquired, self._acquired, self._forking = self._acquired, [], None
        for lock in reversed(acquired):
            lock.release()
        self._lock.release()


def _python_locks() -> list[Any]:
    """Return the locks of the functions that seed the devices of torch, and numpy's generator."""
    backends = (torch.cuda, torch.xpu, torch.mtia)
    locks = [getattr(backend, "_initialization_lock", None) for backend in backends]
    locks.append(get_bits().lock)
    return [lock for lock in locks if lock is not None]
