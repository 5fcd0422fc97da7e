"""A launcher whose workers start in hundredths of a second, and a network that can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fitloop import FitLoop, LoopState, default_batch_step
from fitloop._processes.child import ChildProcess, check_start_method
from fitloop.backends import WorkerExit, WorkerOrder
from fitloop.backends.launched.worker import serve_program
from support.worker_processes import make_trainer


def serve(pipe: Any, address: str, key: str) -> None:
    """Be a worker: the main function of a forked process."""
    serve_program(address, key)


class ForkLauncher:
    """Starts workers that are forks of a process with all imports, and connect over TCP.

    With ``relays`` they connect through a `Relay`.
    """

    host, threads = "127.0.0.1", 1

    def __init__(self, *, relays: bool = False) -> None:
        self._relays = relays
        self.workers: list[ForkedWorker] = []

    def start(self, order: WorkerOrder) -> ForkedWorker:
        """Start a worker."""
        relay = Relay(order.address) if self._relays else None
        worker = ForkedWorker(relay.address if relay else order.address, order.key, relay)
        self.workers.append(worker)
        return worker

    def start_ranks(self, orders: Sequence[WorkerOrder]) -> list[ForkedWorker]:
        """Start the workers of one training."""
        return [self.start(order) for order in orders]


class ForkedWorker(ChildProcess):
    """A `LaunchedWorker`. One that is ``unreachable`` cannot be killed or asked for its end."""

    def __init__(self, address: str, key: str, relay: Relay | None) -> None:
        super().__init__(serve, (address, key), check_start_method(None), "launched worker")
        self.relay, self.unreachable = relay, False

    def poll(self) -> WorkerExit | None:
        """Return how it has ended."""
        if self.unreachable or self.process.exitcode is None:
            return None
        return WorkerExit("ended in the test", self.process.exitcode)

    def kill(self) -> None:
        """Kill it."""
        if not self.unreachable:
            super().kill()

    def log_tail(self) -> list[str]:
        """Return a line."""
        return ["the log of the test"]

    def close(self) -> None:
        """Free the resources, unless it cannot be reached."""
        if self.unreachable:
            return
        if self.relay is not None:
            self.relay.cut()
        super().close()


class Relay:
    """A way over the network from a worker to the program, which `cut` ends."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._target = host, int(port)
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._relay)]
        self._threads[0].start()

    def _relay(self) -> None:
        with suppress(OSError):
            worker, _ = self._listener.accept()
            self._ends += [worker, socket.create_connection(self._target)]
            back = threading.Thread(target=_copy, args=(self._ends[1], worker))
            self._threads.append(back)
            back.start()
            _copy(worker, self._ends[1])

    def cut_program_off(self) -> None:
        """Close the connection to the program; that to the worker stays open, and silent."""
        self._ends[1].shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Close both connections."""
        for end in (self._listener, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


def make_held_up_trainer(mark: str, pipe: str) -> FitLoop:
    """Return a trainer that waits for the other end of a pipe in its second epoch.

    Only the first one does, which finds the file ``mark`` and removes it then.
    """

    def step(state: LoopState) -> Any:
        if state.epoch_num == 2 and Path(mark).exists():
            Path(mark).unlink()
            with open(pipe):
                pass
        return default_batch_step(state)

    return make_trainer(train_step=step)
