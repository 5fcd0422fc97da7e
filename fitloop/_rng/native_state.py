"""Fast access to the memory of random generators: Python's, and numpy's of the kind MT19937.

``random.getstate`` takes longer than a step of a small model. CPython keeps the state in one block
of memory, which is copied here in half a microsecond. With another interpreter or layout, the
functions of ``random`` do the same, slowly.
"""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from typing import Any, NamedTuple

import numpy as np

MT19937_BYTES = 4 * 624 + 4
"""Size of a state: 624 words of a buffer, and the position in it."""
GLOBAL_PYTHON: random.Random = random.seed.__self__  # type: ignore[attr-defined]
"""The generator whose methods are the functions of the module ``random``."""
# Interception replaces the functions of the module, and must not see these calls.
_getstate, _setstate = random.getstate, random.setstate


class PythonState(NamedTuple):
    """State of a generator of the module ``random``; immutable."""

    memory: bytes
    """Position in the buffer, then the 624 words of the buffer, 32 bits each."""
    gauss: float | None
    """Second of a pair of normal numbers, which ``random.gauss`` keeps for its next call."""


def from_tuple(state: tuple[Any, ...]) -> PythonState:
    """Convert a tuple of ``random.getstate``; raises an exception for a wrong tuple."""
    random.Random().setstate(state)  # checks it
    if not isinstance(state[2], float | None):
        raise TypeError(f"{state[2]!r:.60} is no number that gauss keeps")
    return _packed(state)


def to_tuple(state: PythonState) -> tuple[Any, ...]:
    """Convert to a tuple for ``random.setstate``."""
    position, *words = array("I", state.memory)
    return 3, (*words, position), state.gauss


def _packed(state: tuple[Any, ...]) -> PythonState:
    _version, words, gauss = state
    return PythonState(array("I", (words[-1], *words[:-1])).tobytes(), gauss)


def seeded_python(seed: int) -> PythonState:
    """Return the state after ``random.seed(seed)``."""
    return _packed(random.Random(seed).getstate())


def mt19937_memory(bits: Any) -> Any:
    """Return the memory of a numpy bit generator, valid while it lives; None for another kind."""
    if not isinstance(bits, np.random.MT19937):
        return None
    return (ctypes.c_char * MT19937_BYTES).from_address(bits.ctypes.state_address)


def _memory(generator: random.Random) -> Any:
    return (ctypes.c_char * MT19937_BYTES).from_address(id(generator) + object.__basicsize__)


def _is_layout_known() -> bool:
    """Return whether the memory of Python's generators is as expected, by reading and writing."""
    if sys.implementation.name != "cpython" or array("I").itemsize != 4:
        return False
    size: int = random.Random.__base__.__basicsize__  # type: ignore[union-attr]
    if size < object.__basicsize__ + MT19937_BYTES:
        return False
    probe, twin = random.Random(1), random.Random(2)
    for numbers in (0, 1, 700):
        for _ in range(numbers):
            probe.random()
        state = probe.getstate()
        if _memory(probe).raw != _packed(state).memory:
            return False
        _memory(twin).raw = _memory(probe).raw
        if twin.getstate() != state:
            return False
    return True


def _read_slowly() -> PythonState:
    return _packed(_getstate())


def _put_slowly(state: PythonState) -> None:
    _setstate(to_tuple(state))


_MEMORY = _memory(GLOBAL_PYTHON)


def _read_memory() -> PythonState:
    return PythonState(_MEMORY.raw, GLOBAL_PYTHON.gauss_next)  # type: ignore[attr-defined]


def _put_memory(state: PythonState) -> None:
    _MEMORY.raw, GLOBAL_PYTHON.gauss_next = state  # type: ignore[attr-defined]


if _is_layout_known():
    read_python, put_python = _read_memory, _put_memory
else:
    read_python, put_python = _read_slowly, _put_slowly
