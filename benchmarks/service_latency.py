"""How long a request to a web service waits while two trainings run in it, beside an idle one.

    python benchmarks/service_latency.py [--rounds 5] [--quick] [--json FILE]

The service is ``examples/service``, once with threads and once with worker processes, each a
program of its own, two trainings at a time. The client is this process: ``GET /trainings/1`` over
a kept connection, a request 5 ms after the answer to the one before it. Rounds are interleaved:
idle, trainings in threads, trainings in processes, idle, and so on; the figures are of the
requests of all rounds together, in milliseconds. The trainings are endless ones on scikit-learn's
digits: ``small`` has steps that are mostly Python's own work, ``large`` is a CNN. A page that
follows all events is open meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from overhead import machine

ROOT = Path(__file__).parents[1]
REQUESTS, QUICK_REQUESTS = 400, 60
"""of a round"""
PAUSE = 0.005
"""seconds between an answer and the next request"""
LIMIT = 120.0
"""seconds that anything may take"""
MODELS = ("small", "large")
AIMS_MS = {"threads": 20.0, "processes": 5.0}
"""at the 99th percentile"""


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
        """Return the milliseconds from a request to the end of its answer, of so many."""
        waited = []
        self._connection.close()  # a new one: the service lets go of one that was idle for 5 s
        self._request("GET", "/trainings/1")
        for _ in range(requests):
            began = time.perf_counter()
            self._request("GET", "/trainings/1")
            waited.append((time.perf_counter() - began) * 1000)
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


def measure(quick: bool) -> dict[str, Any]:
    """Return the figures: rows of a situation with percentiles in milliseconds, and the aims."""
    rounds, requests = (1, QUICK_REQUESTS) if quick else (5, REQUESTS)
    return measured(rounds, requests)


def measured(rounds: int, requests: int) -> dict[str, Any]:
    waited: dict[str, list[float]] = {"idle": []}
    with serving("thread") as threads, serving("process") as processes:
        for turn in range(rounds):
            for model in MODELS:
                waited["idle"] += (threads, processes)[turn % 2].latencies(requests)
                for name, service in (("threads", threads), ("processes", processes)):
                    with service.training(model):
                        found = service.latencies(requests)
                        waited.setdefault(f"{name}, {model}", []).extend(found)
    rows = [{"name": name, **percentiles(values)} for name, values in waited.items()]
    load, _, _ = os.getloadavg()  # of others, too, who make everybody wait
    about = {**machine(), "cores": os.cpu_count(), "load": round(load, 1)}
    return {"rows": rows, "aims_p99_ms": AIMS_MS, "rounds": rounds, "machine": about}


def percentiles(values: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return {
        "requests": len(values),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "max_ms": max(values),
    }


def show(figures: dict[str, Any]) -> None:
    print(f"{'GET of a status':22}{'requests':>9}{'p50':>9}{'p99':>9}{'max':>9}  ms")
    for row in figures["rows"]:
        aim = AIMS_MS.get(row["name"].partition(",")[0])
        told = "" if aim is None else f"  p99 to be {aim:g} at most"
        numbers = "".join(f"{row[key]:9.2f}" for key in ("p50_ms", "p99_ms", "max_ms"))
        print(f"{row['name']:22}{row['requests']:9}{numbers}{told}")
    print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    figures = measure(True) if arguments.quick else measured(arguments.rounds, REQUESTS)
    show(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
