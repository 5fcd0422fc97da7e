"""The state of Python's random generator, read and put in half a microsecond.

``random.getstate`` makes 625 numbers and a tuple of them, which takes longer than a step of a
small model. CPython keeps them in the generator as one block of memory; where a look at import
finds it, that block is copied instead. Elsewhere the functions of ``random`` do the same, slowly.
"""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from typing import Any, NamedTuple

_WORDS = 624
_BYTES = 4 + 4 * _WORDS
_VERSION = 3
"""of the tuples of ``random.getstate``"""
_RANDOM: random.Random = random.seed.__self__  # type: ignore[attr-defined]
"""the generator whose methods are the functions of the module"""
# What stands at the gates of the module while trainers share it may not see these.
_getstate, _setstate = random.getstate, random.setstate


class PythonState(NamedTuple):
    """Where a generator is; a value, which nothing changes."""

    memory: bytes
    """the place in its buffer, then the 624 words of the buffer, 32 bits each"""
    gauss: float | None
    """the other of a pair of normal numbers, which ``random.gauss`` keeps"""


def from_tuple(state: tuple[Any, ...]) -> PythonState:
    """Return what ``random.getstate`` returned as bytes.

    Raises:
        ValueError, TypeError, OverflowError: it is no such tuple.
    """
    random.Random().setstate(state)  # says what is wrong with it
    _version, words, gauss = state
    if not isinstance(gauss, float | None):
        raise TypeError(f"{gauss!r:.60} is no number that gauss keeps")
    return _packed(words, gauss)


def to_tuple(state: PythonState) -> tuple[Any, ...]:
    """Return a state in the form of ``random.getstate``."""
    place, *words = array("I", state.memory)
    return _VERSION, (*words, place), state.gauss


def _packed(words: tuple[int, ...], gauss: float | None) -> PythonState:
    return PythonState(array("I", (words[-1], *words[:-1])).tobytes(), gauss)


def _block_of(generator: random.Random) -> Any:
    return (ctypes.c_char * _BYTES).from_address(id(generator) + object.__basicsize__)


def _is_one_block() -> bool:
    """Return whether a generator's memory is as expected, for reading and for writing."""
    if sys.implementation.name != "cpython" or array("I").itemsize != 4:
        return False
    if random.Random.__base__.__basicsize__ < object.__basicsize__ + _BYTES:  # type: ignore[union-attr]
        return False
    probe, twin = random.Random(1), random.Random(2)
    for draws in (0, 1, 700):
        for _ in range(draws):
            probe.random()
        state = probe.getstate()
        if _block_of(probe).raw != _packed(state[1], None).memory:
            return False
        _block_of(twin).raw = _block_of(probe).raw
        if twin.getstate() != state:
            return False
    return True


def _read_slowly() -> PythonState:
    _version, words, gauss = _getstate()
    return _packed(words, gauss)


def _put_slowly(state: PythonState) -> None:
    _setstate(to_tuple(state))


def _seeded_slowly(seed: int) -> PythonState:
    _version, words, gauss = random.Random(seed).getstate()
    return _packed(words, gauss)


_BLOCK = _block_of(_RANDOM)


def _read_block() -> PythonState:
    return PythonState(_BLOCK.raw, _RANDOM.gauss_next)  # type: ignore[attr-defined]


def _put_block(state: PythonState) -> None:
    _BLOCK.raw, _RANDOM.gauss_next = state  # type: ignore[attr-defined]


def _seeded_block(seed: int) -> PythonState:
    generator = random.Random(seed)  # which its memory must not outlive
    return PythonState(_block_of(generator).raw, None)


if _is_one_block():
    read, put, seeded = _read_block, _put_block, _seeded_block
else:  # another interpreter, or another layout
    read, put, seeded = _read_slowly, _put_slowly, _seeded_slowly
