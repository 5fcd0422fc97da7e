"""Paths that are given in public calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import trainer

from fitloop import CheckpointError, ConfigurationError, Runner, live_plot
from fitloop.loggers import CSV, JSONLines

NO_PATH = ["a\0b", "a\ud800b", b"bytes", 3]
CALLS: dict[str, Callable[[Any], object]] = {
    "trainer": lambda path: trainer(save_path=path),
    "runner": lambda path: Runner(save_path=path),
    "lines": lambda path: JSONLines(path),
    "table": lambda path: CSV(path),
    "plot": lambda path: live_plot(path=path),
}


@pytest.mark.parametrize("path", NO_PATH, ids=ascii)
@pytest.mark.parametrize("name", CALLS)
def test_path_when_no_file_can_have_it_then_is_refused(name: str, path: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"path is .*; expected"):
        CALLS[name](path)


@pytest.mark.parametrize("path", NO_PATH, ids=ascii)
async def test_path_of_a_call_when_no_file_can_have_it_then_is_refused(path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"path is .*; expected"):
        await trainer().save("state", path)


async def test_relative_path_when_the_working_directory_was_removed_then_the_use_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = tmp_path / "removed"
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    made = trainer(save_path="run")
    await made.fit(1, verbose=False)
    with pytest.raises(CheckpointError, match=r"run/state\.msgpack .* No such file"):
        await made.save("state")
    with pytest.raises(CheckpointError, match=r"a/state\.msgpack .* No such file"):
        await made.save("state", "a")
    with pytest.raises(CheckpointError, match="runs cannot be written to: No such file"):
        async with Runner(1, save_path="runs"):
            pass
    JSONLines("logs.jsonl")
    live_plot(path="plot.png")
