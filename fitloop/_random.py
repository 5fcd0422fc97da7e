"""Randomness of a trainer's own, in a process that has one set of random generators.

torch's default generators, Python's ``random`` and numpy's legacy functions are process-wide:
dropout, augmentation and shuffling of every thread draw from the same ones. A seeded trainer
therefore has *streams*, one for the steps and one for the loader of each phase. A stream's
states are put into the process's generators while its code runs, and what was there before is
put back afterwards. Code that runs in two threads takes *turns*, one stream at a time.

A turn may last for many batches: it is handed on between batches, and only when somebody waits.
A trainer without a seed takes no turns and draws where a hand-written loop would.

What this cannot do: tell a trainer's draws from those of other code that draws from the
process's generators in another thread during a turn.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fitloop._control import Cancelled
from fitloop._types import Phase

# Public since numpy 1.24, but missing in its type stubs.
get_bits: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]
_set_bits: Callable[[Any], None] = np.random.set_bit_generator  # type: ignore[attr-defined]

_NUMPY_LIMIT = 2**32
MT19937_BYTES = 624 * 4 + 4


class StreamState(NamedTuple):
    """Where a stream is; a value, which nothing changes."""

    torch: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]
    bits: bytes | dict[str, Any]
    gauss: dict[str, Any] | None


class Stream:
    """One sequence of random numbers: a state for each of the process's generators.

    `enter` puts the states into the generators, `leave` takes them out again. A fresh stream of
    seed ``s`` is in the state that ``torch.manual_seed(s)``, ``random.seed(s)`` and
    ``numpy.random.seed(s % 2**32)`` give, so that a hand-written loop can be compared with it.
    """

    __slots__ = ("_bits", "_cuda", "_gauss", "_python", "_torch", "_unmoved")

    def __init__(self, seed: int, cuda: Iterable[int] = ()) -> None:
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._cuda = {
            index: torch.Generator(f"cuda:{index}").manual_seed(seed).get_state() for index in cuda
        }
        self._python = random.Random(seed).getstate()
        legacy = np.random.RandomState(seed % _NUMPY_LIMIT)
        self._bits: Any = legacy._bit_generator
        self._gauss: dict[str, Any] | None = None
        self._unmoved = b""

    @classmethod
    def of_process(cls, cuda: Iterable[int] = ()) -> Stream:
        """Return a stream that goes on where the process's generators are, on copies of them."""
        stream = cls(0, cuda)
        state = np.random.get_state(legacy=False)
        stream._bits = type(get_bits())()
        stream._bits.state = {k: state[k] for k in state if k not in ("has_gauss", "gauss")}
        stream._gauss = state if state["has_gauss"] else None
        stream._read()
        return stream

    def copy(self) -> Stream:
        """Return a stream that will give the same numbers; it must not be entered now."""
        twin = Stream.__new__(Stream)
        twin._torch, twin._cuda, twin._python = self._torch, dict(self._cuda), self._python
        twin._bits = type(self._bits)()
        twin._bits.state = self._bits.state
        twin._gauss = self._gauss
        return twin

    def state(self) -> StreamState:
        """Return where the stream is, for `set_state`; not while it is entered."""
        bits = _raw(self._bits) or self._bits.state
        return StreamState(self._torch, dict(self._cuda), self._python, bits, self._gauss)

    def set_state(self, state: StreamState) -> None:
        """Go back to where the stream was; not while it is entered."""
        self._torch, self._cuda, self._python = state.torch, dict(state.cuda), state.python
        self._gauss = state.gauss
        if isinstance(state.bits, bytes):
            ctypes.memmove(self._bits.ctypes.state_address, state.bits, len(state.bits))
        else:
            self._bits.state = state.bits

    def enter(self) -> None:
        """Put the states of this stream into the process's generators."""
        torch.default_generator.set_state(self._torch)
        for index, state in self._cuda.items():
            torch.cuda.default_generators[index].set_state(state)
        random.setstate(self._python)
        _set_bits(self._bits)
        if self._gauss is not None:
            np.random.set_state(self._gauss)
        self._unmoved = _raw(self._bits)

    def leave(self) -> None:
        """Take the states of the process's generators into this stream."""
        self._read()
        # numpy's functions keep half of a pair of normal numbers outside the bit generator, and
        # asking for it takes 70 us. It can have changed only if it was there or the bits moved.
        if self._gauss is not None or not self._unmoved or self._unmoved != _raw(self._bits):
            state = np.random.get_state(legacy=False)
            self._gauss = state if state["has_gauss"] else None

    def _read(self) -> None:
        self._torch = torch.default_generator.get_state()
        for index in self._cuda:
            self._cuda[index] = torch.cuda.default_generators[index].get_state()
        self._python = random.getstate()


def _raw(bits: Any) -> bytes:
    """Return the memory of an MT19937 generator, or nothing for another kind."""
    if type(bits) is not np.random.MT19937:
        return b""
    return ctypes.string_at(bits.ctypes.state_address, MT19937_BYTES)


class _Outside(Stream):
    """What the process's generators held before the first turn; kept by reference for numpy."""

    __slots__ = ()

    def __init__(self, cuda: Iterable[int]) -> None:
        self._cuda = dict.fromkeys(cuda, torch.empty(0))
        self._bits = get_bits()
        self._gauss = None
        self._unmoved = b""
        self.leave()


