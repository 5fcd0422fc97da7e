"""The workers of one training with several ranks, as one `Transport`."""

from __future__ import annotations

import queue
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fitloop.backends.remote.messages import (
    Answer,
    ClientMessage,
    JobOver,
    Printed,
    RankPlace,
    Ready,
    StartJob,
    WorkerMessage,
)
from fitloop.backends.remote.transport import Transport, WorkerExit

LAST_LINES = 20
"""lines of each rank that are kept for an error"""
BLAME_SECONDS = 60.0
"""for the rank that others blame to fail itself, or to be found dead"""


class WorkerRanks:
    """The workers of one training with several ranks: a `Transport`.

    It speaks for rank 0, and is over when all ranks are. If one fails or dies, so does the
    training, and the others are killed. The ranks find each other through a store in this process,
    as under ``torchrun``.

    Args:
        workers: one for each rank; they are closed if the store cannot be opened.
        host: name or IPv4 address of this machine for the workers.
        first_device: number of the device of rank 0 on its machine.
    """

    def __init__(self, workers: Sequence[Transport], host: str, first_device: int = 0) -> None:
        self.ready = False
        self._workers, self._host, self._first_device = list(workers), host, first_device
        self._messages: queue.SimpleQueue[tuple[int, WorkerMessage | Exception]] = (
            queue.SimpleQueue()
        )
        """of all ranks; an exception is the last one of a rank"""
        self._threads: list[threading.Thread] = []
        self._overs: dict[int, JobOver] = {}
        """by rank, in the order in which they came"""
        self._dead = 0
        """rank whose worker has died"""
        self._lines = [deque[str](maxlen=LAST_LINES) for _ in workers]
        try:
            self._store, self._port = _new_store(host)
        except BaseException:
            self.close()
            raise

    def send(self, message: ClientMessage) -> None:
        """Send a message: an answer to rank 0, others to all ranks.

        Waits for no worker: they may start in any order, and `receive` tells if one is gone.
        """
        if isinstance(message, StartJob):
            for rank in range(len(self._workers)):
                self._converse(rank, replace(message, place=self._place(rank)))
            return
        for worker in self._workers[:1] if isinstance(message, Answer) else self._workers:
            with suppress(EOFError, OSError):  # `receive` tells it
                worker.send(message)

    def receive(self) -> WorkerMessage:
        """Wait for the next message of rank 0, or the end of all ranks."""
        while True:
            has_blame = any(over.blames_others for over in self._overs.values())
            try:
                rank, message = self._messages.get(timeout=BLAME_SECONDS if has_blame else None)
            except queue.Empty:
                return self._outcome()
            match message:
                case Exception():
                    if rank not in self._overs:
                        self._dead = rank
                        raise message
                case Ready():
                    self._workers[rank].ready = True
                    if all(worker.ready for worker in self._workers):
                        return message
                case JobOver(error=error, blames_others=blames):
                    self._overs[rank] = message
                    if len(self._overs) == len(self._workers) or (error and not blames):
                        return self._outcome()
                case _ if rank == 0:
                    return message
                case Printed(text=text, is_partial=False):
                    self._lines[rank].extend(text.splitlines())

    def kill(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            worker.kill()

    def wait_for_exit(self) -> WorkerExit:
        """Kill the other workers, and wait for the end of the one that has died."""
        for rank, worker in enumerate(self._workers):
            if rank != self._dead:
                worker.kill()
        end = self._workers[self._dead].wait_for_exit()
        return end._replace(description=f"on rank {self._dead} {end.description}")

    def disconnect(self) -> None:
        """Close the connections to all workers."""
        for worker in self._workers:
            worker.disconnect()

    def log_tail(self) -> list[str]:
        """Return the last lines of the worker that has died."""
        return [*self._lines[self._dead], *self._workers[self._dead].log_tail()]

    def close(self) -> None:
        """End all workers and free all resources."""
        for rank, worker in enumerate(self._workers):
            if rank not in self._overs:
                worker.kill()
        for thread in self._threads:
            thread.join()
        self.disconnect()  # from all, which may end together
        for worker in self._workers:
            worker.close()
        self._store = None

    def _place(self, rank: int) -> RankPlace:
        size = len(self._workers)
        return RankPlace(rank, size, self._first_device + rank, self._host, self._port)

    def _converse(self, rank: int, start: StartJob) -> None:
        """Send a rank its job, and receive its messages up to the last one, in a thread."""
        worker = self._workers[rank]

        def converse() -> None:
            message: WorkerMessage | None = None
            try:
                worker.send(start)
                while not isinstance(message, JobOver):
                    message = worker.receive()
                    self._messages.put((rank, message))
            except Exception as error:  # raised by `receive`
                self._messages.put((rank, error))

        name = f"fitloop rank {rank} channel"
        self._threads.append(threading.Thread(target=converse, name=name, daemon=True))
        self._threads[-1].start()

    def _outcome(self) -> JobOver:
        """Return the first of: an own error of a rank, a cancellation, any error, the result."""

        def order(over: JobOver) -> int:
            if over.error is not None:
                return 2 if over.blames_others else 0
            return 1 if over.result is None else 3

        return min((self._overs[rank] for rank in sorted(self._overs)), key=order)


def _new_store(host: str) -> tuple[Any, int]:
    """Return a store in which ranks find each other, and its port."""
    with socket.create_server((host, 0)) as listener:  # TCPStore would listen everywhere
        port = int(listener.getsockname()[1])
        descriptor = listener.detach()
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    ), port
