"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import loops
from benchmarks.workloads import make_batches, make_model, make_optimizer


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
        "a step of the small MLP by hand": f"{step_seconds() * 1e6:.0f} us",
    }
    if torch.cuda.is_available():
        info["device"] = torch.cuda.get_device_name()
    for package in packages:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    return info


def step_seconds() -> float:
    """Return the seconds of a step by hand, which tell how busy a shared machine is now."""
    model, count = make_model("mlp"), 100
    optimizer, batches = make_optimizer(model), make_batches("mlp", count)
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(7):
        began = time.perf_counter()
        loops.bare(model, optimizer, batches, epochs=1, keep_metrics=False)
        seconds.append((time.perf_counter() - began) / count)
    torch.set_num_threads(threads)
    return statistics.median(seconds)


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
