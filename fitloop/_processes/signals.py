"""Ends a process of fitloop with its parent; leaves the signals of a program to the parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from functools import partial

PARENT_SIGNALS = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
}
"""signals that a terminal, a batch system or a supervisor sends to all processes of a program; only
the parent acts upon them"""
_PR_SET_PDEATHSIG = 1
"""option of prctl in <linux/prctl.h>"""


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, the process with the id ``parent``, ends.

    Elsewhere this process ends when it reads the end of the connection. Code that keeps the
    interpreter's lock, such as a long call of a C extension, delays that.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # a C library without prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(0)


def leave_signals_to_parent() -> None:
    """Do nothing upon `PARENT_SIGNALS`: the parent cancels the job, or its end ends this process.

    Processes that a job starts are ended by these signals as usual, except SIGINT.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handled = PARENT_SIGNALS - {signal.SIGINT}
    for number in handled:
        if signal.getsignal(number) != signal.SIG_IGN:  # such as SIGHUP under nohup
            signal.signal(number, _do_nothing)  # unlike SIG_IGN, exec undoes it
            if hasattr(signal, "siginterrupt"):
                signal.siginterrupt(number, False)
            if hasattr(os, "register_at_fork"):
                reset = partial(signal.signal, number, signal.SIG_DFL)
                os.register_at_fork(after_in_child=reset)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENT_SIGNALS)


def _do_nothing(_number: int, _frame: object) -> None:
    pass
