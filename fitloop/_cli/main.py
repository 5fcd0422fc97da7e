"""The command line, ``fitloop``: its commands, each in a module of its own, and how they fail."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fitloop._cli.bench import add_bench
from fitloop._cli.export import add_export
from fitloop._cli.inspect import add_inspect
from fitloop._cli.plot import add_plot
from fitloop._cli.watch import add_watch
from fitloop._errors import FitLoopError

INTERRUPTED = 130
"""what a shell makes of a command that Ctrl-C ended"""

_EXAMPLES = """\
examples:
  fitloop watch runs                               follow all runs in runs/ as they train
  fitloop plot runs accuracy -o accuracy.png       compare them
  fitloop inspect runs/a                           the last metrics of one
  fitloop bench train.py:make_trainer              what its loop and its loader cost
  fitloop export snapshot-000012.msgpack model.safetensors

`fitloop COMMAND --help` tells all about a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for what cannot be done, 2 for usage."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = given.command(given)
        sys.stdout.flush()
    except FitLoopError as error:
        print(f"fitloop: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough; nor is what is left written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fitloop",
        description="Follow, compare and time what fitloop trains, look into the files it writes,\n"
        "and take weights out of them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (add_watch, add_plot, add_bench, add_inspect, add_export):
        add(commands)
    return parser
