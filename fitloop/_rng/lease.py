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

from fitloop._concurrency.time_slices import SLICES
from fitloop._rng.callbacks_in_flight import RESTING
from fitloop._rng.fair_lock import TURNSTILE, Turnstile
from fitloop._rng.interception import GATES, forget_visitor, set_visitor, visitor
from fitloop._rng.streams import PROCESS, Outside, Stream, TorchStates
from fitloop._rng.torch_calls import Watch, forget_watches

_OBSERVED = 2
"""steps of a pass, at least, that are looked at whole before they are watched"""


class Held(NamedTuple):
    """What a turn was at when it was given, to go on with."""

    stream: Stream | None
    watched: bool


class Turn:
    """The right of one thread to the process's generators, and which stream is in them.

    Not shared between threads, but for `revoke`, and `pause` and `resume` while its thread waits.
    """

    def __init__(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        cuda: Iterable[int] = (),
        turnstile: Turnstile = TURNSTILE,
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

    def begin(self, stream: Stream) -> None:
        """Take the turn for a pass, of which nothing is known yet."""
        self._watched, self._looks = False, 0
        if stream is not PROCESS and id(self) not in _SEEDED:
            _SEEDED.add(id(self))
            RESTING.wait(self._cancelled)
        self.take(stream)

    def take(self, stream: Stream | None) -> None:
        """Wait for the turn and enter ``stream``; a turn already held changes to it.

        None asks for nothing.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        if stream is None:
            return
        if self._watch is not None:
            self.give()
        if self._stream is stream and self._entered:
            return
        if self._stream is None:
            self._admit(stream, self._cancelled)
            self._enter_again(stream)
            return
        if self._entered:
            self._leave()
        self._enter(stream)

    def lend(self, stream: Stream) -> Held:
        """Change to another stream, in the way that the turn is had; `go_on` changes back."""
        held = Held(self._stream, self._watched)
        self.go_on(Held(stream, self._watched))
        return held

    def rest(self) -> Held:
        """End the turn while the thread runs what is not the trainer's own.

        It may draw from the process's numbers, which must not be another trainer's then.
        `rise` ends it.
        """
        held = Held(self._stream, self._watched)
        self._rests = True
        RESTING.begin(self)  # before it looks who there is, as they look here after they have come
        others = _SEEDED and (SLICES.runs > 1 or _READERS)
        if others and self._watch is None:  # else it has joined them already
            RESTING.end(self)
            if held.stream is None:
                self.take(PROCESS)
            self.pause()
            GATES.join(self)
        self.give()
        if GATES.stand:
            RESTING.end(self)
            self.watch(PROCESS)
        return held

    def rise(self, held: Held) -> None:
        """Go on after `rest`."""
        RESTING.end(self)
        self._rests = False
        self.go_on(held)

    def step_aside(self) -> Held:
        """End the turn for longer, so that the others need not look out for this one meanwhile.

        `go_on` then takes a whole turn.
        """
        held = self.give()
        self._watched = False
        if GATES.leave(self):
            self._turnstile.when_free(GATES.remove)
        return Held(held.stream, False)

    def give(self) -> Held:
        """End the turn and put the process's own states back; does nothing without a turn.

        Returns what `go_on` goes on with.
        """
        held = Held(self._stream, self._watched)
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end()
        self._put_back()
        self._stream = None
        forget_visitor(self)
        self._turnstile.dismiss(self)
        return held

    def go_on(self, held: Held) -> None:
        """Take the turn again that was given, in the way it was."""
        if held.stream is None:
            self.give()
        elif held.watched and id(held.stream) not in self._unseen:
            self.watch(held.stream)
        else:
            self.take(held.stream)

    def breathe(self) -> None:
        """Let those in line go first, if there are any; at the end of every step."""
        if self._watched or self._turnstile.contended:
            self._breathe()

    def _breathe(self) -> None:
        stream = self._stream
        if stream is None:
            return
        if self._watch is not None:
            if self._entered:
                self._release()
            if GATES.is_alone(self):
                self.begin(stream)
            return
        self._looks += 1
        self.pause()
        GATES.join(self)
        self.give()
        seen = self._looks >= _OBSERVED and not self._hides_draws
        self._watched = seen and id(stream) not in self._unseen
        self.go_on(Held(stream, self._watched))

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

    def _admit(self, stream: Stream, cancelled: Callable[[], bool]) -> None:
        # Callbacks wait for each other at locks of theirs: each must get to the numbers that
        # another has already, whoever stands in line for its own.
        self._turnstile.admit(self, cancelled, shared=stream is PROCESS, joins=self._rests)

    def _enter_again(self, stream: Stream) -> None:
        self._moving = True  # what is read and put passes the gates
        self._stream = stream
        self._outside = PROCESS if stream is PROCESS else Outside(self._cuda)
        self._enter(stream)

    def _enter(self, stream: Stream) -> None:
        self._stream = stream
        self._told, self._looking = False, GATES.stand
        self._moving = True
        stream.enter()
        self._moving, self._entered = False, True
        set_visitor(self)

    def _leave(self) -> None:
        stream = self._stream
        assert stream is not None
        before = stream.python
        stream.leave()
        if self._looking and not self._told and stream.python != before:
            self._unseen.add(id(stream))  # by functions that the trainer's code had from before

    # -- watched -------------------------------------------------------------------------------

    def watch(self, stream: Stream) -> None:
        """Have the thread's draws come from ``stream``, each with a turn for itself."""
        if self._watch is not None:
            if self._entered:
                self._release()
            self._stream = stream
            return
        self.give()
        self._stream = stream
        self._watch = Watch(self)
        self._watch.begin()
        set_visitor(self)

    def draw(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that may draw from torch's generators."""
        stream = self._stream
        if self._entered or self._swapped is not None or stream is None:
            return function(*args, **kwargs)
        self._admit(stream, _never)  # in the middle of a step, which is always ended
        self._swapped = stream.swap_in()
        try:
            return function(*args, **kwargs)
        finally:
            swapped, self._swapped = self._swapped, None
            if not self._entered:
                stream.swap_out(swapped)
                self._turnstile.dismiss(self)

    def hold(self) -> None:
        """Have the generators to itself until the end of the step."""
        self._told = True
        stream = self._stream
        if self._entered or self._moving or stream is None:
            return
        if self._swapped is not None:
            stream.swap_out(self._swapped)
        else:
            self._admit(stream, _never)
        self._enter_again(stream)

    def _release(self) -> None:
        self._put_back()
        self._turnstile.dismiss(self)

    # -- the end -------------------------------------------------------------------------------

    def revoke(self) -> None:
        """End the turn of a thread that does not come back; any thread."""
        RESTING.end(self)
        self.step_aside()
        _SEEDED.discard(id(self))
        _READERS.discard(id(self))

    def end_in_child(self) -> None:
        """Be no turn in a process that was forked from its own."""
        forget_visitor(self)
        self._stream = self._swapped = None
        self._entered = False

    def wake(self) -> None:
        """Have a waiting `take` look whether it was cancelled; any thread."""
        RESTING.look_again()
        self._turnstile.look_again()


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
    RESTING.__init__()  # type: ignore[misc]
    TURNSTILE.__init__()  # type: ignore[misc]
    SLICES.__init__()  # type: ignore[misc]
    GATES.forget_users()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def process_numbers() -> Iterator[None]:
    """Have the process's own states in the generators: for reading or changing them as such.

    A thread that has a turn is not to wait for another: what it has in them is what it means.
    """
    if visitor() is not None:
        visitor().hold()  # type: ignore[union-attr]
        yield
        return
    turn = Turn()
    turn.take(PROCESS)
    try:
        yield
    finally:
        turn.give()


@contextmanager
def at_rest() -> Iterator[None]:
    """Have what is no trainer's own draw from the process's numbers; for code without a turn."""
    turn = Turn()
    held = turn.rest()
    try:
        yield
    finally:
        turn.rise(held)
        turn.revoke()
