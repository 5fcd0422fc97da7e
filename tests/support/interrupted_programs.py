"""Programs that a test runs and interrupts."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def start_program(command: Sequence[str], directory: Path) -> subprocess.Popen[str]:
    """Begin a program as in the foreground of a terminal, with its output in pipes."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        # What is begun in the background of a shell is deaf to SIGINT, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
