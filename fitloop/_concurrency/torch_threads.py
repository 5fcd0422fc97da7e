"""How many threads torch uses inside one operation, for the thread of a run.

``torch.set_num_threads`` sets the number for the calling thread and, for the whole process, the
number that threads begun later start from. So it is called only where a run wants another number,
and the process's is put back when the last such run ends.
"""

from __future__ import annotations

import threading

import torch


class _IntraOpThreads:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._outside = 0

    def enter(self, count: int) -> bool:
        """Give the calling thread ``count`` threads; false when it has them already."""
        with self._lock:
            if torch.get_num_threads() == count:
                return False
            if self._runs == 0:
                self._outside = torch.get_num_threads()
            self._runs += 1
            torch.set_num_threads(count)
            return True

    def leave(self) -> None:
        """Take back an `enter` that returned true; any thread."""
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                torch.set_num_threads(self._outside)


intra_op_threads = _IntraOpThreads()
