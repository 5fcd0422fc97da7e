"""The service of ``examples/service`` on a free port, and a client that reads its events."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import httpx

from support.event_loops import HANG_TIMEOUT
from support.programs import Program

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from service.server import Server, make_server  # noqa: E402
from service.trainings import BackendName, Options  # noqa: E402

EventData = dict[str, Any]


class Service:
    """A client of a running service."""

    def __init__(self, client: httpx.AsyncClient, server: Server | None = None) -> None:
        self.client = client
        self.server = server

    async def start(self, **settings: Any) -> EventData:
        """Start a training; the service must accept it."""
        answer = await self.client.post("/trainings", json=settings)
        assert answer.status_code == 201, answer.text
        message: EventData = answer.json()
        assert answer.headers["location"] == f"/trainings/{message['id']}"
        return message

    async def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def answer(self, number: int, epoch: int, go_on: bool) -> httpx.Response:
        """Answer a question."""
        body = {"epoch": epoch, "go_on": go_on}
        return await self.client.post(f"/trainings/{number}/answer", json=body)

    @asynccontextmanager
    async def events(
        self, number: int | None = None, last: str | None = None
    ) -> AsyncIterator[AsyncGenerator[EventData, None]]:
        """Follow one training, or all of them, after the message with the id ``last``."""
        path = "/events" if number is None else f"/trainings/{number}/events"
        headers = {} if last is None else {"Last-Event-ID": last}
        async with self.client.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            reader = _messages(response)
            try:
                yield reader
            finally:
                await reader.aclose()

    async def everything(
        self, number: int | None = None, last: str | None = None
    ) -> list[EventData]:
        """Follow to the end, and return all messages."""
        async with self.events(number, last) as events:
            return [message async for message in events]

    async def until(self, number: int, kind: str) -> EventData:
        """Follow a training to a message of this kind; return it."""
        async with self.events(number) as events:
            return await first(events, kind)


async def first(events: AsyncIterator[EventData], kind: str) -> EventData:
    """Return the next message of this kind."""
    async for message in events:
        if message["kind"] == kind:
            return message
    raise AssertionError(f"the stream ended without {kind}")


async def _messages(response: httpx.Response) -> AsyncGenerator[EventData, None]:
    """Read server-sent events; an id becomes the key ``"sse_id"`` of the message."""
    number: str | None = None
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            number = value
        elif field == "data":
            yield {**json.loads(value), **({} if number is None else {"sse_id": number})}
            number = None
        else:
            assert field in ("", "retry"), line


class _ObservedServer(Server):
    """A server that sets an event when it has started."""

    def set_when_started(self, has_started: anyio.Event) -> None:
        self._has_started = has_started

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._has_started.set()


@asynccontextmanager
async def run_service(
    backend: BackendName = "thread",
    max_concurrent: int | None = None,
    *,
    save_path: Path | None = None,
    answer_seconds: float | None = 120.0,
) -> AsyncIterator[Service]:
    """Run the real server in this event loop, and end it as a signal would.

    ``save_path`` is a directory of its own by default.
    """
    with TemporaryDirectory() as directory:
        options = Options(
            save_path=save_path or Path(directory),
            backend=backend,
            at_once=max_concurrent,
            answer_seconds=answer_seconds,
        )
        async with _run_server(make_server(options, port=0, log_level="warning")) as service:
            yield service


@asynccontextmanager
async def _run_server(made: Server) -> AsyncIterator[Service]:
    server = _ObservedServer(made.config)
    has_started = anyio.Event()
    server.set_when_started(has_started)
    serve = asyncio.create_task(server.serve())
    try:
        await has_started.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        async with _client(port) as client:
            yield Service(client, server)
    finally:
        server.should_exit = True
        await serve


@contextmanager
def run_service_process(save_path: Path, *arguments: str) -> Iterator[tuple[Program, int]]:
    """Run the service as a program; yield the process and its port."""
    command = [str(EXAMPLES / "service"), "--port", "0", "--save-path", str(save_path), *arguments]
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    reading, writing = os.pipe()
    with open(reading) as printed:
        try:
            program = Program(command, environment=environment, stdout=writing, stderr=writing)
        finally:
            os.close(writing)
        program.stdout = printed
        with program:
            try:
                for line in printed:
                    if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                        yield program, int(found[1])
                        break
                else:
                    raise AssertionError(f"the service ended with {program.wait()}")
            finally:
                program.kill()


@asynccontextmanager
async def connect_to_service(port: int) -> AsyncIterator[Service]:
    """Yield a client of a service in another process."""
    async with _client(port) as client:
        yield Service(client)


def _client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=HANG_TIMEOUT, trust_env=False
    )
