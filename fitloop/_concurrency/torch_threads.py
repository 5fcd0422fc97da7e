"""The number of intra-op threads of torch, for the thread of a run.

``torch.set_num_threads`` sets the number of the calling thread, and the number that threads start
with in the whole process. It is called only for a run that needs another number; the number of the
process is restored when the last such run ends.
"""

from __future__ import annotations

import threading

import torch


class _IntraOpThreads:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._process_count = 0

    def enter(self, count: int) -> bool:
        """Set the number for the calling thread; return False if it has this number already."""
        with self._lock:
            if torch.get_num_threads() == count:
                return False
            if self._runs == 0:
                self._process_count = torch.get_num_threads()
            self._runs += 1
            torch.set_num_threads(count)
            return True

    def leave(self) -> None:
        """Undo an `enter` that returned True, from any thread."""
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                torch.set_num_threads(self._process_count)


intra_op_threads = _IntraOpThreads()
