"""States of the random generators as values and as trees for a snapshot.

A tree from a file is checked, since a file from a stranger may say anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fitloop._rng.native_state import MT19937_BYTES, PythonState, from_tuple, to_tuple

_MT19937_WORDS = 624
_PHILOX_WORDS = 4
_MAX_CUDA_STATE = 64
"""Bytes. The state of a CUDA generator is a seed and an offset; one on the CPU has thousands."""


class RngState(NamedTuple):
    """States of all generators that a trainer uses, at one moment; immutable."""

    torch: Tensor
    cuda: dict[int, Tensor]
    python: PythonState
    bits: bytes | dict[str, Any]
    """numpy's bit generator: the memory of an MT19937, or the state of another kind."""
    gauss: dict[str, Any] | None
    """State of numpy's functions if they keep the second of a pair of normal numbers."""

    def to_tree(self) -> dict[str, Any]:
        """Return the state as a tree for a snapshot."""
        version, words, gauss = to_tuple(self.python)
        return {**self._asdict(), "python": [version, np.array(words, np.uint32), gauss]}

    @classmethod
    def from_tree(cls, tree: Any) -> RngState:
        """Return the state of a tree.

        Raises:
            ValueError, TypeError, KeyError and others: the tree is not one of `to_tree`.
        """
        version, words, gauss = tree["python"]
        python = from_tuple((version, tuple(map(int, words)), gauss))
        state = cls(**{**tree, "python": python})
        _check(state)
        return state


def _check(state: RngState) -> None:
    torch.Generator().set_state(state.torch)
    for index, value in state.cuda.items():
        if type(index) is not int or not isinstance(value, Tensor):
            raise ValueError(f"{index!r} is no state of a CUDA device")
    if isinstance(state.bits, bytes):
        if len(state.bits) != MT19937_BYTES:
            raise ValueError(f"{len(state.bits)} bytes are no state of MT19937")
        _check_position(int(np.frombuffer(state.bits[-4:], np.int32)[0]), _MT19937_WORDS)
    else:
        _check_bits(state.bits)
    if state.gauss is not None:
        check_numpy_state(state.gauss)


def check_numpy_state(state: Any) -> None:
    """Raise an exception if a value is no state of a generator of numpy."""
    _check_bits(state)
    if "has_gauss" in state:
        np.random.RandomState().set_state(state)


def _check_bits(bits: dict[str, Any]) -> None:
    kind = getattr(np.random, bits["bit_generator"])
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise ValueError(f"{kind!r} is no bit generator of numpy")
    # numpy accepts any position in its buffers, and reads the memory there.
    _check_position(bits["state"].get("pos", 0), _MT19937_WORDS)
    _check_position(bits.get("buffer_pos", 0), _PHILOX_WORDS)
    kind().state = bits


def _check_position(position: int, words: int) -> None:
    if not 0 <= position <= words:
        raise ValueError(f"{position} is no place in a buffer of {words}")


def check_generator_state(state: object) -> Tensor:
    """Return the state of a ``torch.Generator``.

    Raises:
        TypeError, RuntimeError: the value is no such state.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise TypeError(f"{state!r:.60} is no state of a generator")
    if len(state) > _MAX_CUDA_STATE:
        torch.Generator().set_state(state)
    return state
