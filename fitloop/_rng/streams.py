"""Randomness of a trainer's own, in a process that has one set of random generators.

torch's default generators, Python's ``random`` and numpy's legacy functions are process-wide:
dropout, augmentation and shuffling of every thread draw from the same ones. A seeded trainer
therefore has *streams*, one for the steps and one for the loader of each phase. A stream's
states are put into the process's generators while its code runs, and what was there before is
put back afterwards. Code that runs in two threads takes turns at that, see `fitloop._rng.lease`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from fitloop._rng import python_state
from fitloop._rng.python_state import PythonState

# Public since numpy 1.24, but missing in its type stubs.
installed_bits: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]
install_bits: Callable[[Any], None] = np.random.set_bit_generator  # type: ignore[attr-defined]

_NUMPY_LIMIT = 2**32
MT19937_BYTES = 624 * 4 + 4


class Doors:
    """Whether what streams put into numpy's functions is to tell who comes to draw from it."""

    before: Callable[[Any], Any] | None = None
    """makes a bit generator that is the given one, and tells"""


def get_bits() -> Any:
    """Return numpy's generator, the real one while a watched one stands before it."""
    bits = installed_bits()
    return getattr(bits, "watched", bits)


class _Zeros(ISeedSequence):
    """Seeds a generator that is to be put elsewhere at once; entropy would take longer."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        """Return so many words."""
        return np.zeros(n_words, dtype)


_ZEROS: Any = _Zeros()  # which the stubs of numpy do not take


class RngState(NamedTuple):
    """Where a stream is; a value, which nothing changes."""

    torch: Tensor
    cuda: dict[int, Tensor]
    python: PythonState
    bits: bytes | dict[str, Any]
    gauss: dict[str, Any] | None


class TorchStates(NamedTuple):
    """States of torch's generators: the CPU's, and those of CUDA devices."""

    torch: Tensor
    cuda: dict[int, Tensor]


class Stream:
    """One sequence of random numbers: a state for each of the process's generators.

    `enter` puts the states into the generators, `leave` takes them out again. A fresh stream of
    seed ``s`` is in the state that ``torch.manual_seed(s)``, ``random.seed(s)`` and
    ``numpy.random.seed(s % 2**32)`` give, so that a hand-written loop can be compared with it.
    """

    __slots__ = (
        "_bits",
        "_block",
        "_cuda",
        "_door",
        "_gauss",
        "_python",
        "_raw_at_entry",
        "_torch",
    )

    def __init__(self, seed: int, cuda: Iterable[int] = ()) -> None:
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._cuda = {
            index: torch.Generator(f"cuda:{index}").manual_seed(seed).get_state() for index in cuda
        }
        self._python = python_state.seeded(seed)
        bits = np.random.MT19937(_ZEROS)
        np.random.RandomState(bits).seed(seed % _NUMPY_LIMIT)
        self._use(bits)
        self._door: Any = None
        self._gauss: dict[str, Any] | None = None

    @classmethod
    def of_process(cls, cuda: Iterable[int] = ()) -> Stream:
        """Return a stream that goes on where the process's generators are, on copies of them."""
        stream = cls(0, cuda)
        state = np.random.get_state(legacy=False)
        stream._use(type(get_bits())(_ZEROS))
        stream._bits.state = {k: state[k] for k in state if k not in ("has_gauss", "gauss")}
        stream._gauss = state if state["has_gauss"] else None
        stream._read()
        return stream

    def copy(self) -> Stream:
        """Return a stream that will give the same numbers; it must not be entered now."""
        twin = Stream.__new__(Stream)
        twin._torch, twin._cuda, twin._python = self._torch, dict(self._cuda), self._python
        twin._use(type(self._bits)(_ZEROS))
        twin._bits.state = self._bits.state
        twin._door = None
        twin._gauss = self._gauss
        return twin

    def state(self) -> RngState:
        """Return where the stream is, for `set_state`; not while it is entered."""
        bits = self._raw() or self._bits.state
        return RngState(self._torch, dict(self._cuda), self._python, bits, self._gauss)

    def set_state(self, state: RngState) -> None:
        """Go back to where the stream was; not while it is entered."""
        self._torch, self._cuda, self._python = state.torch, dict(state.cuda), state.python
        self._gauss = state.gauss
        if isinstance(state.bits, bytes):
            self._block.raw = state.bits
        else:
            self._bits.state = state.bits

    def enter(self) -> None:
        """Put the states of this stream into the process's generators."""
        torch.default_generator.set_state(self._torch)
        for index, state in self._cuda.items():
            torch.cuda.default_generators[index].set_state(state)
        python_state.put(self._python)
        install_bits(self._bits if Doors.before is None else self._told(Doors.before))
        if self._gauss is not None:
            np.random.set_state(self._gauss)
        self._raw_at_entry = b"" if self._gauss is not None else self._raw()

    def leave(self) -> None:
        """Take the states of the process's generators into this stream."""
        self._read()
        # A cached normal is outside of the bit generator, and reading it takes as long as a small
        # step. None was made if none was there and the bit generator has not moved.
        if not self._raw_at_entry or self._raw_at_entry != self._raw():
            self._gauss = _cached_normal()

    def _use(self, bits: Any) -> None:
        """Have this bit generator, whose memory is read in place where it is known."""
        self._bits, self._block = bits, _block_of(bits)

    def _raw(self) -> bytes:
        """Return the memory of the bit generator, or nothing for a kind that is not known."""
        raw: bytes = b"" if self._block is None else self._block.raw
        return raw

    def _told(self, before: Callable[[Any], Any]) -> Any:
        if self._door is None:
            self._door = before(self._bits)
        return self._door

    def swap_in(self) -> TorchStates:
        """Put the states of torch's generators in, and return what was there; for one draw."""
        outside = TorchStates(torch.default_generator.get_state(), {})
        torch.default_generator.set_state(self._torch)
        for index, state in self._cuda.items():
            outside.cuda[index] = torch.cuda.default_generators[index].get_state()
            torch.cuda.default_generators[index].set_state(state)
        return outside

    def swap_out(self, outside: TorchStates) -> None:
        """Take the states of torch's generators into this stream, and put ``outside`` back."""
        self._torch = torch.default_generator.get_state()
        torch.default_generator.set_state(outside.torch)
        for index, state in outside.cuda.items():
            self._cuda[index] = torch.cuda.default_generators[index].get_state()
            torch.cuda.default_generators[index].set_state(state)

    @property
    def python(self) -> PythonState:
        """Where Python's generator is in this stream; not while it is entered."""
        return self._python

    def _read(self) -> None:
        self._torch = torch.default_generator.get_state()
        for index in self._cuda:
            self._cuda[index] = torch.cuda.default_generators[index].get_state()
        self._python = python_state.read()


