"""Whether a launcher such as ``torchrun`` has started this process together with others."""

from __future__ import annotations

import os
import sys
from typing import Any


def launched_size() -> int:
    """Return the number of processes that a launcher started together; 1 if there was no launcher.

    That is the size of the process group of torch or, before there is one, that in the environment.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "RANK" in os.environ and size.isdecimal() else 1
