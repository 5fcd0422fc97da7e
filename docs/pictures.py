"""Make the pictures of the README: three trainers in a terminal, the curves of one, the service.

    make pictures                    (or: python docs/pictures.py)

All are of real trainings on scikit-learn's digits. The terminal is one that is emulated, of 104
columns, and its picture moves. That of the web service is a screenshot by Chromium.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

COLUMNS, ROWS = 104, 19
WAIT = 120
FRAMES_PER_SECOND, READING_SECONDS = 8, 2.5
COLORS = {"default": "#d8dee4", "cyan": "#39c5cf", "green": "#56d364"}
BACKGROUND, PALE = "#0d1117", "#3d444d"


async def train_three() -> None:
    """Train three models at once; one asks after four epochs."""
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
        trainer("lr=0.01", 1e-2).fit(8, continue_loop=4, print_style="line"),
        trainer("lr=0.003", 3e-3).fit(8, print_style="line"),
        trainer("lr=0.0003", 3e-4).fit(8, print_style="line"),
    )


def _training_program() -> Any:
    """Start this program in a terminal that is emulated, where it trains the three."""
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("CI", None)
    return pexpect.spawn(  # type: ignore[no-untyped-call]
        sys.executable,
        [__file__, "--train"],
        env=environment,
        dimensions=(ROWS, COLUMNS),
        encoding="utf-8",
        timeout=WAIT,
    )


def frames_of_three() -> list[Image.Image]:
    """Return pictures of the terminal while the three train; the question is answered."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    child = _training_program()
    frames: list[Image.Image] = []
    begin, asked = time.monotonic(), 0.0
    while True:
        with contextlib.suppress(pexpect.TIMEOUT):
            try:
                stream.feed(child.read_nonblocking(4096, timeout=0.02))
            except pexpect.EOF:
                break
        now = time.monotonic()
        if not any(map(str.strip, screen.display)):  # a still picture shows the first frame
            begin = now
            continue
        if not asked and any("continue loop" in line for line in screen.display):
            asked = now
        if asked and now > asked + READING_SECONDS:
            asked = float("inf")
            child.send("y\r")
        if now - begin >= len(frames) / FRAMES_PER_SECOND:
            frames.append(draw_screen(screen))
    return [*frames, *[draw_screen(screen)] * int(FRAMES_PER_SECOND * READING_SECONDS)]


def draw_screen(screen: pyte.Screen) -> Image.Image:
    """Draw a screen, character by character."""
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), 15)
    width, height, margin = 9, 19, 14
    size = (COLUMNS * width + 2 * margin, ROWS * height + 2 * margin)
    image = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row in range(ROWS):
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            if cell.data.strip():
                pale = cell.data == "\u2500"
                color = PALE if pale else COLORS.get(cell.fg, COLORS["default"])
                place = (margin + column * width, margin + row * height)
                draw.text(place, cell.data, color, font)
    return image


def save_moving(frames: list[Image.Image], path: Path) -> None:
    """Write pictures as one that moves."""
    palette = frames[-1].quantize(32)
    few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = round(1000 / FRAMES_PER_SECOND)
    few[0].save(path, save_all=True, append_images=few[1:], duration=duration, loop=0)


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
        save_moving(frames_of_three(), HERE / "terminal.gif")
        draw_curves(HERE / "curves.png")
        draw_service(HERE / "service.png")
