"""The command line of the service, and how the server ends."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import socket

import anyio
import uvicorn

from fitloop import CheckpointError, Runner
from service.app import make_app
from service.settings import Settings
from service.trainers import make_trainer
from service.trainings import BackendName, Options, Trainings

LAST_SECONDS = 3
"""seconds for readers that do not read, when the server ends"""


class Server(uvicorn.Server):
    """Ends trainings and streams before it waits for connections to close.

    uvicorn waits for connections before it ends the lifespan of an application: an open stream of
    events would make it wait for ever.
    """

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Interrupt the trainings at a batch boundary, then the streams, then the server."""
        trainings: Trainings = self.config.app.state.trainings  # type: ignore[union-attr]
        await trainings.close()
        await super().shutdown(sockets)


def make_server(
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    hosts: Sequence[str] = (),
) -> Server:
    """Return the server; with port 0 it takes a free port."""
    config = uvicorn.Config(
        make_app(options, [host, *hosts]),
        host=host,
        port=port,
        log_level=log_level,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return Server(config)


def warm_up(backend: BackendName) -> None:
    """Do slow work now that would delay all requests for some tenths of a second later.

    The first optimizer of a process makes torch import some 800 modules. And a full garbage
    collection holds the interpreter's lock while it visits all objects; the objects of the imports
    are never garbage, so later collections leave them out.
    """
    if backend == "thread":
        make_trainer(Settings())
    gc.collect()
    gc.freeze()


async def check_save_path(save_path: Path) -> None:
    """Raise CheckpointError if the directory is in use, or cannot be written to.

    uvicorn would print a long traceback for that.
    """
    async with Runner(save_path=save_path):
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="service", description="Trainings behind a web service.")
    parser.add_argument("--backend", choices=["thread", "process"], default="thread")
    parser.add_argument("--at-once", type=int, help="trainings at a time; default: one a core")
    parser.add_argument(
        "--save-path",
        type=Path,
        default=Path("service_trainings"),
        metavar="DIR",
        help="directory of the trainings, which a restart continues; default: service_trainings",
    )
    parser.add_argument(
        "--answer-seconds",
        type=float,
        default=120,
        metavar="N",
        help="seconds after which a question without an answer goes on; 0: no limit; default: 120",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="up to 65535; 0 takes a free one")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name by which browsers reach the service, besides localhost and IP addresses",
    )
    options = parser.parse_args(arguments)
    if options.at_once is not None and options.at_once < 1:
        parser.error(
            f"--at-once is {options.at_once}; expected 1 or more; leave it out for the cores"
        )
    if not 0 <= options.answer_seconds < 1e9:  # nan is not, either
        parser.error(
            f"--answer-seconds is {options.answer_seconds}; expected a number of seconds; 0 never "
            "stops waiting"
        )
    if not 0 <= options.port <= 65535:
        parser.error(
            f"--port is {options.port}; expected 0 to 65535; 0 takes a free one, which it prints"
        )
    try:
        anyio.run(check_save_path, options.save_path)
    except CheckpointError as error:
        parser.error(f"--save-path: {error}")
    server = make_server(
        Options(
            save_path=options.save_path,
            backend=options.backend,
            at_once=options.at_once,
            answer_seconds=options.answer_seconds or None,
        ),
        host=options.host,
        port=options.port,
        hosts=options.allow_host,
    )
    warm_up(options.backend)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean end
        server.run()
    if not server.started:
        sys.exit(1)
