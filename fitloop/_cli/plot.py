"""``fitloop plot``: a metric of logged runs as an image file.

Owns whose metrics are drawn, and the file. What a plot looks like is `_plot`'s.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from fitloop._cli.common import Commands, add_command, labels, run_directories, say
from fitloop._errors import CheckpointError, ConfigurationError, quoted_list
from fitloop._metrics.history import History
from fitloop._storage.durable import reason, write_file
from fitloop._storage.metric_log import LOG_NAME, read_metrics

MOST_DOTS = 10_000
"""of a side; more takes gigabytes, and from 65536 it cannot be drawn"""

_ABOUT = """\
Draw a metric of runs that keep a log (fit(checkpoint=...) or save_to_disk=True), also while they
go on. Of one run it shows train and valid; several are compared, named by their directories.
A directory with many runs in it stands for all of them."""

_EXAMPLES = """\
  fitloop plot runs/a loss                         writes loss.png
  fitloop plot runs/a runs/b accuracy -o both.svg
  fitloop plot runs accuracy --title "learning rates" --size 10x4"""


def add_plot(commands: Commands) -> None:
    """Add the command ``plot``."""
    does = "draw a metric of one run, or of several to compare them"
    parser = add_command(commands, "plot", does, _ABOUT, _EXAMPLES, _plot)
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="RUN_DIR", help="a save_path, or many in one"
    )
    parser.add_argument("metric", metavar="METRIC", help="a name that a stage function returned")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        help="the image, which is replaced if it is there; its suffix says the format "
        "(default METRIC.png)",
    )
    parser.add_argument(
        "--run",
        type=_run,
        metavar="N",
        help="which fit of each trainer, counted from 0, -1 for the last; or 'all', joined end to "
        "end (default the last)",
    )
    parser.add_argument("--title", help="above the plot")
    parser.add_argument(
        "--size", type=_size, default=(8.0, 5.0), metavar="WxH", help="in inches (default 8x5)"
    )
    parser.add_argument("--dpi", type=_dpi, default=150, help="dots an inch (default 150)")


def _run(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number or 'all'") from None


def _size(text: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d+\.?\d*)x(\d+\.?\d*)", text)
    sides = [float(side) for side in found.groups()] if found else []
    if not all(0 < side <= 200 for side in sides) or not sides:
        raise argparse.ArgumentTypeError(f"{text!r}; expected inches such as 8x5, 200 at most")
    return sides[0], sides[1]


def _dpi(text: str) -> int:
    if not text.isdecimal() or not 10 <= int(text) <= 2000:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 10 to 2000")
    return int(text)


def _plot(given: argparse.Namespace) -> int:
    from fitloop._plotting.draw import new_figure, plot_comparison

    out = given.out or Path(re.sub(r"[^\w.=+-]", "_", given.metric) + ".png")
    if max(given.size) * given.dpi > MOST_DOTS:
        raise ConfigurationError(
            f"--size and --dpi make a side of {max(given.size) * given.dpi:.0f} dots; expected "
            f"{MOST_DOTS} at most"
        )
    figure, (ax,) = new_figure(1)
    figure.set_size_inches(*given.size)
    suffixes = sorted(f".{kind}" for kind in figure.canvas.get_supported_filetypes())
    if out.suffix.lower() not in suffixes:
        raise ConfigurationError(
            f"{out} has the suffix {out.suffix!r}; expected one of {quoted_list(suffixes)}"
        )
    histories = _histories(given.directories)
    try:
        if len(histories) == 1:
            next(iter(histories.values())).plot(given.metric, given.run, ax=ax)
        else:
            plot_comparison(histories, given.metric, given.run, ax=ax)
    except IndexError as error:
        raise ConfigurationError(f"--run is {given.run}: {error}") from error
    if given.title:
        ax.set_title(given.title)
    _write(figure, out, given.dpi)
    say(f"{out}: {given.metric} of {', '.join(histories)}")
    return 0


def _histories(paths: list[Path]) -> dict[str, History]:
    directories: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else run_directories(path)
        if not found:
            raise CheckpointError(
                f"{path} holds no log of metrics; expected the save_path of a run with "
                "checkpoint= or save_to_disk=True, or a directory with such in it"
            )
        directories += found
    once: dict[str, Path] = {}
    for directory in directories:  # it may be given twice, in two ways
        once.setdefault(os.path.realpath(directory), directory)
    directories = list(once.values())
    # A log that is given as a file is called like its directory.
    owners = [path.parent if path.name == LOG_NAME else path for path in directories]
    named = zip(labels(owners), directories, strict=True)
    return {label: read_metrics(directory) for label, directory in named}


def _write(figure: Any, out: Path, dpi: int) -> None:
    def write(_path: Path, descriptor: int) -> None:
        with open(descriptor, "wb", closefd=False) as file:
            try:
                figure.savefig(file, format=out.suffix[1:].lower(), dpi=dpi)
            except (RuntimeError, ValueError) as error:  # such as LaTeX that is not installed
                raise ConfigurationError(f"{out} cannot be drawn: {error}") from error

    try:
        write_file(out, write, overwrite=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {reason(error)}") from error
