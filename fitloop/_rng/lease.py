"""Turns at the process's random generators, for trainers that run at the same time.

A trainer's code draws from its *stream* (`fitloop._rng.streams`), which is in the process's
generators while it does. Three ways, from the cheapest for itself to the cheapest for the others:

- *whole*: the trainer has its turn for batch after batch, while nobody waits for it.
- *watched*: others run as well. A step begins without a turn; each of torch's ops that draws gets
  one for itself, told by a mode of torch's before it is called (`fitloop._rng.torch_ops`).
- *held*: code of a watched step came to Python's or numpy's generator, or to torch's states
  (`fitloop._rng.interception`). The turn is taken then, and kept until the end of the step.

A trainer without a seed draws from the process's own numbers; these share their turns.

What this cannot do: tell a trainer's draws from those of other code that draws from the
process's generators in another thread during a turn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fitloop._concurrency.time_slices import TIME_SLICES
from fitloop._rng.callbacks_in_flight import CALLBACKS_IN_FLIGHT
from fitloop._rng.fair_lock import GLOBAL_RNG_LOCK, FairSharedLock
from fitloop._rng.interception import RNG_PATCHES, forget_visitor, set_visitor, visitor
from fitloop._rng.streams import GLOBAL_STREAM, Outside, Stream, TorchStates
from fitloop._rng.torch_calls import Watch, forget_watches

_OBSERVED = 2
"""steps of a pass, at least, that are looked at whole before they are watched"""


class LeaseState(NamedTuple):
    """What a turn was at when it was given, to go on with."""

    stream: Stream | None
    watched: bool


class GeneratorLease:
    """The right of one thread to the process's generators, and which stream is in them.

    Not shared between threads, but for `revoke`, and `pause` and `resume` while its thread waits.
    """

    def __init__(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        cuda: Iterable[int] = (),
        turnstile: FairSharedLock = GLOBAL_RNG_LOCK,
        *,
        hides_draws: bool = False,
        reads: bool = False,
    ) -> None:
        self._cancelled = cancelled
        self._cuda = tuple(cuda)
        self._turnstile = turnstile
        self._hides_draws = hides_draws
        """steps cannot be watched"""
        if reads:  # a loader, beside the steps of its trainer
            _READERS.add(id(self))
        self._rests = False
        """the thread is in a callback or the like"""
        self._outside: Stream | None = None
        self._stream: Stream | None = None
        self._entered = self._moving = False
        self._swapped: TorchStates | None = None
        self._watch: Watch | None = None
        self._watched = False
        """the steps of this pass are"""
        self._looks = 0
        """how often in this pass somebody waited at the end of a step"""
        self._told = self._looking = False
        self._unseen: set[int] = set()
        """streams that Python's generator was drawn from without its gate seeing it"""

    @property
    def stream(self) -> Stream | None:
        """The stream that the thread draws from, or None without a turn."""
        return self._stream

    # -- whole ---------------------------------------------------------------------------------

    def begin_pass(self, stream: Stream) -> None:
        """Take the turn for a pass, of which nothing is known yet."""
        self._watched, self._looks = False, 0
        if stream is not GLOBAL_STREAM and id(self) not in _SEEDED:
            _SEEDED.add(id(self))
            CALLBACKS_IN_FLIGHT.wait(self._cancelled)
        self.acquire(stream)

    def acquire(self, stream: Stream | None) -> None:
        """Wait for the turn and enter ``stream``; a turn already held changes to it.

        None asks for nothing.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        if stream is None:
            return
        if self._watch is not None:
            self.release()
        if self._stream is stream and self._entered:
            return
        if self._stream is None:
            self._acquire_lock(stream, self._cancelled)
            self._enter_again(stream)
            return
        if self._entered:
            self._leave()
        self._enter(stream)

    def switch_stream(self, stream: Stream) -> LeaseState:
        """Change to another stream, in the way that the turn is had; `restore` changes back."""
        held = LeaseState(self._stream, self._watched)
        if self._entered and self._watch is None:
            self._leave()
            self._enter(stream)
        else:
            self.restore(LeaseState(stream, self._watched))
        return held

    def suspend(self) -> LeaseState:
        """End the turn while the thread runs what is not the trainer's own.

        It may draw from the process's numbers, which must not be another trainer's then.
        `resume_from` ends it.
        """
        held = LeaseState(self._stream, self._watched)
        self._rests = True
        CALLBACKS_IN_FLIGHT.begin(self)  # before it looks who there is
        others = _SEEDED and (TIME_SLICES.runs > 1 or _READERS)
        if others and self._watch is None:  # else it has joined them already
            CALLBACKS_IN_FLIGHT.end(self)
            if held.stream is None:
                self.acquire(GLOBAL_STREAM)
            self.pause()
            RNG_PATCHES.join(self)
        self.release()
        if RNG_PATCHES.stand:
            CALLBACKS_IN_FLIGHT.end(self)
            self.watch(GLOBAL_STREAM)
        return held

    def resume_from(self, held: LeaseState) -> None:
        """Go on after `suspend`."""
        CALLBACKS_IN_FLIGHT.end(self)
        self._rests = False
        self.restore(held)

    def release_fully(self) -> LeaseState:
        """End the turn for longer, so that the others need not look out for this one meanwhile.

        `restore` then takes a whole turn.
        """
        held = self.release()
        self._watched = False
        if RNG_PATCHES.leave(self):
            self._turnstile.when_free(RNG_PATCHES.remove)
        return LeaseState(held.stream, False)

    def release(self) -> LeaseState:
        """End the turn and put the process's own states back; does nothing without a turn.

        Returns what `restore` goes on with.
        """
        held = LeaseState(self._stream, self._watched)
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()
        self._put_back()
        self._stream = None
        forget_visitor(self)
        self._turnstile.release(self)
        return held

    @contextmanager
    def used_by_event_loop(self) -> Iterator[None]:
        """Hold the lock in this thread while the event loop's thread installs the stream."""
        self.pin_until_step_end()
        self.pause()
        yield
        self.resume()

    @contextmanager
    def released(self, *, fully: bool = False) -> Iterator[None]:
        """Release the lease for a block, and take it again unless the block or the run failed."""
        held = self.release_fully() if fully else self.release()
        yield
        if not self._cancelled():
            self.restore(held)

    def restore(self, held: LeaseState) -> None:
        """Take the turn again that was given, in the way it was."""
        if held.stream is None:
            self.release()
        elif held.watched and id(held.stream) not in self._unseen:
            self.watch(held.stream)
        else:
            self.acquire(held.stream)

    def yield_to_waiters(self) -> None:
        """Let those in line go first, if there are any; at the end of every step."""
        if self._watched or self._turnstile.contended:
            self._yield_to_waiters()

    def _yield_to_waiters(self) -> None:
        stream = self._stream
        if stream is None:
            return
        if self._watch is not None:
            if self._entered:
                self._release()
            if RNG_PATCHES.is_alone(self):
                self.begin_pass(stream)
            return
        self._looks += 1
        self.pause()
        RNG_PATCHES.join(self)
        self.release()
        seen = self._looks >= _OBSERVED and not self._hides_draws
        self._watched = seen and id(stream) not in self._unseen
        self.restore(LeaseState(stream, self._watched))

    def pause(self) -> None:
        """Put the process's own states back but keep the turn."""
        self._put_back()
        forget_visitor(self)

    def _put_back(self) -> None:
        if self._entered and self._outside is not None:
            self._leave()
            self._outside.enter()
            self._entered = False

    def resume(self) -> None:
        """Enter the stream of the turn again after `pause`."""
        if self._stream is not None and not self._entered:
            self._enter_again(self._stream)

    def _acquire_lock(self, stream: Stream, cancelled: Callable[[], bool]) -> None:
        # Callbacks wait for each other at locks of theirs: each must get to the numbers that
        # another has already, whoever stands in line for its own.
        self._turnstile.acquire(self, cancelled, shared=stream is GLOBAL_STREAM, joins=self._rests)

    def _enter_again(self, stream: Stream) -> None:
        self._moving = True  # what is read and put passes the gates
        self._stream = stream
        self._outside = GLOBAL_STREAM if stream is GLOBAL_STREAM else Outside(self._cuda)
        self._enter(stream)

    def _enter(self, stream: Stream) -> None:
        self._stream = stream
        self._told, self._looking = False, RNG_PATCHES.stand
        self._moving = True
        stream.enter()
        self._moving, self._entered = False, True
        set_visitor(self)

    def _leave(self) -> None:
        stream = self._stream
        assert stream is not None
        before, told = stream.python, self._told
        stream.leave()
        if self._looking and not told and stream.python != before:
            self._unseen.add(id(stream))  # by functions that the trainer's code had from before

    # -- watched -------------------------------------------------------------------------------

    def watch(self, stream: Stream) -> None:
        """Have the thread's draws come from ``stream``, each with a turn for itself."""
        if self._watch is not None:
            if self._entered:
                self._release()
            self._stream = stream
            return
        self.release()
        self._stream = stream
        self._watch = Watch(self)
        self._watch.begin()
        set_visitor(self)

    def draw(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that may draw from torch's generators."""
        stream = self._stream
        if self._entered or self._swapped is not None or stream is None:
            return function(*args, **kwargs)
        self._acquire_lock(stream, _never)  # in the middle of a step, which is always ended
        self._swapped = stream.swap_in()
        try:
            return function(*args, **kwargs)
        finally:
            swapped, self._swapped = self._swapped, None
            if not self._entered:
                stream.swap_out(swapped)
                self._turnstile.release(self)

    def pin_until_step_end(self) -> None:
        """Have the generators to itself until the end of the step."""
        self._told = True
        stream = self._stream
        if self._entered or self._moving or stream is None:
            return
        if self._swapped is not None:
            stream.swap_out(self._swapped)
        else:
            self._acquire_lock(stream, _never)
        self._enter_again(stream)

    def _release(self) -> None:
        self._put_back()
        self._turnstile.release(self)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the turn of a thread that does not come back; any thread."""
        CALLBACKS_IN_FLIGHT.end(self)
        self.release_fully()
        _SEEDED.discard(id(self))
        _READERS.discard(id(self))

    def end_in_child(self) -> None:
        """Be no turn in a process that was forked from its own."""
        forget_visitor(self)
        self._stream = self._swapped = None
        self._entered = False

    def notify_cancelled(self) -> None:
        """Have a waiting `acquire` look whether it was cancelled; any thread."""
        CALLBACKS_IN_FLIGHT.notify_all()
        self._turnstile.notify_all()


def _never() -> bool:
    return False


_SEEDED: set[int] = set()
"""turns of runs that have randomness of their own"""
_READERS: set[int] = set()
"""turns of threads that read ahead"""


def _forget_parent() -> None:
    """Begin anew in a process that was forked, where the other threads are gone."""
    forget_watches()
    _SEEDED.clear()
    _READERS.clear()
    CALLBACKS_IN_FLIGHT.__init__()  # type: ignore[misc]
    GLOBAL_RNG_LOCK.__init__()  # type: ignore[misc]
    TIME_SLICES.__init__()  # type: ignore[misc]
    RNG_PATCHES.forget_users()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def global_numbers() -> Iterator[None]:
    """Have the process's own states in the generators: for reading or changing them as such.

    A thread that has a turn is not to wait for another: what it has in them is what it means.
    """
    if visitor() is not None:
        visitor().pin_until_step_end()  # type: ignore[union-attr]
        yield
        return
    turn = GeneratorLease()
    turn.acquire(GLOBAL_STREAM)
    try:
        yield
    finally:
        turn.release()


@contextmanager
def outside_runs() -> Iterator[None]:
    """Run code without a lease, such as a last callback, on the global generators."""
    turn = GeneratorLease()
    held = turn.suspend()
    try:
        yield
    finally:
        turn.resume_from(held)
        turn.close()