def fingerprint() -> tuple[object, ...]:
    """Return what changes whenever somebody draws from the process's CPU generators."""
    numpy = np.random.get_state(legacy=False)
    return (
        torch.default_generator.get_state().numpy().tobytes(),
        random.getstate(),
        _raw(get_bits()) or repr(numpy["state"]),
        numpy["has_gauss"],
    )


class Streams:
    """The streams of one trainer: a stream for the steps and one for the loader of each phase.

    A stream for each means that validating, testing or loading ahead does not change what
    training draws.
    """

    def __init__(self, seed: int, cuda: Iterable[int] = ()) -> None:
        self.cuda = tuple(cuda)
        self._streams: dict[tuple[Phase, bool], Stream] = {}
        for position, phase in enumerate(Phase):
            for loader in (False, True):
                place = 2 * position + loader
                # The steps of training have the seed itself; see Stream on why.
                derived = seed if place == 0 else _derive(seed, place)
                self._streams[phase, loader] = Stream(derived, self.cuda)

    @classmethod
    def of_process(cls, cuda: Iterable[int] = ()) -> Streams:
        """Return streams that all go on from the process's generators, as one, on copies."""
        streams = cls.__new__(cls)
        streams.cuda = tuple(cuda)
        shared = Stream.of_process(streams.cuda)
        streams._streams = {(phase, loader): shared for phase in Phase for loader in (False, True)}
        return streams

    def copy(self) -> Streams:
        """Return streams that will give the same numbers."""
        twin = Streams.__new__(Streams)
        twin.cuda = self.cuda
        twin._streams = {key: stream.copy() for key, stream in self._streams.items()}
        return twin

    def states(self) -> dict[tuple[Phase, bool], StreamState]:
        """Return where each stream is, by phase and whether it is the loader's."""
        return {key: stream.state() for key, stream in self._streams.items()}

    def set_states(self, states: Mapping[tuple[Phase, bool], StreamState]) -> None:
        """Put each stream where it was; none of them may be entered."""
        for key, stream in self._streams.items():
            stream.set_state(states[key])

    def steps(self, phase: Phase) -> Stream:
        """Return the stream that stage functions of this phase draw from."""
        return self._streams[phase, False]

    def loader(self, phase: Phase) -> Stream:
        """Return the stream that the loader of this phase draws from."""
        return self._streams[phase, True]


def _derive(seed: int, place: int) -> int:
    return int(np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)[0])


class Turnstile:
    """Lets one turn at a time through, first come, first served. One for the whole process."""

    def __init__(self) -> None:
        self.contended = False
        """somebody waits; read without the lock, once a batch"""
        self._changed = threading.Condition()
        self._line: deque[Turn] = deque()
        self._holder: Turn | None = None

    def admit(self, turn: Turn, cancelled: Callable[[], bool]) -> None:
        """Block until it is ``turn``'s; raises `Cancelled` when that came first."""
        with self._changed:
            self._line.append(turn)
            while self._holder is not None or self._line[0] is not turn:
                self.contended = True
                if cancelled():
                    self._line.remove(turn)
                    self._changed.notify_all()
                    raise Cancelled
                self._changed.wait()
            self._line.popleft()
            self._holder = turn
            self.contended = bool(self._line)

    def dismiss(self, turn: Turn) -> bool:
        """End ``turn``; false when it was not its."""
        with self._changed:
            if self._holder is not turn:
                return False
            self._holder = None
            self._changed.notify_all()
            return True

    def look_again(self) -> None:
        """Wake everyone in line, so that a cancelled one leaves it."""
        with self._changed:
            self._changed.notify_all()


_TURNSTILE = Turnstile()


class Turn:
    """The right of one thread to the process's generators, and which stream is in them.

    Not shared between threads, but for `revoke`.
    """

    def __init__(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        cuda: Iterable[int] = (),
        turnstile: Turnstile = _TURNSTILE,
    ) -> None:
        self._cancelled = cancelled
        self._cuda = tuple(cuda)
        self._turnstile = turnstile
        self._outside: Stream | None = None
        self._stream: Stream | None = None
        self._entered = False

    @property
    def stream(self) -> Stream | None:
        """The stream that is in the generators, or None without a turn."""
        return self._stream

    def take(self, stream: Stream | None) -> None:
        """Wait for the turn and enter ``stream``; a turn already held changes to it.

        None asks for nothing.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        if stream is None or (self._stream is stream and self._entered):
            return
        if self._stream is None:
            self._turnstile.admit(self, self._cancelled)
            self._outside = _Outside(self._cuda)
        elif self._entered:
            self._stream.leave()
        self._stream = stream
        stream.enter()
        self._entered = True

    def give(self) -> None:
        """End the turn and put the process's own states back; does nothing without a turn."""
        self.pause()
        self._stream = None
        self._turnstile.dismiss(self)

    def breathe(self) -> None:
        """Let those in line go first, if there are any."""
        if self._turnstile.contended and self._stream is not None:
            stream = self._stream
            self.give()
            self.take(stream)

    def pause(self) -> None:
        """Put the process's own states back but keep the turn."""
        if self._entered and self._stream is not None and self._outside is not None:
            self._stream.leave()
            self._outside.enter()
            self._entered = False

    def resume(self) -> None:
        """Enter the stream of the turn again after `pause`."""
        if self._stream is not None and not self._entered:
            self._outside = _Outside(self._cuda)
            self._stream.enter()
            self._entered = True

    def revoke(self) -> None:
        """End the turn of a thread that does not come back; any thread."""
        self.give()

    def wake(self) -> None:
        """Have a waiting `take` look whether it was cancelled; any thread."""
        self._turnstile.look_again()
