"""A Jupyter kernel, with the client that a notebook is: message by message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import KernelManager

from support.event_loops import HANG_TIMEOUT
from support.notebooks import ROOT, kernel_environment

SETUP = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import asyncio, contextlib, io, threading
from support.models import trainer

def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fitloop")]
"""


@dataclass
class Cell:
    """The result of a cell; later output of earlier cells goes to those cells."""

    status: str = ""
    error: str = ""
    """name of the exception that it raised"""
    traceback: str = ""
    """the text that shows it"""
    shows: list[str] = field(default_factory=list)
    """HTML of each display of the cell when it was made"""
    updates: list[tuple[str, str]] = field(default_factory=list)
    """(id of the display, its HTML) of each update"""
    pages: dict[str, dict[str, str]] = field(default_factory=dict)
    """id of each display -> its present content"""
    printed: dict[str, str] = field(default_factory=lambda: {"stdout": "", "stderr": ""})
    result: dict[str, str] = field(default_factory=dict)

    def add_message(self, kind: str, content: dict[str, Any]) -> None:
        match kind:
            case "display_data" | "update_display_data":
                name, data = content["transient"]["display_id"], content["data"]
                self.pages[name] = data
                if kind == "display_data":
                    self.shows.append(data["text/html"])
                else:
                    self.updates.append((name, data["text/html"]))
            case "stream":
                self.printed[content["name"]] += content["text"]
            case "execute_result":
                self.result = content["data"]
            case "error":
                self.error = content["ename"]
                self.traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))


def shows_an_epoch(content: dict[str, Any]) -> bool:
    html: str = content["data"]["text/html"]
    return html.count("<tr>") > 1  # below the names of the columns


class Kernel:
    """Runs cells one after the other."""

    def __init__(self, manager: KernelManager, client: Any) -> None:
        self._manager, self._client = manager, client
        self._cells: dict[str, Cell] = {}

    def run(self, code: str, *, interrupt: bool = False) -> Cell:
        """Run a cell to its end; with ``interrupt``, interrupt it when an epoch is displayed."""
        identity = self._client.execute(code)
        cell = self._cells[identity] = Cell()
        while True:
            message = self._client.get_iopub_msg(timeout=HANG_TIMEOUT)
            kind, content = message["msg_type"], message["content"]
            parent = message["parent_header"].get("msg_id")
            if parent in self._cells:
                self._cells[parent].add_message(kind, content)
            if interrupt and kind == "update_display_data" and shows_an_epoch(content):
                self._manager.interrupt_kernel()
                interrupt = False
            if parent == identity and kind == "status" and content["execution_state"] == "idle":
                break
        cell.status = self._reply(identity)["status"]
        return cell

    def _reply(self, identity: str) -> Any:
        """Return the reply to a request; a busy kernel may first reply to earlier requests."""
        while True:
            message = self._client.get_shell_msg(timeout=HANG_TIMEOUT)
            if message["parent_header"].get("msg_id") == identity:
                return message["content"]


@contextmanager
def start_kernel() -> Iterator[Kernel]:
    """Start a kernel, set it up, and end it afterwards."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=kernel_environment())
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=HANG_TIMEOUT)
        kernel = Kernel(manager, client)
        assert kernel.run(SETUP).error == ""
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.context.destroy()
