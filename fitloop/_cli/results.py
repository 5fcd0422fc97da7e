"""``fitloop results``: prints the jobs of a sweep as a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fitloop._arguments import expect
from fitloop._cli.common import print_line
from fitloop._display.console import printed_width
from fitloop._errors import CheckpointError, quoted_list
from fitloop._format import json_ready
from fitloop._runner.results import read_results

ABOUT = """\
Print a table of the jobs of a Runner: their arguments, status, epochs and best score, the best job
first. RUNS is the save_path of the Runner. The time is that of the training, since it was last
started. On a terminal that is too narrow, the last arguments are left out, then the time. The
command only reads files, so it also shows a sweep that goes on, or that was killed."""

EXAMPLES = """\
  fitloop results runs
  fitloop results runs --sort lr                   by an argument of the jobs' function
  fitloop results runs --csv > results.csv         with the last value of every metric"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the save_path of a Runner")
    parser.add_argument(
        "--sort",
        default="score",
        metavar="COLUMN",
        help="score (default), name, status, epochs, time, or an argument of the jobs",
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print CSV")
    formats.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the table; return the exit status."""
    results = read_results(options.runs)
    if not results:
        raise CheckpointError(
            f"{options.runs} holds no jobs; expected the save_path of a Runner, which has a "
            "directory for each job that has started"
        )
    columns = results.columns()
    expect(options.sort in columns, "--sort", options.sort, f"one of {quoted_list(columns)}")
    results = results.sorted(options.sort)
    if options.csv:
        print_line(results.to_csv().removesuffix("\n"))
    elif options.json:
        print_line(json.dumps(json_ready(results.rows()), indent=1))
    else:
        print_line(results.text(printed_width(), sort=options.sort))
    return 0
