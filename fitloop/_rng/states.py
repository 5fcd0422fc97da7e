"""States of the random generators as values and as trees for a snapshot.

A tree from a file is checked, since a file from a stranger may say anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fitloop._rng.device_generators import generator_names
from fitloop._rng.native_state import MT19937_BYTES, PythonState, from_tuple, to_tuple

_MT19937_WORDS = 624
_PHILOX_WORDS = 4
_MAX_DEVICE_STATE = 64
"""Bytes. The state of an accelerator's generator is a seed and an offset; the CPU's is longer."""


class RngState(NamedTuple):
    """States of all generators that a trainer uses, at one moment; immutable."""

    torch: Tensor
    devices: dict[str, Tensor]
    """states of accelerators, by the names of `device_generators`"""
    python: PythonState
    bits: bytes | dict[str, Any]
    """numpy's bit generator: the memory of an MT19937, or the state of another kind."""
    gauss: dict[str, Any] | None
    """State of numpy's functions if they keep the second of a pair of normal numbers."""

    def to_tree(self) -> dict[str, Any]:
        """Return the state as a tree for a snapshot."""
        version, words, gauss = to_tuple(self.python)
        cuda, other_devices = {}, {}
        for name, state in self.devices.items():
            kind, _, index = name.partition(":")
            if kind == "cuda":
                cuda[int(index)] = state
            else:
                other_devices[name] = state
        return {
            "torch": self.torch,
            "cuda": cuda,
            **({"accelerators": other_devices} if other_devices else {}),
            "python": [version, np.array(words, np.uint32), gauss],
            "bits": self.bits,
            "gauss": self.gauss,
        }

    @classmethod
    def from_tree(cls, tree: Any) -> RngState:
        """Return the state of a tree.

        Raises:
            ValueError, TypeError, KeyError and others: the tree is not one of `to_tree`.
        """
        version, words, gauss = tree["python"]
        devices = {f"cuda:{_index(key)}": value for key, value in tree["cuda"].items()}
        state = cls(
            torch=tree["torch"],
            devices={**devices, **tree.get("accelerators", {})},
            python=from_tuple((version, tuple(map(int, words)), gauss)),
            bits=tree["bits"],
            gauss=tree["gauss"],
        )
        _check(state)
        return state


def _index(key: object) -> int:
    if type(key) is not int or key < 0:
        raise ValueError(f"{key!r} is no index of a CUDA device")
    return key


def _check(state: RngState) -> None:
    torch.Generator().set_state(state.torch)
    for name, value in state.devices.items():
        if not isinstance(value, Tensor) or not generator_names(torch.device(name)):
            raise ValueError(f"{name!r} is no state of a device")
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
    if len(state) > _MAX_DEVICE_STATE:
        torch.Generator().set_state(state)
    return state
