"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


class UnsupportedMachineError(Exception):
    """A benchmark cannot run on this machine; the message names the missing part."""


def machine(*packages: str, threads: int = 1) -> dict[str, Any]:
    """Return processor, cores, versions and settings, for the end of a report.

    Args:
        packages: included if they are installed.
        threads: intra-op threads of the contenders.
    """
    info: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "intra-op threads": threads,
        "switch interval": f"{sys.getswitchinterval() * 1e3:g} ms",
    }
    if torch.cuda.is_available():
        info["device"] = torch.cuda.get_device_name()
    for package in packages:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    return info


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