def _cached_normal() -> dict[str, Any] | None:
    """Return numpy's state if its functions hold the second of a pair of normal numbers."""
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return state if state["has_gauss"] else None


def _block_of(bits: Any) -> Any:
    """Return an MT19937 generator's memory, which must not outlive it; None for another kind."""
    if not isinstance(bits, np.random.MT19937):
        return None
    return (ctypes.c_char * MT19937_BYTES).from_address(bits.ctypes.state_address)


class Outside(Stream):
    """What the process's generators held before the first turn; kept by reference for numpy."""

    __slots__ = ()

    def __init__(self, cuda: Iterable[int]) -> None:
        self._cuda = dict.fromkeys(cuda, torch.empty(0))
        self._use(installed_bits())
        self._door = self._bits
        self._gauss, self._raw_at_entry = None, b""
        self.leave()


class _Process(Stream):
    """The process's own numbers, for a trainer without a seed: nothing is to be changed."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def enter(self) -> None:
        """See `Stream`."""

    def leave(self) -> None:
        """See `Stream`."""

    def swap_in(self) -> TorchStates:
        """See `Stream`."""
        return TorchStates(_NOTHING, {})

    def swap_out(self, outside: TorchStates) -> None:
        """See `Stream`."""

    @property
    def python(self) -> PythonState:
        """See `Stream`."""
        return _UNMOVED


_NOTHING = torch.empty(0)
_UNMOVED = PythonState(b"", None)
GLOBAL_STREAM: Final[Stream] = _Process()


def fingerprint() -> tuple[object, ...]:
    """Return what changes whenever somebody draws from the process's CPU generators."""
    numpy, block = np.random.get_state(legacy=False), _block_of(get_bits())
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        python_state.read(),
        repr(numpy["state"]) if block is None else block.raw,
        numpy["has_gauss"],
    )
