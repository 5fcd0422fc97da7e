"""Make the pictures of the README: a terminal while three trainers run, and the curves of one.

    make pictures                    (or: python docs/pictures.py)

Both are of real trainings on scikit-learn's digits. The terminal is one that is emulated, of 96
columns; the picture is drawn when the question is shown.
"""

from __future__ import annotations

import asyncio
import os
import sys
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


if __name__ == "__main__":
    if sys.argv[1:] == ["--train"]:
        asyncio.run(train_three())
    else:
        draw_screen(screen_of_three(), HERE / "terminal.png")
        draw_curves(HERE / "curves.png")
