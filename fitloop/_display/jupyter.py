"""The Jupyter kernel of this process: detects it and shows content in it.

The only importer of IPython, which a kernel has imported already. Knows nothing of training.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fitloop._blocks import contextmanager

INTERRUPT_SECONDS = 0.2
"""the longest time until an interruption of the kernel takes effect"""


class Handle(Protocol):
    """Content on the screen, as IPython's ``DisplayHandle``."""

    def update(self, obj: Any, *, raw: bool) -> Any:
        """Replace the content by ``obj``."""


Display = Callable[[dict[str, str]], Handle]
"""shows content by MIME type, and returns a handle to replace it"""


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    get_shell = getattr(ipython, "get_ipython", lambda: None)
    shell = get_shell()
    return shell is not None and hasattr(shell, "kernel")


def prints_to_notebook() -> bool:
    """Return whether prints appear in a notebook, that is, ``sys.stdout`` is not redirected."""
    streams = sys.modules.get("ipykernel.iostream")  # other kernels have other streams
    return in_notebook() and (streams is None or isinstance(sys.stdout, streams.OutStream))


@contextmanager
def interruptible() -> Iterator[None]:
    """Let interruptions of the kernel take effect in the block; elsewhere do nothing.

    To interrupt a cell, a kernel cancels its task by a callback on the event loop, but does not
    wake the loop (https://github.com/ipython/ipykernel/issues/881). A loop that only waits for a
    run would sleep until the run ends, so the block wakes it every `INTERRUPT_SECONDS`.

    The cancellation is then shown in one line instead of a traceback: it tells what the person did.
    """
    if not in_notebook():
        yield
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # a loop of trio, which is not the kernel's
        yield
        return

    timer: asyncio.TimerHandle

    def wake() -> None:
        nonlocal timer
        timer = loop.call_later(INTERRUPT_SECONDS, wake)

    wake()
    try:
        yield
    except asyncio.CancelledError as error:
        line = "CancelledError: the run was interrupted; it ended after a whole batch"
        setattr(error, "_render_traceback_", lambda: [line])  # noqa: B010 - IPython asks for it
        raise
    finally:
        timer.cancel()


def display(content: dict[str, str]) -> Handle:
    """Show content in the current cell and return a handle to replace it; blocks."""
    from IPython.display import display as show

    handle: Handle = show(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return handle
