"""Loaders that can be read once: iterators, with what was read from them but not used."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any


class PushbackIterator:
    """An iterator, which can be read once, with what was read from it but not used.

    Lets a run that ends early, and the sanity check, put batches back.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._unread: deque[Any] = deque()
        self._record: list[Any] | None = None
        self._ended = False
        self.batches_read = 0
        """batches that were given and not put back"""

    def _note(self, batch: Any) -> Any:
        self.batches_read += 1
        if self._record is not None:
            self._record.append(batch)
        return batch

    def put_back(self, batches: Iterable[Any]) -> None:
        """Have ``batches`` come first in the next pass."""
        again = list(batches)
        self.batches_read -= len(again)
        self._unread.extendleft(reversed(again))

    def is_exhausted(self) -> bool:
        """Return whether there is nothing left to read."""
        return self._ended and not self._unread

    def record(self) -> None:
        """Remember what is read from now on, for `rewind`."""
        self._record = []

    def rewind(self) -> None:
        """Put back all that was read since `record`."""
        self.put_back(self._record or ())
        self._record = None


class _OneShotIterator(PushbackIterator):
    def __iter__(self) -> Iterator[Any]:
        iter(self.loader)  # returns itself, and some begin anew at it
        self._ended = False
        return self

    def __next__(self) -> Any:
        if self._unread:
            return self._note(self._unread.popleft())
        try:
            return self._note(next(self.loader))
        except StopIteration:
            self._ended = True
            raise


class _OneShotAsyncIterator(PushbackIterator):
    def __aiter__(self) -> AsyncIterator[Any]:
        aiter(self.loader)
        self._ended = False
        return self

    async def __anext__(self) -> Any:
        if self._unread:
            return self._note(self._unread.popleft())
        try:
            return self._note(await anext(self.loader))
        except StopAsyncIteration:
            self._ended = True
            raise


def pushback_iterator_of(loader: Any) -> PushbackIterator | None:
    """Return a wrapper for a loader that is its own iterator, so that it goes on where it was left.

    One with a length is taken for a loader that begins anew at every pass, as some do.
    """
    if not hasattr(loader, "__len__"):
        if hasattr(loader, "__next__"):
            return _OneShotIterator(loader)
        if hasattr(loader, "__anext__"):
            return _OneShotAsyncIterator(loader)
    return None
