"""The routes of the service, as a Starlette application.

    GET    /                        the page; the training with the number 3 is shown at /#/3
    GET    /page/...                its script and style
    GET    /trainings               all trainings
    POST   /trainings               start one: name, model, lr, epochs, ask_every, all optional
    GET    /trainings/{id}          one, with its metrics so far
    DELETE /trainings/{id}          cancel it; it ends at a batch boundary
    POST   /trainings/{id}/resume   continue it, when it was cancelled or has failed
    POST   /trainings/{id}/answer   {"epoch": 4, "go_on": true}, to the question after that epoch
    GET    /trainings/{id}/weights  its weights as a file, when it is done
    GET    /trainings/{id}/events   its events from the first to the last, as server-sent events
    GET    /events                  the same of all trainings
    GET    /status                  the numbers of trainings and of readers of events

A request that cannot be fulfilled gets ``{"problems": [{"field": ..., "message": ...}]}``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Send

from service.feed import Feed
from service.protection import Protection
from service.settings import BadRequestError, Problem, as_text, read_settings, refusal
from service.trainings import Options, Trainings, open_trainings

PAGE = Path(__file__).with_name("page")
MAX_BODY = 64 * 1024
"""bytes"""
BODY_SECONDS = 10.0
"""seconds for a whole body to come"""


def make_app(options: Options, hosts: Sequence[str] = ()) -> Starlette:
    """Return the application; its trainings run while its lifespan does.

    Args:
        options: how it trains.
        hosts: host names of the service besides ``localhost`` and IP addresses.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_trainings(options) as trainings:
            app.state.trainings = trainings
            yield

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", page),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/trainings", show_all),
            Route("/trainings", start, methods=["POST"]),
            Route("/trainings/{id}", show),
            Route("/trainings/{id}", cancel, methods=["DELETE"]),
            Route("/trainings/{id}/resume", resume, methods=["POST"]),
            Route("/trainings/{id}/answer", answer, methods=["POST"]),
            Route("/trainings/{id}/weights", weights),
            Route("/trainings/{id}/events", events),
            Route("/events", all_events),
            Route("/status", status),
        ],
        exception_handlers={BadRequestError: refuse, HTTPException: refuse_route},
        middleware=[Middleware(Protection, hosts=hosts)],
    )
    app.state.backend = options.backend
    return app


# -- trainings -------------------------------------------------------------------------------------


async def start(request: Request) -> Response:
    settings = read_settings(await read_json(request))
    training = await trainings_of(request).submit(settings)
    location = {"Location": f"/trainings/{training.number}"}
    return JSONResponse(training.as_dict(), 201, headers=location)


async def show_all(request: Request) -> Response:
    return JSONResponse([training.as_dict() for training in trainings_of(request)])


async def show(request: Request) -> Response:
    training = trainings_of(request).get(request.path_params["id"])
    return JSONResponse(training.as_dict_with_metrics())


async def cancel(request: Request) -> Response:
    trainings = trainings_of(request)
    training = trainings.get(request.path_params["id"])
    trainings.cancel(training)
    return JSONResponse(training.as_dict(), 202)


async def resume(request: Request) -> Response:
    training = await trainings_of(request).resume(request.path_params["id"])
    return JSONResponse(training.as_dict(), 202)


async def answer(request: Request) -> Response:
    trainings = trainings_of(request)
    training = trainings.get(request.path_params["id"])
    body = await read_json(request)
    match body:
        case {"epoch": int(epoch), "go_on": bool(go_on)} if len(body) == 2:
            trainings.answer(training, epoch, go_on)
        case _:
            raise refusal(
                422,
                f"the body is {as_text(body)}; expected an object with the epoch of the question "
                'and the answer, such as {"epoch": 4, "go_on": true}',
            )
    return JSONResponse(training.as_dict(), 202)


async def weights(request: Request) -> Response:
    trainings = trainings_of(request)
    training = trainings.get(request.path_params["id"])
    file = await trainings.weights(training)
    return FileResponse(file, filename=f"training-{training.number}{file.suffix}")


async def status(request: Request) -> Response:
    trainings = trainings_of(request)
    feeds = [trainings.feed, *(training.feed for training in trainings)]
    report = {
        "backend": request.app.state.backend,
        "trainings": Counter(training.status for training in trainings),
        "readers": sum(feed.readers for feed in feeds),
        "dropped_events": trainings.dropped,
    }
    return JSONResponse(report)


# -- events ----------------------------------------------------------------------------------------


class EventResponse(StreamingResponse):
    """Server-sent events; stops reading its feed as soon as the client is gone."""

    def __init__(self, feed: Feed, position: int) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self._events = feed.read(position)
        super().__init__(self._events, headers=headers, media_type="text/event-stream")

    async def stream_response(self, send: Send) -> None:
        """Send until the feed ends, or the client is gone."""
        async with aclosing(self._events):
            await super().stream_response(send)


async def events(request: Request) -> Response:
    training = trainings_of(request).get(request.path_params["id"])
    return follow(request, training.feed)


async def all_events(request: Request) -> Response:
    return follow(request, trainings_of(request).feed)


def follow(request: Request, feed: Feed) -> Response:
    """Send the events after the last one that the client had; 204 stops a client that had all."""
    position = feed.position_after(request.headers.get("last-event-id"))
    return Response(status_code=204) if feed.is_read_by(position) else EventResponse(feed, position)


# -- helpers ---------------------------------------------------------------------------------------


async def page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html")


def trainings_of(request: Request) -> Trainings:
    trainings: Trainings = request.app.state.trainings
    return trainings


async def read_json(request: Request) -> Any:
    """Return the decoded body. Raises BadRequestError if it is no JSON, too long or too slow.

    The content type must be JSON: a foreign web page can only send requests with other types.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise refusal(
            415, f"Content-Type is {as_text(kind)}; expected application/json; send that header"
        )
    body = b""
    try:
        with anyio.move_on_after(BODY_SECONDS) as reading:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise refusal(413, f"the body is longer than {MAX_BODY} bytes; send less")
    except ClientDisconnect as error:  # nobody reads the answer
        raise refusal(400, "the connection ended before the body; send it whole") from error
    if reading.cancelled_caught:
        message = f"the body has not come within {BODY_SECONDS:g} seconds; send it at once"
        raise refusal(408, message)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # the latter if it is nested too deeply
        text = body[:60].decode(errors="replace")
        raise refusal(400, f"the body is {text!r}; expected JSON ({error})") from error


async def refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequestError)
    return problems(error.status, error.problems)


async def refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see the routes in app.py"
    response = problems(error.status_code, [Problem(field="", message=message)])
    response.headers.update(error.headers or {})
    return response


def problems(status_code: int, items: list[Problem]) -> Response:
    return JSONResponse({"problems": items}, status_code)
