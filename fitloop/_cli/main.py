"""The command line, ``fitloop``: finds a command, runs it, and reports failures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from fitloop import __version__
from fitloop._errors import FitLoopError
from fitloop._format import printable
from fitloop._storage.durable import reason

INTERRUPTED = 130
"""exit status of a command that Ctrl-C ended, as shells report it"""

COMMANDS = {
    "watch": "follow runs live from another terminal",
    "results": "show the jobs of a sweep as a table, the best first",
    "plot": "draw a metric of one run, or of several to compare them",
    "bench": "time a trainer's loop and loader, and advise changes",
    "inspect": "show the contents of a directory or file that fitloop wrote",
    "export": "write the weights of a snapshot or a weights file to another file",
    "worker": "train one job of a program on another machine; started by launchers",
}
"""the name of each command, which is its module in this package, and its line in ``--help``"""

_EXAMPLES = """\
examples:
  fitloop watch runs                               follow all runs in runs/ as they train
  fitloop results runs                             the table of their results
  fitloop plot runs accuracy -o accuracy.png       compare them
  fitloop inspect runs/a                           the progress and the files of one
  fitloop bench train.py:make_trainer              the cost of its loop and its loader
  fitloop export snapshot-000012.msgpack model.safetensors

`fitloop COMMAND --help` explains a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a failure, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(arguments[0] if arguments else "")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = options.command(options)
        sys.stdout.flush()
    except FitLoopError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has gone; do not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a path that is too long
        return _fail(f"{os.fsdecode(error.filename or 'a file')} cannot be used: {reason(error)}")
    except MemoryError:
        return _fail("there is not enough memory")
    return status


def _fail(message: str) -> int:
    print(f"fitloop: {printable(message)}", file=sys.stderr)  # noqa: T201
    return 1


def _parser(command: str) -> argparse.ArgumentParser:
    """Return a parser that knows all commands by name, and the arguments of ``command``."""
    parser = argparse.ArgumentParser(
        prog="fitloop",
        description="Follow, compare and time trainings, look into the files of fitloop, and take\n"
        "weights out of them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fitloop {__version__}")
    parser.set_defaults(command=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            module = import_module(f"fitloop._cli.{name}")
            subparser.description = module.ABOUT
            subparser.epilog = f"examples:\n{module.EXAMPLES}"
            module.add_arguments(subparser)
            subparser.set_defaults(command=module.run)
    return parser
