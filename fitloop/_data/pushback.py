"""Loaders that can be read only once, made to take batches back."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any


class PushbackIterator:
    """An iterator that gives batches again that were read from it but not used.

    Needed when a run ends early, and by dry runs.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._pushed_back: deque[Any] = deque()
        self._record: list[Any] | None = None
        self._finished = False
        self.batches_read = 0
        """batches that were read and not put back"""

    def _count(self, batch: Any) -> Any:
        self.batches_read += 1
        if self._record is not None:
            self._record.append(batch)
        return batch

    def put_back(self, batches: Iterable[Any]) -> None:
        """Give ``batches`` first in the next pass."""
        again = list(batches)
        self.batches_read -= len(again)
        self._pushed_back.extendleft(reversed(again))

    def is_exhausted(self) -> bool:
        """Return whether no batch is left."""
        return self._finished and not self._pushed_back

    def start_recording(self) -> None:
        """Remember all batches that are read from now on, for `rewind`."""
        self._record = []

    def rewind(self) -> None:
        """Put back all batches that were read since `start_recording`."""
        self.put_back(self._record or ())
        self._record = None


class _PushbackIterator(PushbackIterator):
    def __iter__(self) -> Iterator[Any]:
        iter(self.loader)  # returns the loader itself; some restart in this call
        self._finished = False
        return self

    def __next__(self) -> Any:
        if self._pushed_back:
            return self._count(self._pushed_back.popleft())
        try:
            return self._count(next(self.loader))
        except StopIteration:
            self._finished = True
            raise


class _AsyncPushbackIterator(PushbackIterator):
    def __aiter__(self) -> AsyncIterator[Any]:
        aiter(self.loader)
        self._finished = False
        return self

    async def __anext__(self) -> Any:
        if self._pushed_back:
            return self._count(self._pushed_back.popleft())
        try:
            return self._count(await anext(self.loader))
        except StopAsyncIteration:
            self._finished = True
            raise


def pushback_iterator_of(loader: Any) -> PushbackIterator | None:
    """Return a wrapper for a loader that is its own iterator; None for other loaders.

    A loader with a length is assumed to restart at every pass, as some do.
    """
    if not hasattr(loader, "__len__"):
        if hasattr(loader, "__next__"):
            return _PushbackIterator(loader)
        if hasattr(loader, "__anext__"):
            return _AsyncPushbackIterator(loader)
    return None
