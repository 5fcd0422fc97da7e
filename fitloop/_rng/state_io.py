"""States of random generators that come from a file: checked, and put into the process's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._rng import python_state
from fitloop._rng.lease import global_numbers
from fitloop._rng.streams import MT19937_BYTES, RngState, Stream, fingerprint, get_bits

_MT19937_WORDS = 624
_PHILOX_WORDS = 4
_LARGEST_CUDA_STATE = 64
"""bytes; a seed and an offset. The state of one on the CPU has thousands"""


def to_tree(state: RngState) -> dict[str, Any]:
    """Return a state as a tree; Python's 625 words in one array."""
    version, words, gauss = python_state.to_tuple(state.python)
    return {**state._asdict(), "python": [version, np.array(words, np.uint32), gauss]}


def from_tree(tree: Any) -> RngState:
    """Return the state of a tree; raises ValueError and the like for a forged one."""
    version, words, gauss = tree["python"]
    python = python_state.from_tuple((version, tuple(map(int, words)), gauss))
    return check_state(RngState(**{**tree, "python": python}))


def check_state(state: RngState) -> RngState:
    """Return ``state`` if generators take it; raises ValueError and the like for a forged one."""
    torch.Generator().set_state(state.torch)
    for index, value in state.cuda.items():
        if type(index) is not int or not isinstance(value, Tensor):
            raise ValueError(f"{index!r} is no state of a CUDA device")
    if isinstance(state.bits, bytes):
        if len(state.bits) != MT19937_BYTES:
            raise ValueError(f"{len(state.bits)} bytes are no state of MT19937")
        _check_place(int(np.frombuffer(state.bits[-4:], np.int32)[0]), _MT19937_WORDS)
    else:
        _check_bits(state.bits)
    if state.gauss is not None:
        _check_bits(state.gauss)
        np.random.RandomState().set_state(state.gauss)
    return state


def check_generator_state(state: object) -> Tensor:
    """Return the state of a generator of torch's; raises TypeError for what is none."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise TypeError(f"{state!r:.60} is no state of a generator")
    if len(state) > _LARGEST_CUDA_STATE:
        torch.Generator().set_state(state)
    return state


def check_same_generator(state: RngState) -> None:
    """Raise ValueError for the state of another generator than numpy's functions have now."""
    saved = "MT19937" if isinstance(state.bits, bytes) else state.bits["bit_generator"]
    own = type(get_bits()).__name__
    if saved != own:
        raise ValueError(f"numpy's generator was {saved} and is {own}")


def _check_bits(bits: dict[str, Any]) -> None:
    kind = getattr(np.random, bits["bit_generator"])
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise ValueError(f"{kind!r} is no bit generator of numpy")
    # numpy itself takes any place in its buffers, and reads what is there.
    _check_place(bits["state"].get("pos", 0), _MT19937_WORDS)
    _check_place(bits.get("buffer_pos", 0), _PHILOX_WORDS)
    kind().state = bits


def _check_place(place: int, words: int) -> None:
    if not 0 <= place <= words:
        raise ValueError(f"{place} is no place in a buffer of {words}")


def global_state(cuda: Iterable[int] = ()) -> RngState:
    """Return where the process's generators are."""
    with global_numbers():
        return Stream.of_process(cuda).state()


def restore_global_state(state: RngState) -> None:
    """Put the process's generators where they were; a device that is not there is left out."""
    with global_numbers():
        _restore_process(state)


def _restore_process(state: RngState) -> None:
    torch.default_generator.set_state(state.torch)
    for index, value in state.cuda.items():
        if index < torch.cuda.device_count():
            torch.cuda.default_generators[index].set_state(value)
    python_state.put(state.python)
    if state.gauss is not None:
        np.random.set_state(state.gauss)
        return
    bits = state.bits
    if isinstance(bits, bytes):
        key = np.frombuffer(bits[:-4], np.uint32)
        position = int(np.frombuffer(bits[-4:], np.int32)[0])
        bits = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
    np.random.set_state({**bits, "has_gauss": 0, "gauss": 0.0})


def global_fingerprint() -> tuple[object, ...]:
    """Return what changes when the trainer of this thread draws from its CPU generators."""
    with global_numbers():
        return fingerprint()
