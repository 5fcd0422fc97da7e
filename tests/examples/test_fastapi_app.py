"""The FastAPI app of the examples, by a real server and a real client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from support.event_loops import HANG_TIMEOUT
from support.example_service import EXAMPLES  # finds the example, too

# isort: split
from fastapi_app import app

pytestmark = pytest.mark.usefixtures("anyio_backend")


@pytest.fixture
def anyio_backend() -> str:
    """uvicorn is for asyncio only."""
    return "asyncio"


class StartedServer(uvicorn.Server):
    """A server that tells when it has started."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
        self.has_started = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


@asynccontextmanager
async def client_of_app() -> AsyncIterator[httpx.AsyncClient]:
    server = StartedServer()
    serve = asyncio.create_task(server.serve())
    try:
        await server.has_started.wait()
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=HANG_TIMEOUT, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        await serve


async def follow(client: httpx.AsyncClient, name: str) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("GET", f"/trainings/{name}/events") as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


async def test_app_when_used_then_starts_follows_cancels_and_ends_with_a_training_running() -> None:
    async with client_of_app() as client:
        started = await client.post("/trainings?epochs=3")
        assert started.status_code == 201
        name = started.json()["name"]
        events = [event async for event in follow(client, name)]
        assert [event["kind"] for event in events][-2:] == ["run_ended", "job_ended"]
        assert events[-1]["status"] == "done"
        assert [event async for event in follow(client, name)] == []  # it is over

        endless = (await client.post("/trainings?epochs=1000")).json()["name"]
        seen = []
        async for event in follow(client, endless):
            seen.append(event["kind"])
            if event["kind"] == "phase_started" and "cancelled" not in seen:
                assert (await client.delete(f"/trainings/{endless}")).status_code == 202
                seen.append("cancelled")
        assert event["status"] == "cancelled"

        for answer, status in (
            (await client.post("/trainings?epochs=0"), 422),
            (await client.delete("/trainings/none"), 404),
            (await client.get("/trainings/none/events"), 404),
        ):
            assert answer.status_code == status, answer.text
        await client.post("/trainings?epochs=1000")


def test_app_when_read_then_is_short_and_that_of_the_guide() -> None:
    program = (EXAMPLES / "fastapi_app.py").read_text()
    assert len([line for line in program.splitlines() if line]) <= 40
    guide = (EXAMPLES.parent / "docs" / "guides" / "web-apps.md").read_text()
    assert f'```python title="examples/fastapi_app.py"\n{program}```\n' in guide
