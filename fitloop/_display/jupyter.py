"""The Jupyter kernel that this process may be: whether there is one, and how to show things in it.

Sole importer of IPython, which is there long before in a kernel. Knows nothing of training.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

INTERRUPT_SECONDS = 0.2
"""how long an interruption of the kernel may go unnoticed"""


class Handle(Protocol):
    """A display that was made, as IPython's ``DisplayHandle``."""

    def update(self, obj: Any, *, raw: bool) -> Any:
        """Show ``obj`` in its place."""


Display = Callable[[dict[str, str]], Handle]
"""show content by MIME type, and return the handle to change it"""


def in_notebook() -> bool:
    """Return whether a Jupyter kernel runs in this process."""
    shell = _shell()
    return shell is not None and hasattr(shell, "kernel")


def prints_to_notebook() -> bool:
    """Return whether what is printed now appears in a notebook, and is not redirected."""
    streams = sys.modules.get("ipykernel.iostream")  # other kernels have others
    return in_notebook() and (streams is None or isinstance(sys.stdout, streams.OutStream))


@contextmanager
def interruptible() -> Iterator[None]:
    """Have the kernel notice within the block that it is interrupted; elsewhere do nothing.

    A kernel cancels what a cell awaits in a callback of its event loop, for which it does not wake
    the loop up (https://github.com/ipython/ipykernel/issues/881), and a loop that waits for a run
    may sleep until the run is over.
    """
    if not in_notebook():
        yield
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # trio's, which is not the kernel's own
        yield
        return

    timer = loop.call_later(INTERRUPT_SECONDS, lambda: wake())

    def wake() -> None:
        nonlocal timer
        timer = loop.call_later(INTERRUPT_SECONDS, wake)

    try:
        yield
    finally:
        timer.cancel()


def _shell() -> Any:
    ipython = sys.modules.get("IPython")  # a kernel has imported it long ago
    find = getattr(ipython, "get_ipython", lambda: None)
    return find()


def display(content: dict[str, str]) -> Handle:
    """Show content in the cell that runs, and return the handle to change it; blocks."""
    from IPython.display import display as show

    handle: Handle = show(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return handle
