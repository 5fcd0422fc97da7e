"""A thread that writes files in order, so that training does not wait for a disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs one after the other, in a thread that exists while there are jobs.

    A job reports its own outcome. A job that raises is a defect; `close` raises its exception.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Add a job to the queue, from any thread.

        Raises RuntimeError if no thread can be started; the job is not added then.
        """
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(
                    target=self._work, name=f"fitloop writes {self._name}", daemon=True
                )
                thread.start()  # it waits for the lock
                self._thread = thread
            self._jobs.append(job)

    def close(self) -> None:
        """Wait until every job is done, and raise the first exception of a job."""
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # raised by close()
                self._error = self._error or error
            del job  # it holds the state that it has written
