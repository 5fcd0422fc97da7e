"""The programs of the documents: blocks of Python in Markdown, which tests run as they are."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python(?: title=\"(.*?)\")?\n(.*?)^```", re.M | re.S)


class Block(NamedTuple):
    """A block of Python of a document."""

    title: str
    """of a program in another library, the name of the library; else empty or ``"fitloop"``"""
    source: str


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of Python of a document, in their order."""
    return [Block(*found) for found in _BLOCK.findall(path.read_text(encoding="utf-8"))]


def run_blocks(blocks: list[Block], name: str, names: dict[str, Any]) -> None:
    """Run programs one after the other with the same global names, as the cells of a notebook."""
    with asyncio.Runner() as runner:
        for number, block in enumerate(blocks, 1):
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            code = compile(block.source, f"{name}, block {number}", "exec", flags)
            result = eval(code, names)
            if inspect.iscoroutine(result):
                runner.run(result)
