"""``fitloop plot``: draws a metric of logged runs to an image file.

Owns the choice of the runs, and the file. `fitloop._plotting` owns the look of a plot.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from fitloop._cli.common import print_line, run_directories, short_names
from fitloop._errors import CheckpointError, ConfigurationError, quoted_list
from fitloop._metrics.history import History
from fitloop._plotting.draw import new_figure, plain_text, plot_selections
from fitloop._plotting.selection import RunSelection
from fitloop._runner.records import best_runs
from fitloop._storage.durable import LOG_NAME, reason, write_file
from fitloop._storage.metric_log import read_log, read_metrics

MAX_DOTS = 10_000
"""of a side; more takes gigabytes of memory, and matplotlib refuses 65536 or more"""

ABOUT = """\
Draw a metric of runs that keep a log (fit(checkpoint=...) or save_to_disk=True), even while they
train. One run is drawn with train and valid; several are compared, named by their jobs or
directories. A directory with many runs in it stands for all of them."""

EXAMPLES = """\
  fitloop plot runs/a loss                         writes loss.png
  fitloop plot runs/a runs/b accuracy -o both.svg
  fitloop plot runs loss --phase valid --top 5     the validations of the five best jobs
  fitloop plot runs accuracy --title "learning rates" --size 10x4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="the save_path of a run, or a directory with several",
    )
    parser.add_argument("metric", metavar="METRIC", help="a name that a stage function returned")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="OUT",
        help="the image file, replaced if it exists; its suffix sets the format "
        "(default METRIC.png)",
    )
    parser.add_argument(
        "--run",
        type=_run_number,
        metavar="N",
        help="which fit of each trainer, counted from 0, -1 for the last; or 'all', joined end to "
        "end (default the last)",
    )
    parser.add_argument("--phase", choices=("train", "valid"), help="draw only one phase")
    parser.add_argument(
        "--top",
        type=_count,
        metavar="N",
        help="draw only the N runs with the best scores, the best first",
    )
    parser.add_argument("--title", help="text above the plot (default: the name of a single run)")
    parser.add_argument(
        "--size", type=_size, default=(8.0, 5.0), metavar="WxH", help="in inches (default 8x5)"
    )
    parser.add_argument("--dpi", type=_dpi, default=150, help="dots per inch (default 150)")


def _run_number(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number or 'all'") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 1")
    return int(text)


def _size(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+\.?\d*)x(\d+\.?\d*)", text)
    sides = [float(side) for side in match.groups()] if match else []
    if not all(0 < side <= 200 for side in sides) or not sides:
        raise argparse.ArgumentTypeError(f"{text!r}; expected inches such as 8x5, 200 at most")
    return sides[0], sides[1]


def _dpi(text: str) -> int:
    if not text.isdecimal() or not 10 <= int(text) <= 2000:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 10 to 2000")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Draw the plot; return the exit status."""
    out = options.out or Path(re.sub(r"[^\w.=+-]", "_", options.metric) + ".png")
    if max(options.size) * options.dpi > MAX_DOTS:
        raise ConfigurationError(
            f"--size and --dpi make a side of {max(options.size) * options.dpi:.0f} dots; expected "
            f"{MAX_DOTS} at most"
        )
    figure, (ax,) = new_figure(1)
    figure.set_size_inches(*options.size)
    suffixes = sorted(f".{kind}" for kind in figure.canvas.get_supported_filetypes())
    if out.suffix.lower() not in suffixes:
        raise ConfigurationError(
            f"{out} has the suffix {out.suffix!r}; expected one of {quoted_list(suffixes)}"
        )
    histories = _histories(options.directories, options.top)
    try:
        if len(histories) == 1 and options.phase is None:
            next(iter(histories.values())).plot(options.metric, options.run, ax=ax)
        else:
            selections = [
                RunSelection(label, history, options.run) for label, history in histories.items()
            ]
            plot_selections(selections, options.metric, phase=options.phase, ax=ax)
    except IndexError as error:
        raise ConfigurationError(f"--run is {options.run}: {error}") from error
    name = next(iter(histories)) if len(histories) == 1 else ""
    ax.set_title(options.title or plain_text(name))
    _write(figure, out, options.dpi)
    print_line(f"{out}: {options.metric} of {', '.join(histories)}")
    return 0


def _histories(paths: list[Path], top: int | None) -> dict[str, History]:
    """Return the history of each run by its name; only of the ``top`` best ones, best first."""
    logs: dict[str, Path] = {}
    """by their real path, since a run may be given twice, in two ways"""
    for path in paths:
        matches = [path] if path.is_file() else run_directories(path)
        if not matches:
            raise CheckpointError(
                f"{path} holds no log of metrics; expected the save_path of a run with "
                "checkpoint= or save_to_disk=True, or a directory with such in it"
            )
        for log in matches:
            logs.setdefault(os.path.realpath(log), log)
    # A log that is given as a file has the name of its directory.
    directories = [log.parent if log.name == LOG_NAME else log for log in logs.values()]
    named = zip(short_names(directories), logs.values(), strict=True)
    if top is None:
        return {name: read_metrics(log) for name, log in named}
    runs = [(name, read_log(log)) for name, log in named]
    return {name: run.history for name, run in best_runs(runs)[:top]}


def _write(figure: Any, out: Path, dpi: int) -> None:
    def write(_path: Path, descriptor: int) -> None:
        with open(descriptor, "wb", closefd=False) as file:
            try:
                figure.savefig(file, format=out.suffix[1:].lower(), dpi=dpi)
            except (RuntimeError, ValueError) as error:  # for example, LaTeX is not installed
                raise ConfigurationError(f"{out} cannot be drawn: {error}") from error

    try:
        write_file(out, write, overwrite=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {reason(error)}") from error
