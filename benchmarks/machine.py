"""On what, and with what, something was measured."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


class NotHereError(Exception):
    """A benchmark cannot be run on this machine; the message says what it lacks."""


def machine(*packages: str, threads: int = 1) -> dict[str, Any]:
    """Return processor, cores, versions and settings; of ``packages`` those that are installed.

    ``threads`` is what the contenders had for their operations.
    """
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "intra-op threads": threads,
        "switch interval": f"{sys.getswitchinterval() * 1e3:g} ms",
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
