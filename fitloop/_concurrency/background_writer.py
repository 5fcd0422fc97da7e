"""A thread that writes, so that training does not wait for a disk.

Owns the order of what is written: first come, first served, one at a time. Knows no files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs in a thread of its own, which is there while there are any.

    A job tells its own outcome; one that raises is a defect, and the error is raised by `close`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Have ``job`` called after those before it; any thread.

        Raises RuntimeError when there can be no more threads; the job is not kept then.
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
        """Return when every job is done; raises what one of them raised."""
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
            except BaseException as error:  # crosses to whoever closes
                self._error = self._error or error
            del job  # it holds the state that it wrote
