"""The random numbers of one trainer over its life: streams of its own, or the global generators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from fitloop._rng.device_generators import generator_names
from fitloop._rng.global_state import check_same_generator, global_state, restore_global_state
from fitloop._rng.lease import global_generators
from fitloop._rng.states import RngState
from fitloop._rng.streams import GLOBAL_STREAM, Stream
from fitloop._types import Phase

STREAM_INDEX: Final = {
    (phase, loader): 2 * position + loader
    for position, phase in enumerate(Phase)
    for loader in (False, True)
}
"""The streams of a trainer: phase and whether the loader uses it -> number, mixed into the seed."""
_CPU = torch.device("cpu")
_GLOBAL = "process"
"""Name in a snapshot of the state of the global generators."""


class TrainerRng:
    """The random numbers of one trainer.

    With a seed there are two streams for each phase, one for the steps and one for the loader. So
    validating, testing or loading ahead does not change the numbers of the training. Without a
    seed the trainer uses the global generators, also that of its ``device``.
    """

    def __init__(self, seed: int | None, device: torch.device = _CPU, rank: int = 0) -> None:
        self._device = device
        self.devices = generator_names(device)
        """names of the accelerators whose generators the trainer uses"""
        self._seed, self._rank = seed, rank
        self._streams: dict[tuple[Phase, bool], Stream] = {}
        """Made at first use, since seeding one takes a while."""

    @property
    def has_streams(self) -> bool:
        """Whether the trainer has streams of its own."""
        return self._seed is not None or bool(self._streams)

    def steps(self, phase: Phase) -> Stream:
        """Return the stream for the stage functions of a phase; `GLOBAL_STREAM` without streams."""
        return self._stream((phase, False)) if self.has_streams else GLOBAL_STREAM

    def loader(self, phase: Phase) -> Stream | None:
        """Return the stream for the loader of a phase; None if the trainer has no streams."""
        return self._stream((phase, True)) if self.has_streams else None

    def _stream(self, key: tuple[Phase, bool]) -> Stream:
        stream = self._streams.get(key)
        if stream is None:
            assert self._seed is not None
            seed, index = self._seed, STREAM_INDEX[key]
            if self._rank and not key[1]:  # the loaders of all ranks draw the same order
                seed = _mixed(seed, index, self._rank)
            elif index:  # the train steps have the seed itself, for comparing with a plain loop
                seed = _mixed(seed, index)
            stream = self._streams[key] = Stream(seed, self.devices)
        return stream

    def adopt_rank(self, rank: int) -> None:
        """Let the steps have the streams of one rank of a training; they begin anew."""
        if rank != self._rank:
            self._rank = rank
            self._streams.clear()

    def with_seed(self, seed: int) -> TrainerRng:
        """Return the random numbers of the same rank with another seed."""
        return TrainerRng(seed, self._device, self._rank)

    def reset(self) -> None:
        """Start all streams again from the seed."""
        self._streams.clear()

    def fork(self) -> TrainerRng:
        """Return a copy for a run that must change nothing; it has streams in any case.

        Without a seed all phases share one stream, a copy of the global generators.
        """
        twin = TrainerRng(self._seed, self._device, self._rank)
        if self.has_streams:
            twin._streams = {key: stream.copy() for key, stream in self._streams.items()}
        else:
            with global_generators():
                twin._streams = dict.fromkeys(STREAM_INDEX, Stream.of_process(self.devices))
        return twin

    def states(self) -> dict[tuple[Phase, bool], RngState]:
        """Return the state of each stream; none may be installed now."""
        return {key: self._stream(key).state() for key in STREAM_INDEX} if self.has_streams else {}

    def save(self) -> Callable[[], None]:
        """Return a function that puts the random numbers back to where they are now."""
        if self.has_streams:
            return partial(self._set_states, self.states())
        return partial(restore_global_state, global_state(self.devices))

    def state_tree(self, loaders: Mapping[Phase, RngState] | None = None) -> dict[str, Any]:
        """Return the states as a tree for a snapshot.

        ``loaders`` has the states of loaders that have read batches ahead.
        """
        if not self.has_streams:
            return {_GLOBAL: global_state(self.devices).to_tree()}
        states = self.states() | {(phase, True): s for phase, s in (loaders or {}).items()}
        return {_name(*key): state.to_tree() for key, state in states.items()}

    def prepare_load(self, states: Mapping[str, RngState]) -> Callable[[], None]:
        """Return a function that loads the states of a snapshot.

        Raises:
            KeyError, ValueError: the states do not fit this trainer or numpy's generator.
        """
        if not self.has_streams:
            check_same_generator(states[_GLOBAL])
            return partial(restore_global_state, states[_GLOBAL])
        streams = {key: states[_name(*key)] for key in STREAM_INDEX}
        if not all(isinstance(state.bits, bytes) for state in streams.values()):
            raise ValueError("a stream is of another generator of numpy's")
        return partial(self._set_states, streams)

    def _set_states(self, states: Mapping[tuple[Phase, bool], RngState]) -> None:
        for key in STREAM_INDEX:
            self._stream(key).set_state(states[key])


def loader_state(states: Mapping[str, RngState], phase: Phase) -> RngState:
    """Return the state in a snapshot that the loader of a phase continues from."""
    return states.get(_GLOBAL) or states[_name(phase, True)]


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _name(phase: Phase, loader: bool) -> str:
    return f"{phase} {'loader' if loader else 'steps'}"
