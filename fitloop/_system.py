"""What this process runs on, as people who compare times want to know it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def core_wait() -> float:
    """Return the seconds so far in which this thread was ready and had no core; 0 if untold."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as counters:  # 16 us
            return int(counters.read().split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0


def versions() -> dict[str, str]:
    """Return the versions of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}
