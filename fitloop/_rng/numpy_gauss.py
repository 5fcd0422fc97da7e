"""Whether numpy's functions keep the other of a pair of normal numbers.

They keep it beside their bit generator, in the object whose methods they are. Asking for it makes
a copy of the whole state, which takes longer than a step of a small model. Where a look at import
finds the flag in that object's memory, it is read there, and the copy is made only if it is set.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any

import numpy as np

_RANDOM: Any = getattr(np.random.mtrand, "_rand", None)
"""the one whose methods are the functions of the module; scikit-learn takes it there, too"""


def cached_normal() -> dict[str, Any] | None:
    """Return the state of numpy's functions if they keep a number, else None."""
    if _FLAG is not None and not _FLAG.value:
        return None
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return state if state["has_gauss"] else None


def _find_flag() -> int | None:
    """Return where the flag is in the memory of a `RandomState`; None where that is not certain.

    It is an int before a double, the number itself (``aug_bitgen_t`` in numpy's sources).
    """
    if sys.implementation.name != "cpython" or type(_RANDOM) is not np.random.RandomState:
        return None
    probe = np.random.RandomState(1)
    probe.standard_normal()  # makes a pair, of which one is kept
    gauss = probe.get_state(legacy=False)["gauss"]
    memory = _memory_of(probe)
    place = memory.find(struct.pack("d", gauss)) - 8
    if place < object.__basicsize__ or memory.count(struct.pack("d", gauss)) != 1:
        return None
    seen = []
    for _ in range(4):
        probe.standard_normal()
        told = probe.get_state(legacy=False)["has_gauss"]
        seen.append((told, struct.unpack_from("i", _memory_of(probe), place)[0]))
    return place if seen == [(0, 0), (1, 1), (0, 0), (1, 1)] else None


def _memory_of(state: np.random.RandomState) -> bytes:
    return ctypes.string_at(id(state), type(state).__basicsize__)


_PLACE = _find_flag()
_FLAG = None if _PLACE is None else ctypes.c_int.from_address(id(_RANDOM) + _PLACE)
