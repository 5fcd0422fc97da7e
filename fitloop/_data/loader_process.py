"""The process that reads the loaders of a run: its main function, and one pass over a loader.

It has copies of the loaders, which live as long as the process, and no other code of the training.
It begins a pass when it is asked to, reads a few batches ahead, and ends when the run has closed
the connection. The messages are in `fitloop._data.process_messages`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from typing import Any

from torch.utils.data import DataLoader

from fitloop._data.carried_state import (
    holders_of,
    plain_attributes,
    set_carried_states,
    set_plain_attributes,
    state_of,
)
from fitloop._data.inspection import is_iterable, is_stateful, set_epoch
from fitloop._data.process_messages import (
    NO_STATES,
    Answer,
    BatchSender,
    BatchTaken,
    LoaderStates,
    Opened,
    OpenPass,
    PassEnded,
    RngReports,
    SentBatch,
    SentWarning,
)
from fitloop._data.resumption import ResumePosition, resumed_iterator, warn_of_replay
from fitloop._errors import ConfigurationError, one_line
from fitloop._processes.connection import receive_message
from fitloop._processes.errors import SerializedError, serialize_error
from fitloop._processes.pickling import pickled, pickled_message
from fitloop._rng.generators import is_generator
from fitloop._rng.global_state import restore_global_state
from fitloop._rng.states import RngState
from fitloop._rng.streams import Stream


class _Disconnected(BaseException):
    """The run has closed the connection, or has died. No code of the user can catch it."""


def main(connection: Connection, key: int, shares_memory: bool) -> None:
    """Read loaders until the run is done; the whole life of the process.

    Args:
        connection: to the run.
        key, shares_memory: see `BatchSender`.
    """
    with warnings.catch_warnings(record=True) as caught, suppress(_Disconnected):
        warnings.simplefilter("default")
        _serve(_Channel(connection, caught), BatchSender(key, shares_memory))
    _exit()


def _exit() -> None:
    """End this process as a fork ends: quickly, without the teardown of torch."""
    util._exit_function()  # type: ignore[attr-defined]  # ends processes that a loader has started
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # there may be none
            stream.flush()
    os._exit(0)


class _Channel:
    """The connection; each message has the warnings since the one before."""

    def __init__(self, connection: Connection, caught: list[warnings.WarningMessage]) -> None:
        self._connection, self._caught = connection, caught

    def send(
        self,
        content: Opened | SentBatch | PassEnded | SerializedError,
        states: LoaderStates,
        descriptor: int | None = None,
    ) -> None:
        """Send a message, and then a file descriptor."""
        caught, self._caught[:] = [_sent_warning(one) for one in self._caught], []
        # torch's own pickles of tensors are slow.
        dump = partial(pickle.dumps, protocol=5) if states is NO_STATES else pickled_message
        message = dump(Answer(content, states, caught))
        try:
            self._connection.send_bytes(message)
            if descriptor is not None:
                reduction.send_handle(self._connection, descriptor, 0)
        except OSError:
            raise _Disconnected from None

    def receive(self, *, wait: bool = True) -> Any:
        """Return the next message; without ``wait``, None if there is none."""
        try:
            if not wait and not self._connection.poll():
                return None
            return receive_message(self._connection)
        except (EOFError, OSError):
            raise _Disconnected from None


def _sent_warning(caught: warnings.WarningMessage) -> SentWarning:
    category: bytes = pickle.dumps(RuntimeWarning)
    with suppress(Exception):
        category = pickled(caught.category)
    return category, str(caught.message), caught.filename, caught.lineno


def _serve(channel: _Channel, sender: BatchSender) -> None:
    """Carry out one pass after the other, until the connection is closed."""
    loaders: dict[int, Any] = {}
    while True:
        match channel.receive():
            case OpenPass() as request:
                _read_pass(request, loaders, channel, sender)
            case BatchTaken(released):  # of the last batches of a pass
                sender.slots.release(released)


def _read_pass(
    request: OpenPass, loaders: dict[int, Any], channel: _Channel, sender: BatchSender
) -> None:
    try:
        contents = request.contents
        if contents is not None:
            loaders[request.number] = pickle.loads(contents.pickle, buffers=contents.values)
        request.settings.apply()
        one_pass = _Pass(request, loaders[request.number], channel, sender)
        one_pass.begin()
        one_pass.read()
    except _Disconnected:
        raise
    except BaseException as error:  # of the user's code; the run raises it
        channel.send(serialize_error(error), NO_STATES)


class _Pass:
    """One pass over a loader."""

    def __init__(
        self,
        request: OpenPass,
        loader: Any,
        channel: _Channel,
        sender: BatchSender,
    ) -> None:
        self._request, self._plan, self._loader = request, request.plan, loader
        self._channel, self._sender = channel, sender
        self._rng = _Generators(request.plan.rng_reports)
        self._allowed = request.plan.ahead
        """batches that may be read now"""
        self._sent = 0
        self._iterable: Any = None
        self._holders: dict[str, Any] = {}

    def begin(self) -> None:
        """Prepare the loader as a run does before a pass, and answer."""
        request, loader = self._request, self._loader
        if is_iterable(loader):
            set_epoch(loader, request.epoch)
        set_plain_attributes(loader, request.attributes)
        if request.states is not None:
            set_carried_states(loader, request.states)
        self._rng.install(self._plan.rng_state)
        self._iterable = loader
        if not is_iterable(loader):
            self._iterable = loader()
            set_epoch(self._iterable, request.epoch)
        self._holders = holders_of(self._iterable)
        states = {path: state_of(holder) for path, holder in self._holders.items()}
        self._channel.send(Opened(states if self._plan.tracks_positions else {}), NO_STATES)

    def read(self) -> None:
        """Send the batches and then the end."""
        plan = self._plan
        if hasattr(self._iterable, "__aiter__"):
            asyncio.run(self._read_async())
        else:
            iterator: Iterator[Any]
            if plan.resume_from is None:
                iterator = iter(self._iterable)
            else:
                iterator = resumed_iterator(
                    self._loader,
                    self._iterable,
                    plan.resume_from,
                    self._request.label,
                    rereads=plan.rereads,
                )
                self._go_to(plan.resume_from)
            limited = itertools.islice(iterator, plan.limit)
            self._wait_for_permission()
            for batch in limited:
                self._send(batch)
                del batch
                self._wait_for_permission()
        carried = {path: state_of(each) for path, each in holders_of(self._loader).items()}
        loader_state = None
        if is_stateful(self._loader) and not isinstance(self._loader, DataLoader):
            loader_state = self._loader.state_dict()
        states = LoaderStates(self._rng.report(self._sent), carried, loader_state)
        self._channel.send(PassEnded(plain_attributes(self._loader)), states)

    async def _read_async(self) -> None:
        plan = self._plan
        iterator: AsyncIterator[Any] = aiter(self._iterable)
        try:
            if plan.resume_from is not None:
                warn_of_replay(self._request.label, plan.resume_from.batches)
                for _ in range(plan.resume_from.batches):
                    await anext(iterator, None)
                self._go_to(plan.resume_from)
            for _ in itertools.count() if plan.limit is None else range(plan.limit):
                self._wait_for_permission()
                try:
                    batch = await anext(iterator)
                except StopAsyncIteration:
                    return
                self._send(batch)
                del batch
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()

    def _go_to(self, position: ResumePosition) -> None:
        """Install the random state of a position, unless earlier batches were read again."""
        if not self._plan.rereads:
            self._rng.install(position.rng_state)

    def _send(self, batch: Any) -> None:
        label, sender = self._request.label, self._sender
        self._sent += 1
        self._allowed -= 1
        if self._sent == 1:  # some loaders make generators when they need them
            self._holders = holders_of(self._iterable)
        try:
            message = sender.message(batch)
        except Exception as error:  # a __reduce__ may raise anything
            raise ConfigurationError(
                f"{label} gave a {type(batch).__name__} that cannot be sent from the process that "
                f"reads it ({one_line(error)}); loading='thread' reads it in this process"
            ) from error
        placement = message.placement
        is_new = placement is not None and placement.is_new
        try:
            descriptor = sender.slots.descriptor if is_new else None
            self._channel.send(message, self._states(), descriptor)
        finally:
            if is_new:
                sender.slots.close_descriptor()

    def _states(self) -> LoaderStates:
        """Return the states after a batch that are needed if the pass ends there."""
        tracks = self._plan.tracks_positions
        carried = None
        if self._holders:
            # Generators are quick to read; of other objects only a snapshot needs the state.
            items = self._holders.items()
            carried = {path: state_of(each) for path, each in items if tracks or is_generator(each)}
        loader_state = (
            self._iterable.state_dict() if tracks and is_stateful(self._iterable) else None
        )
        rng = self._rng.report(self._sent)
        if rng is None and carried is None and loader_state is None:
            return NO_STATES
        return LoaderStates(rng, carried, loader_state)

    def _wait_for_permission(self) -> None:
        """Take all messages, and wait until one more batch may be read."""
        limit = self._plan.limit
        while True:
            is_last = limit is not None and self._sent >= limit  # the end needs no permission
            message = self._channel.receive(wait=not self._allowed and not is_last)
            if message is None:
                return
            assert isinstance(message, BatchTaken)
            self._allowed += 1
            self._sender.slots.release(message.released)


class _Generators:
    """The global generators of this process, which only the loaders use, during a pass."""

    def __init__(self, reports: RngReports) -> None:
        self._reports = reports
        self._stream: Stream | None = None

    def install(self, state: RngState) -> None:
        """Put the generators into a state, but not those of devices: the process uses none."""
        restore_global_state(state._replace(devices={}))
        self._stream = Stream.of_process()
        self._stream.install()  # a `Stream` reads quickly only what it has installed

    def report(self, batches: int) -> RngState | None:
        """Return the state, if it is wanted after this number of batches."""
        stream = self._stream
        assert stream is not None
        if self._reports == "none" or (self._reports == "first" and batches > 1):
            return None
        stream.capture()
        return stream.state()
