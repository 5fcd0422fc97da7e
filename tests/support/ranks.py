"""Programs that run as the ranks of one training, as ``torchrun`` starts them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from support.programs import ROOT, Program, started

LONGEST = 200.0
"""seconds after which a rank hangs"""


def new_store() -> TCPStore:
    """Return a store in which ranks find each other.

    As with torchrun, it is not in a rank, so that it outlives each of them. The first one of a
    process opens files that stay.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started_ranks(module: str, *arguments: str, size: int = 2) -> Iterator[list[Program]]:
    """Start ``python -m module`` on several ranks, and kill those that run at the end."""
    store = new_store()
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    ["-m", module, *arguments],
                    ROOT,
                    {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    whole_exit=True,
                )
            )
            for rank in range(size)
        ]


def run_ranks(module: str, *arguments: str | Path, size: int = 2) -> list[dict[str, Any]]:
    """Run ``python -m module`` on several ranks, and return what each has reported.

    A report is the last line of the output, in JSON, and has ``lines``, those before it, ``status``
    and ``errors``.
    """
    reports = []
    with started_ranks(module, *map(str, arguments), size=size) as programs:
        for program in programs:
            program.stdin.close()
        for program in programs:
            status = program.wait(LONGEST)
            *lines, last = program.stdout.read().splitlines() or [""]
            errors = program.stderr.read()
            report = json.loads(last) if last.startswith("{") else {}
            reports.append({**report, "lines": lines, "status": status, "errors": errors})
    return reports


def end() -> None:
    """End a rank at once, with exit code 0.

    Python and torch take a third of a second to free what they have. `support.rank_ends`, which
    tests how ranks end, does not call this.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def report(**values: Any) -> None:
    """Print the report of a rank."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()
