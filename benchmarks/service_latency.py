"""The latency of requests to a web service while two trainings run in it.

The service is ``examples/service``, once with threads and once with worker processes, each a
program of its own that runs two trainings at a time. The client is this process: ``GET
/trainings/1`` over one connection, 400 requests a round, each 5 ms after the answer to the one
before. Rounds are interleaved: idle, trainings in threads, trainings in processes, idle, and so on;
a figure is the median of the rounds. The trainings are endless, on scikit-learn's digits: steps of
``small`` are mostly work of Python itself, ``large`` is a CNN. The service gives its worker
processes a niceness of 10. A page that follows all events is open meanwhile. "By hand" is a service
without fitloop, which answers such a request with three values and trains the same models by
hand-written loops in two threads, without a validation: the limit of the interpreter.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures
from benchmarks.heartbeat import LAG_COLUMNS, lag_figures
from benchmarks.machine import machine
from benchmarks.report import Aim, Report, Row, Spread, Table, method_of

ROOT = Path(__file__).parents[1]
PAUSE = 0.005
"""seconds between an answer and the next request"""
LIMIT = 120.0
"""timeout of every wait, in seconds"""
MODELS = ("small", "large")
BY_HAND, OURS = "by hand, threads", ("threads", "processes")
AIMS = {"threads": 3, "processes": 5}
"""ms of the p99, beside either model"""


class Service:
    """A running service, and a connection to it."""

    def __init__(self, program: subprocess.Popen[str], port: int) -> None:
        self.program = program
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        self._event_connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        self._reader: threading.Thread | None = None

    def warm_up(self) -> None:
        """Run two trainings, so that all workers are started and a first training exists."""
        with self.training("small"):
            pass

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        headers = {} if body is None else {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, headers)
        response = self._connection.getresponse()
        content = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {content.decode()}")
        return json.loads(content)

    def _wait_for(self, number: int, statuses: tuple[str, ...], epochs: int = 0) -> None:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            training = self._request("GET", f"/trainings/{number}")
            if training["status"] in statuses and training["epoch"] >= epochs:
                return
            time.sleep(0.01)
        raise TimeoutError(f"training {number} is {training['status']}; expected {statuses}")

    def latencies(self, requests: int) -> list[float]:
        """Return for each request the seconds until the end of its answer."""
        seconds = []
        self._connection.close()  # use a new one: the service closes one that is idle for 5 s
        self._request("GET", "/trainings/1")
        for _ in range(requests):
            start = time.perf_counter()
            self._request("GET", "/trainings/1")
            seconds.append(time.perf_counter() - start)
            time.sleep(PAUSE)
        return seconds

    @contextlib.contextmanager
    def training(self, model: str) -> Iterator[None]:
        """Run two trainings meanwhile, both past their first epochs."""
        self._connection.close()
        settings = {"model": model, "epochs": 1000, "lr": 0.01}
        numbers = [self._request("POST", "/trainings", settings)["id"] for _ in range(2)]
        for number in numbers:
            self._wait_for(number, ("running",), epochs=1)
        yield
        for number in numbers:
            training = self._request("DELETE", f"/trainings/{number}")
            if training["status"] != "running":
                raise RuntimeError(f"a training ended before the measurement: {training}")
            self._wait_for(number, ("cancelled",))

    def follow(self) -> None:
        """Read all events in a thread until the service ends, like an open page."""
        self._event_connection.request("GET", "/events")
        stream = self._event_connection.getresponse()

        def read() -> None:
            # The stream also breaks off if Ctrl-C ends the service.
            with contextlib.suppress(http.client.HTTPException, OSError):
                while stream.read1(65536):
                    pass

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End the service, and thereby the stream of events."""
        self.program.terminate()
        if self._reader is not None:
            self._reader.join(LIMIT)
        self.program.wait(LIMIT)
        self._event_connection.close()
        self._connection.close()


@contextlib.contextmanager
def serving(backend: str) -> Iterator[Service]:
    command = [str(ROOT / "examples" / "service"), "--port", "0"]
    command += ["--backend", backend, "--at-once", "2"]
    with (
        tempfile.TemporaryDirectory() as save_path,
        program_of([*command, "--save-path", save_path]) as service,
    ):
        service.follow()
        service.warm_up()
        yield service


@contextlib.contextmanager
def program_of(arguments: list[str]) -> Iterator[Service]:
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as program:
        try:
            service = Service(program, port_of(program))
            yield service
            service.close()
        finally:
            program.kill()


def port_of(program: subprocess.Popen[str]) -> int:
    """Return the port that the service prints."""
    assert program.stderr is not None
    for line in program.stderr:
        if match := re.search(r"127\.0\.0\.1:(\d+)", line):
            return int(match[1])
    raise RuntimeError(f"the service ended with {program.wait()}")


def one_round(services: dict[str, Service], round_number: int, requests: int) -> dict[str, Figures]:
    """Return the percentiles of each situation: idle, then training, for each model."""
    percentiles: dict[str, Figures] = {}
    for model in MODELS:
        idle = services[OURS[round_number % 2]].latencies(requests)
        percentiles[f"idle, before {model}"] = lag_figures(idle)
        for name, service in services.items():
            with service.training(model):
                percentiles[f"{name}, {model}"] = lag_figures(service.latencies(requests))
    return percentiles


def measure(quick: bool = False) -> Report:
    rounds, requests = (1, 60) if quick else (5, 400)
    results: dict[str, list[Figures]] = {}
    with (
        serving("thread") as threads,
        serving("process") as processes,
        program_of(["-m", "benchmarks.by_hand_service"]) as by_hand,
    ):
        by_hand.warm_up()
        services = {BY_HAND: by_hand, **dict(zip(OURS, (threads, processes), strict=True))}
        for round_number in range(rounds):
            for name, figures in one_round(services, round_number, requests).items():
                results.setdefault(name, []).append(figures)
    rows = [
        Row(
            name=name,
            figures={
                column.name: Spread.of([figures[column.name] for figures in measured])
                for column in LAG_COLUMNS
            },
            ours=name.startswith(OURS),
        )
        for name, measured in results.items()
    ]
    aims = [
        Aim(row=f"{where}, {model}", column="p99", limit=limit)
        for where, limit in AIMS.items()
        for model in MODELS
    ]
    table = Table(title="GET of a status", columns=LAG_COLUMNS, rows=rows, chart="p99", aims=aims)
    return Report(
        name="service_latency",
        question="how long does a request wait while trainings run in the service?",
        method=method_of(__doc__),
        tables=[table],
        machine=machine("starlette", "uvicorn"),
    )
