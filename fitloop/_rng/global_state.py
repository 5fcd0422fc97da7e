"""The state of the global generators: read, put back, and compared.

For code of any thread. The generators are locked meanwhile, unless the thread has a lease: then it
means the stream that is installed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from fitloop._rng.device_generators import default_generator
from fitloop._rng.lease import global_generators
from fitloop._rng.native_state import put_python
from fitloop._rng.states import RngState
from fitloop._rng.streams import Stream, get_bits


def global_state(devices: Iterable[str] = ()) -> RngState:
    """Return the state of the global generators, and of those of accelerators."""
    with global_generators():
        return Stream.of_process(devices).state()


def restore_global_state(state: RngState) -> None:
    """Put the global generators into a state; a device that is not there is left out."""
    with global_generators():
        torch.default_generator.set_state(state.torch)
        for name, value in state.devices.items():
            generator = default_generator(name)
            if generator is not None:
                generator.set_state(value)
        put_python(state.python)
        if state.gauss is not None:
            np.random.set_state(state.gauss)
            return
        bits = state.bits
        if isinstance(bits, bytes):
            key = np.frombuffer(bits[:-4], np.uint32)
            position = int(np.frombuffer(bits[-4:], np.int32)[0])
            bits = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
        np.random.set_state({**bits, "has_gauss": 0, "gauss": 0.0})


def save_global_state(devices: Iterable[str] = ()) -> Callable[[], None]:
    """Return a function that puts the global generators back to their state of now."""
    return partial(restore_global_state, global_state(devices))


def check_same_generator(state: RngState) -> None:
    """Check that a state is of the bit generator that numpy's functions have now.

    Raises:
        ValueError: numpy's functions have another kind.
    """
    saved = "MT19937" if isinstance(state.bits, bytes) else state.bits["bit_generator"]
    kind = type(get_bits()).__name__
    if saved != kind:
        raise ValueError(f"numpy's generator was {saved} and is {kind}")
