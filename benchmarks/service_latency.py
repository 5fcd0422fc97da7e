"""How long a request to a web service waits while two trainings run in it, beside an idle one.

The service is ``examples/service``, once with threads and once with worker processes, each a
program of its own, two trainings at a time. The client is this process: ``GET /trainings/1`` over
a kept connection, 400 requests a round, each 5 ms after the answer to the one before it. Rounds
are interleaved: idle, trainings in threads, trainings in processes, idle, and so on; a figure is
the median of the rounds. The trainings are endless ones on scikit-learn's digits: ``small`` has
steps that are mostly Python's own work, ``large`` is a CNN. Worker processes have a niceness of 10,
which the service gives them. A page that follows all events is open meanwhile. Wanted: a p99 of at
most 20 ms in threads and 5 ms in processes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures
from benchmarks.heartbeat import LAG_COLUMNS, lag_figures
from benchmarks.machine import machine
from benchmarks.report import Report, Row, Spread, Table

ROOT = Path(__file__).parents[1]
PAUSE = 0.005
"""seconds between an answer and the next request"""
LIMIT = 120.0
"""seconds that anything may take"""
MODELS = ("small", "large")


class Service:
    """A running service, and a connection to it."""

    def __init__(self, program: subprocess.Popen[str], port: int) -> None:
        self.program = program
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        self._followed = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)

    def warm_up(self) -> None:
        """Have two trainings done, of which the first is what is asked for; begins all workers."""
        numbers = [self._request("POST", "/trainings", {"epochs": 1})["id"] for _ in range(2)]
        for number in numbers:
            self._until(number, ("done",))

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        headers = {} if body is None else {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        told = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {told.decode()}")
        return json.loads(told)

    def _until(self, number: int, statuses: tuple[str, ...], epochs: int = 0) -> None:
        until = time.monotonic() + LIMIT
        while time.monotonic() < until:
            told = self._request("GET", f"/trainings/{number}")
            if told["status"] in statuses and told["epoch"] >= epochs:
                return
            time.sleep(0.01)
        raise TimeoutError(f"training {number} is {told['status']}; expected {statuses}")

    def latencies(self, requests: int) -> list[float]:
        """Return the seconds from a request to the end of its answer, of so many."""
        waited = []
        self._connection.close()  # a new one: the service lets go of one that was idle for 5 s
        self._request("GET", "/trainings/1")
        for _ in range(requests):
            began = time.perf_counter()
            self._request("GET", "/trainings/1")
            waited.append(time.perf_counter() - began)
            time.sleep(PAUSE)
        return waited

    @contextlib.contextmanager
    def training(self, model: str) -> Iterator[None]:
        """Have two trainings run, past their first epochs."""
        self._connection.close()
        settings = {"model": model, "epochs": 1000, "lr": 0.01}
        numbers = [self._request("POST", "/trainings", settings)["id"] for _ in range(2)]
        for number in numbers:
            self._until(number, ("running",), epochs=1)
        yield
        for number in numbers:
            told = self._request("DELETE", f"/trainings/{number}")
            if told["status"] != "running":
                raise RuntimeError(f"a training was over before the measurement was: {told}")
            self._until(number, ("cancelled",))

    def follow(self) -> None:
        """Have a page follow all events, until the service ends."""
        self._followed.request("GET", "/events")
        stream = self._followed.getresponse()

        def read() -> None:
            # It breaks off where Ctrl-C ends the service, too.
            with contextlib.suppress(http.client.HTTPException, OSError):
                while stream.read1(65536):
                    pass

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End the service, and with it the stream."""
        self.program.terminate()
        self._reader.join(LIMIT)
        self.program.wait(LIMIT)
        self._followed.close()
        self._connection.close()


@contextlib.contextmanager
def serving(backend: str) -> Iterator[Service]:
    command = [sys.executable, str(ROOT / "examples" / "service"), "--port", "0"]
    command += ["--backend", backend, "--at-once", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        try:
            service = Service(program, port_of(program))
            service.follow()
            service.warm_up()
            yield service
            service.close()
        finally:
            program.kill()


def port_of(program: subprocess.Popen[str]) -> int:
    """Return the port that a service says it has."""
    assert program.stderr is not None
    for line in program.stderr:
        if found := re.search(r"127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise RuntimeError(f"the service ended with {program.wait()}")


def one_round(services: tuple[Service, Service], turn: int, requests: int) -> dict[str, Figures]:
    """Return percentiles by situation: idle, then training, a model after the other."""
    found: dict[str, Figures] = {}
    for model in MODELS:
        idle = services[turn % 2].latencies(requests)
        found[f"idle, before {model}"] = lag_figures(idle)
        for name, service in zip(("threads", "processes"), services, strict=True):
            with service.training(model):
                found[f"{name}, {model}"] = lag_figures(service.latencies(requests))
    return found


def measure(quick: bool = False) -> Report:
    rounds, requests = (1, 60) if quick else (5, 400)
    found: dict[str, list[Figures]] = {}
    with serving("thread") as threads, serving("process") as processes:
        for turn in range(rounds):
            for name, figures in one_round((threads, processes), turn, requests).items():
                found.setdefault(name, []).append(figures)
    rows = [
        Row(
            name=name,
            figures={
                column.name: Spread.of([figures[column.name] for figures in measured])
                for column in LAG_COLUMNS
            },
            ours=not name.startswith("idle"),
        )
        for name, measured in found.items()
    ]
    return Report(
        name="service_latency",
        question="how long does a request wait while trainings run in the service?",
        method=" ".join((__doc__ or "").split("\n\n", 1)[1].split()),
        tables=[Table(title="GET of a status", columns=LAG_COLUMNS, rows=rows, chart="p99")],
        machine=machine("starlette", "uvicorn"),
    )
