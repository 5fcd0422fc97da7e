"""The default random generators of accelerators (CUDA, MPS, XPU and others), by device name.

A name is that of a device with its index, such as ``"cuda:0"``. The generator of the CPU is not
among them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def generator_names(device: torch.device) -> tuple[str, ...]:
    """Return the name of the default generator of a device; none for the CPU and ``meta``."""
    if device.type in ("cpu", "meta"):
        return ()
    return (f"{device.type}:{device.index or 0}",)


@cache
def default_generator(name: str) -> Any:
    """Return the default generator of a device, or None if it is not here.

    torch has no common function for it: most devices have a list, MPS has one generator.
    """
    device = torch.device(name)
    if device.type == "mps":
        has_mps = torch.backends.mps.is_available()
        return torch.mps._get_default_mps_generator() if has_mps else None
    index = device.index or 0
    try:
        module: Any = torch.get_device_module(device)
        is_here = module.is_available() and index < module.device_count()
    except (RuntimeError, AttributeError):  # of an extension that is not installed
        return None
    if not is_here:
        return None
    if hasattr(module, "init"):
        module.init()  # the list is empty before
    return module.default_generators[index]


def is_default_generator(generator: torch.Generator) -> bool:
    """Return whether a generator is the default one of a device, or of the CPU."""
    if generator.device.type == "cpu":
        return generator is torch.default_generator
    return any(generator is default_generator(name) for name in generator_names(generator.device))
