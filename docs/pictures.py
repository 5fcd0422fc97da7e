"""Make the pictures of the README: three trainers in a terminal, the curves of one, the service.

    make pictures                    (or: python docs/pictures.py)

All are of real trainings on scikit-learn's digits. The terminal is one that is emulated, of 96
columns; the picture is drawn when the question is shown. That of the web service is a screenshot
by Chromium.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pexpect
import pyte
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

COLUMNS, ROWS = 96, 19
WAIT = 120
COLORS = {"default": "#d8dee4", "cyan": "#39c5cf"}
BACKGROUND, PALE = "#0d1117", "#3d444d"


async def train_three() -> None:
    """Train three models at once; the smallest asks after two epochs."""
    import digits

    def trainer(name: str, lr: float) -> Any:
        torch.manual_seed(0)
        model = digits.make_model()
        train_dl, valid_dl, _test_dl = digits.make_loaders()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        return digits.FitLoop(
            model,
            optimizer,
            torch.nn.CrossEntropyLoss(),
            train_dl=train_dl,
            valid_dl=valid_dl,
            name=name,
        )

    torch.set_num_threads(1)
    await asyncio.gather(
        trainer("lr=0.01", 1e-2).fit(8, continue_loop=2),
        trainer("lr=0.003", 3e-3).fit(8),
        trainer("lr=0.0003", 3e-4).fit(8),
    )


def screen_of_three() -> pyte.Screen:
    """Return the terminal as it is when the question is shown."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("CI", None)
    child: Any = pexpect.spawn(  # type: ignore[no-untyped-call]
        sys.executable,
        [__file__, "--train"],
        env=environment,
        dimensions=(ROWS, COLUMNS),
        encoding="utf-8",
        timeout=WAIT,
    )
    while not any("continue loop" in line for line in screen.display) or not all(
        f"lr={lr} " in screen.display[row] for row, lr in ((-2, "0.003"), (-1, "0.0003"))
    ):
        stream.feed(child.read_nonblocking(4096, timeout=WAIT))
    child.close(force=True)
    return screen


def draw_screen(screen: pyte.Screen, path: Path) -> None:
    """Draw a screen, character by character."""
    width, height = 0.085, 0.19
    figure = Figure(figsize=(COLUMNS * width + 0.3, ROWS * height + 0.3), facecolor=BACKGROUND)
    for row in range(ROWS):
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            if not cell.data.strip():
                continue
            pale = cell.data == "─"
            figure.text(
                (column * width + 0.15) / figure.get_figwidth(),
                1 - ((row + 0.8) * height + 0.15) / figure.get_figheight(),
                cell.data,
                family="DejaVu Sans Mono",
                fontsize=10.2,
                color=PALE if pale else COLORS.get(cell.fg, COLORS["default"]),
            )
    figure.savefig(path, dpi=110)


def draw_curves(path: Path) -> None:
    """Train the demo's model and draw its loss and accuracy."""
    import digits

    trainer = digits.make_trainer()
    asyncio.run(trainer.fit(epochs=12, verbose=False))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for name, axes in zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True):
        trainer.plot(name, ax=axes)
    figure.savefig(path, dpi=110)


SERVICE_TRAININGS = [
    {"name": "baseline", "epochs": 20},
    {"name": "too hot", "model": "medium", "lr": 900},
    {"name": "convolutions", "model": "large", "lr": 0.01, "epochs": 300},
    {"name": "wide", "model": "medium", "lr": 0.03, "epochs": 24, "ask_every": 12},
    {"name": "wide", "model": "medium", "lr": 0.01, "epochs": 24},
]


def draw_service(path: Path) -> None:
    """Take a picture of the page of the example service while a training asks."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit(f"{path.name} needs Chromium, and there is none")
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(HERE.parent / "examples" / "service"), "--port", "0"]
        command += ["--save-path", directory, "--at-once", "2"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
            assert service.stderr is not None
            printed = (re.search(r"http://[\d.:]+", line) for line in service.stderr)
            url = next(found[0] for found in printed if found)
            for settings in SERVICE_TRAININGS:
                _request(f"{url}/trainings", settings)
            while not _request(f"{url}/trainings/4")["question"]:
                time.sleep(0.1)
            shot = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1240,930"]
            shot += [f"--screenshot={path}", f"{url}/#/4"]
            subprocess.run([browser, *shot], check=True, stderr=subprocess.DEVNULL)
            service.terminate()


def _request(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT) as answer:
        return json.load(answer)


if __name__ == "__main__":
    if sys.argv[1:] == ["--train"]:
        asyncio.run(train_three())
    else:
        draw_screen(screen_of_three(), HERE / "terminal.png")
        draw_curves(HERE / "curves.png")
        draw_service(HERE / "service.png")
