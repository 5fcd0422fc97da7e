"""Loaders that can be read only once, made to take batches back."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from fitloop._data.structure import copy_if_possible


class PushbackIterator:
    """An iterator that gives batches again that were read from it but not used.

    Needed when a run ends early, and by dry runs.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._pushed_back: deque[Any] = deque()
        self._record: list[Any] | None = None
        self._finished = False
        """the loader has ended; batches that were put back are its last"""
        self.batches_read = 0
        """batches that were read and not put back"""

    def _count(self, batch: Any) -> Any:
        self.batches_read += 1
        if self._record is not None:
            self._record.append(copy_if_possible(batch))
        return batch

    def put_back(self, batches: Iterable[Any]) -> None:
        """Give ``batches`` first in the next pass."""
        again = list(batches)
        self.batches_read -= len(again)
        self._pushed_back.extendleft(reversed(again))

    def is_exhausted(self) -> bool:
        """Return whether no batch is left."""
        return self._finished and not self._pushed_back

    def _has_only_these(self) -> bool:
        """Return whether the next pass has only batches that were put back."""
        self._finished = self._finished and bool(self._pushed_back)
        return self._finished

    def start_recording(self) -> None:
        """Copy all batches that are read from now on, for `rewind`: a step may change them."""
        self._record = []

    def rewind(self) -> None:
        """Put back all batches that were read since `start_recording`."""
        self.put_back(self._record or ())
        self._record = None


class _PushbackIterator(PushbackIterator):
    def __iter__(self) -> Iterator[Any]:
        if not self._has_only_these():
            iter(self.loader)  # returns the loader itself; some restart in this call
        return self

    def __next__(self) -> Any:
        if self._pushed_back:
            return self._count(self._pushed_back.popleft())
        if self._finished:  # some loaders would begin anew
            raise StopIteration
        try:
            return self._count(next(self.loader))
        except StopIteration:
            self._finished = True
            raise


class _AsyncPushbackIterator(PushbackIterator):
    def __aiter__(self) -> AsyncIterator[Any]:
        if not self._has_only_these():
            aiter(self.loader)
        return self

    async def __anext__(self) -> Any:
        if self._pushed_back:
            return self._count(self._pushed_back.popleft())
        if self._finished:
            raise StopAsyncIteration
        try:
            return self._count(await anext(self.loader))
        except StopAsyncIteration:
            self._finished = True
            raise


def pushback_iterator_of(loader: Any) -> PushbackIterator | None:
    """Return a wrapper for a loader that is its own iterator; None for other loaders.

    A loader with a length is assumed to restart at every pass, as some do, unless its ``__iter__``
    is only ``return self``, as that of the iterator of a DataLoader.
    """
    for method, begin, kind in (
        ("__next__", "__iter__", _PushbackIterator),
        ("__anext__", "__aiter__", _AsyncPushbackIterator),
    ):
        if getattr(loader, method, None) is not None:
            has_length = hasattr(loader, "__len__")
            return None if has_length and not _only_returns_self(loader, begin) else kind(loader)
    return None


def _only_returns_self(loader: Any, method: str) -> bool:
    code = getattr(getattr(type(loader), method, None), "__code__", None)
    return code is not None and code.co_code == _return_self.__code__.co_code


def _return_self(self: Any) -> Any:
    return self
