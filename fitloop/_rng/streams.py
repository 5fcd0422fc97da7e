"""Streams of random numbers, which a trainer installs in the global generators of the process.

torch's default generators, Python's ``random`` and numpy's legacy functions are one set for the
whole process: dropout, augmentation and shuffling of all threads use the same ones. A seeded
trainer therefore has streams of its own. A stream is installed in the generators while code of the
trainer runs, and the state from before is installed again afterwards. `fitloop._rng.lease` keeps
two threads from doing so at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Final

import numpy as np
import torch

from fitloop._rng.device_generators import default_generator
from fitloop._rng.native_state import (
    PythonState,
    mt19937_memory,
    put_python,
    read_python,
    seeded_python,
)
from fitloop._rng.states import RngState

# Public since numpy 1.24, but missing in its type stubs.
get_installed_bits: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]
install_bits: Callable[[Any], None] = np.random.set_bit_generator  # type: ignore[attr-defined]

_NUMPY_SEEDS = 2**32


class BitGeneratorWrapper:
    """Optional wrapper for the bit generators that streams install; it reports each use."""

    wrap: ClassVar[Callable[[Any], Any] | None] = None


def get_bits() -> Any:
    """Return numpy's installed bit generator, without its wrapper."""
    bits = get_installed_bits()
    return getattr(bits, "wrapped", bits)


class Stream:
    """One sequence of random numbers: a state for each of the global generators.

    A fresh stream of seed ``s`` is in the state that ``torch.manual_seed(s)``, ``random.seed(s)``
    and ``numpy.random.seed(s % 2**32)`` give, so that a hand-written loop has the same numbers.
    """

    def __init__(self, seed: int, devices: Iterable[str] = ()) -> None:
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._devices = {
            name: torch.Generator(name).manual_seed(seed).get_state() for name in devices
        }
        self.python = seeded_python(seed)
        """State of Python's generator; not current while the stream is installed."""
        bits = np.random.MT19937(0)
        np.random.RandomState(bits).seed(seed % _NUMPY_SEEDS)
        self._set_bits(bits)
        self._gauss: dict[str, Any] | None = None

    @classmethod
    def of_process(cls, devices: Iterable[str] = ()) -> Stream:
        """Return a stream that continues from the global generators, on copies of them."""
        stream = cls(0, devices)
        state = np.random.get_state(legacy=False)
        stream._set_bits(type(get_bits())(0))
        stream._bits.state = {k: state[k] for k in state if k not in ("has_gauss", "gauss")}
        stream._gauss = state if state["has_gauss"] else None
        stream._read()
        return stream

    def copy(self) -> Stream:
        """Return a stream with the same numbers; this one must not be installed now."""
        twin = Stream.__new__(Stream)
        twin._torch, twin._devices, twin.python = self._torch, dict(self._devices), self.python
        twin._set_bits(type(self._bits)(0))
        twin._bits.state = self._bits.state
        twin._gauss = self._gauss
        return twin

    def state(self) -> RngState:
        """Return the state of the stream; it must not be installed now."""
        bits = self._raw() or self._bits.state
        return RngState(self._torch, dict(self._devices), self.python, bits, self._gauss)

    def set_state(self, state: RngState) -> None:
        """Go to a state; the stream must not be installed now."""
        self._torch, self._devices, self.python = state.torch, dict(state.devices), state.python
        self._gauss = state.gauss
        if isinstance(state.bits, bytes):
            self._memory.raw = state.bits
        else:
            self._bits.state = state.bits

    def install(self) -> None:
        """Put the states of this stream into the global generators."""
        torch.default_generator.set_state(self._torch)
        for name, state in self._devices.items():
            default_generator(name).set_state(state)
        put_python(self.python)
        wrap = BitGeneratorWrapper.wrap
        install_bits(self._bits if wrap is None else self._wrapped(wrap))
        if self._gauss is not None:
            np.random.set_state(self._gauss)
        self._installed_memory = b"" if self._gauss is not None else self._raw()

    def capture(self) -> None:
        """Take the states of the global generators into this stream."""
        self._read()
        # numpy's functions keep a second normal number outside of the bit generator. To ask for it
        # takes as long as a small step. There is none if the bit generator has not moved.
        if not self._installed_memory or self._installed_memory != self._raw():
            state: dict[str, Any] = np.random.get_state(legacy=False)
            self._gauss = state if state["has_gauss"] else None

    def _set_bits(self, bits: Any) -> None:
        self._bits, self._memory = bits, mt19937_memory(bits)
        self._wrapped_bits: Any = None
        self._installed_memory = b""

    def _raw(self) -> bytes:
        """Return the memory of the bit generator; empty for a kind without known memory."""
        raw: bytes = b"" if self._memory is None else self._memory.raw
        return raw

    def _wrapped(self, wrap: Callable[[Any], Any]) -> Any:
        if self._wrapped_bits is None:
            self._wrapped_bits = wrap(self._bits)
        return self._wrapped_bits

    def _read(self) -> None:
        self._torch = torch.default_generator.get_state()
        for name in self._devices:
            self._devices[name] = default_generator(name).get_state()
        self.python = read_python()


class SavedGlobalState(Stream):
    """State of the global generators before a stream was installed; install it to put it back.

    numpy's bit generator is kept by reference, so that it stays the same object.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._devices = dict.fromkeys(devices, torch.empty(0))
        self._set_bits(get_installed_bits())
        self._wrapped_bits = self._bits
        self._gauss = None
        self.capture()


class _GlobalStream(Stream):
    """The generators' own state, for a trainer without a seed: its methods do nothing."""

    def __init__(self) -> None:
        pass

    python = PythonState(b"", None)

    def install(self) -> None: ...

    def capture(self) -> None: ...


GLOBAL_STREAM: Final[Stream] = _GlobalStream()
