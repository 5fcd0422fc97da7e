"""The loop that one would write by hand around a trainer's own step, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fitloop._bench.figures import Pass
from fitloop._bench.passes import Clock, Passage, ended
from fitloop._concurrency.control import RunControl
from fitloop._data.sources import END
from fitloop._engine.config import Parts
from fitloop._engine.loop_state import LoopState
from fitloop._errors import UnknownMetricError


class KeptValues:
    """What batch steps returned, in plain lists, as one would write it by hand."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}

    def put(self, values: Any) -> None:
        """Add what one step returned."""
        for name, value in values.items() if values else ():
            if isinstance(value, Tensor):
                value = value.item() if value.is_cpu and not value.ndim else value.detach()
            kept = self._lists.get(name)
            if kept is None:
                self._lists[name] = [value]
            else:
                kept.append(value)

    def names(self) -> list[str]:
        """Return the names there are."""
        return list(self._lists)

    def __contains__(self, name: object) -> bool:
        return name in self._lists

    def __getitem__(self, name: str) -> Any:
        """Return the values of ``name``, as a `LoopState` gives them to a step that asks."""
        if name not in self._lists:
            raise UnknownMetricError(name, self._lists, "the batch values of this train epoch")
        values = self._lists[name]
        if any(isinstance(value, Tensor) and value.ndim for value in values):
            return values
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


class BareLoop:
    """The loop that one would write by hand around the same step, on the calling thread."""

    def __init__(
        self,
        parts: Parts,
        control: RunControl,
        *,
        move: Callable[[Any], Any],
        clock: Clock,
        settle: Callable[[], None] | None,
        after_batch: Callable[[], None] | None,
        define_all: bool,
    ) -> None:
        self._control = control
        self._move = move
        self._clock = clock
        self._settle = settle
        self._after_batch = after_batch
        self._to_zero = () if define_all else tuple(parts.optimizers)

    def read(self, iterable: Any, limit: int, label: str) -> Pass:
        """Read and move batches, and do nothing with them."""
        passage, used = Passage(), time.thread_time()
        for _ in self._batches(iterable, limit, label, passage):
            pass
        return replace(passage.result(), computed=time.thread_time() - used)

    def train(self, step: Any, state: LoopState, iterable: Any, limit: int, label: str) -> Pass:
        """Read and step, one after the other."""
        passage, put = Passage(), self._keep(state).put
        to_zero, after_batch = self._to_zero, self._after_batch
        used = time.thread_time()
        for batch in self._batches(iterable, limit, label, passage):
            state._next(batch)
            for optimizer in to_zero:
                optimizer.zero_grad()
            put(step(state))
            if after_batch is not None:
                after_batch()
        return replace(passage.result(), computed=time.thread_time() - used)

    async def train_async(
        self, step: Any, state: LoopState, iterable: Any, limit: int, label: str
    ) -> Pass:
        """Do the same with a step that is awaited."""
        passage, put = Passage(), self._keep(state).put
        for batch in self._batches(iterable, limit, label, passage):
            state._next(batch)
            for optimizer in self._to_zero:
                optimizer.zero_grad()
            put(await step(state))
            if self._after_batch is not None:
                self._after_batch()
        return passage.result()

    @staticmethod
    def _keep(state: LoopState) -> KeptValues:
        kept: Any = KeptValues()
        state._values = kept  # for a step that looks at what it returned before
        return kept  # type: ignore[no-any-return]

    def _batches(self, iterable: Any, limit: int, label: str, passage: Passage) -> Iterator[Any]:
        clock, control, move = self._clock, self._control, self._move
        passage.opened = began = clock()
        try:
            control.loading = label
            iterator = islice(iter(iterable), limit)
            while True:
                control.loading = label
                batch = next(iterator, END)
                control.loading = None
                if control.halted:
                    control.left_loader()
                    return
                if batch is END:
                    break
                batch = move(batch)
                passage.add(began, clock())
                yield batch
                began = clock()
        finally:
            if control.loading is not None:  # it raised
                control.left_loader(failed=True)
        passage.ended = ended(began, clock, self._settle)
