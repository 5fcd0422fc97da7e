"""``fitloop bench``: the benchmark of a trainer that a script or a module makes.

Finds the function that makes the trainer, and prints the report as text or JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from inspect import isclass, signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fitloop._arguments import expect
from fitloop._blocks import contextmanager
from fitloop._cli.common import print_line
from fitloop._errors import ConfigurationError, quoted_list

if TYPE_CHECKING:
    from fitloop._bench.report import BenchReport

ABOUT = """\
Time the train phase of your own trainer, and advise changes. The report shows the cost of
fitloop's loop against a hand-written one, whether the loader keeps up with the steps, and the gain
of loading ahead. Model, optimizers, random generators and files are unchanged afterwards. It takes
some 15 seconds.

TARGET is a function that returns a FitLoop, in a module that can be imported from here or in a
script: package.module:function or script.py:function, plain or async."""

EXAMPLES = """\
  fitloop bench train.py:make_trainer
  fitloop bench project.training:make_trainer --arg lr=0.1 --arg size=large
  fitloop bench train.py:make_trainer --seconds 60 --json > before.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("target", metavar="TARGET", help="MODULE:FUNCTION or SCRIPT.py:FUNCTION")
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        type=_argument,
        metavar="NAME=VALUE",
        help="an argument for the function, as a Python value or else a string; may be repeated",
    )
    parser.add_argument(
        "--batches", type=int, metavar="N", help="batches of each row in a round (default: by time)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="number of rounds (default: 3 to 25, by time)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="approximate duration (default 15)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all figures, those of each round too, as JSON"
    )


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE, such as lr=0.1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its report; return the exit status."""
    import anyio

    from fitloop._bench.benchmark import benchmark  # --help needs no torch

    # Prints of the script go to stderr, so that the output is JSON and nothing else.
    prints = redirect_stdout(sys.stderr) if options.json else nullcontext()
    with prints, _import_path(options.target) as (module, name):
        factory = _factory(module, name, dict(options.arg))
        report: BenchReport = anyio.run(
            partial(
                benchmark,
                factory,
                batches=options.batches,
                rounds=options.rounds,
                seconds=options.seconds,
            )
        )
    print_line(json.dumps(report.to_dict(), indent=1) if options.json else str(report))
    return 0


# -- finding the function ----------------------------------------------------------------------


@contextmanager
def _import_path(target: str) -> Iterator[tuple[str, str]]:
    """Split a target into module or script and function; extend ``sys.path`` in the block.

    Modules are found from the current directory, and those of a script from its directory.
    """
    module, _colon, name = target.rpartition(":")
    forms = "MODULE:FUNCTION or SCRIPT.py:FUNCTION, such as train.py:make_trainer"
    expect(module and name, "TARGET", target, forms)
    path = str(Path(module).resolve().parent) if module.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, path)
    try:
        yield module, name
    finally:
        if path in sys.path:
            sys.path.remove(path)


def _factory(module_name: str, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """Return the function that makes the trainer. ``name`` may also be a finished trainer.

    Raises:
        ConfigurationError: the function does not exist, or takes other arguments.
        Exception: raised by the module, and left as it is.
    """
    from fitloop import FitLoop, SyncFitLoop

    module = _import_module(module_name)
    value: Any = module
    for attribute in name.split("."):
        if not hasattr(value, attribute):
            raise ConfigurationError(
                f"{module_name} has no {name!r}; its functions are: "
                f"{quoted_list(_functions(module))}"
            )
        value = getattr(value, attribute)
    if isinstance(value, FitLoop | SyncFitLoop):
        return lambda: value
    expect(callable(value), f"{module_name}:{name}", value, "a function that returns a FitLoop")
    try:
        signature(value).bind(**arguments)
    except TypeError as error:
        passed = ", ".join(f"{key}={each!r}" for key, each in arguments.items()) or "no arguments"
        takes = str(signature(value))
        raise ConfigurationError(
            f"{module_name}:{name}{takes:.80} cannot be called with {passed}: "
            f"{error}; give its arguments as --arg NAME=VALUE"
        ) from None
    except ValueError:  # some built-in functions have no signature
        pass
    return partial(value, **arguments)


def _functions(module: ModuleType) -> Sequence[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not isclass(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def _import_module(name: str) -> ModuleType:
    """Import a module, or a script as the module of its name, so that loader workers find it."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigurationError(f"there is no file {name}; expected SCRIPT.py:FUNCTION")
        name = Path(name).stem
        sys.modules.pop(name, None)  # another module of this name
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports another one that does not
        raise ConfigurationError(
            f"there is no module {error.name!r}; expected one that can be imported from "
            f"{Path.cwd()}, or a script: SCRIPT.py:FUNCTION"
        ) from None
    except ValueError as error:  # such as an empty name
        raise ConfigurationError(f"{name!r} is no name of a module: {error}") from None
