"""The processor, its cores, the accelerator, and the versions of Python and torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def accelerator() -> torch.device | None:
    """Return the device of ``torch.accelerator`` (CUDA, MPS, XPU ...), or None if there is none."""
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def processor() -> str:
    """Return the name of the processor; its architecture if the system does not tell the name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and torch."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}
