"""``fitloop bench``: the benchmark of a trainer that a script or a module makes.

Finds and calls the function that makes the trainer, prints the report and writes it as JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import isclass, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import torch
from torch import nn

from fitloop._bench.benchmark import benchmark
from fitloop._bench.report import BenchReport
from fitloop._cli.common import print_line
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._errors import ConfigurationError, FitLoopError, quoted_list
from fitloop._storage.durable import reason, write_file
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop.backends.thread import as_trainer, build_from

ABOUT = """\
Time the train phase of your own trainer, and advise changes. The report shows the cost of
fitloop's loop against a hand-written one, whether the loader keeps up with the steps, and the gain
of loading ahead. Model, optimizers, random generators and files are unchanged afterwards. It takes
some 15 seconds.

TARGET is a function that returns a FitLoop, in a module that can be imported from here or in a
script: package.module:function or script.py:function, plain or async. Without a TARGET, a small
built-in model is measured."""

EXAMPLES = """\
  fitloop bench train.py:make_trainer
  fitloop bench project.training:make_trainer --arg lr=0.1 --arg size=large
  fitloop bench train.py:make_trainer --seconds 60 --json before.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="MODULE:FUNCTION or SCRIPT.py:FUNCTION"
    )
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
        "--device", type=_device, help="cpu, cuda:0 ... for a trainer without device="
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write all figures to this file; its directory must exist",
    )


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE, such as lr=0.1")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return name, value


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a device such as cpu or cuda:0"
        ) from None


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and print its report; return the exit status."""
    # The path is resolved now, since the target may change the current directory.
    json_path = None if options.json is None else _writable(options.json)
    if options.target is None:
        if options.arg:
            raise ConfigurationError("--arg is for the function of a TARGET, and there is none")
        print_line("no TARGET: a built-in model, two hidden layers of 256 on made-up data\n")
        report = _measure(built_in_trainer, options)
    else:
        with _import_path(options.target) as (module, name):
            report = _measure(_factory(module, name, dict(options.arg)), options)
    print_line(str(report))
    if json_path is not None:
        _write(json_path, report)
    return 0


def _measure(factory: Callable[[], Any], options: argparse.Namespace) -> BenchReport:
    async def make_trainer() -> FitLoop:
        trainer = as_trainer(await build_from(factory, (), "bench"), str(options.target))
        if options.device is not None and trainer.device != options.device:
            raise ConfigurationError(
                f"--device is {options.device}, but the function gives its trainer device="
                f"'{trainer.device}'; leave that out of it, or leave out --device"
            )
        return trainer

    token = TRAINER_DEFAULTS.set(replace(TRAINER_DEFAULTS.get(), device=options.device))
    try:
        return anyio.run(
            partial(
                benchmark,
                make_trainer,
                batches=options.batches,
                rounds=options.rounds,
                seconds=options.seconds,
            )
        )
    finally:
        TRAINER_DEFAULTS.reset(token)


def _writable(path: Path) -> Path:
    """Check before the measuring that a file can be written; return its absolute path.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    directory = path.parent
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "no plain file"
        raise ConfigurationError(f"--json is {path}, which is {kind}; expected a file to write")
    if not os.path.isdir(directory):  # not created, since it may be a typing mistake
        raise ConfigurationError(
            f"--json is {path}, but {directory} is no directory; make it, or name a file in another"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"--json is {path}, but {directory} cannot be written to; name a file in another "
            "directory"
        )
    return path.absolute()


def _write(path: Path, report: BenchReport) -> None:
    text = json.dumps(report.to_dict(), indent=1)
    try:
        write_file(path, lambda file, _descriptor: file.write_text(text), overwrite=True)
    except OSError as error:
        raise FitLoopError(f"{path} cannot be written: {reason(error)}") from error


# -- finding the function ----------------------------------------------------------------------


@contextmanager
def _import_path(target: str) -> Iterator[tuple[str, str]]:
    """Split a target into module or script and function; extend ``sys.path`` in the block.

    Modules are found from the current directory, and those of a script from its directory.
    """
    module, _colon, name = target.rpartition(":")
    if not module or not name:
        raise ConfigurationError(
            f"TARGET is {target!r}; expected MODULE:FUNCTION or SCRIPT.py:FUNCTION, such as "
            "train.py:make_trainer"
        )
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
    if not callable(value):
        raise ConfigurationError(
            f"{module_name}:{name} is {value!r:.60}; expected a function that returns a FitLoop"
        )
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


def built_in_trainer() -> FitLoop:
    """Return a small classifier over made-up data, for a benchmark without a TARGET."""
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(4096, 64, generator=generator),
        torch.randint(0, 10, (4096,), generator=generator),
    )
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return FitLoop(
        model,
        torch.optim.AdamW(model.parameters()),
        nn.CrossEntropyLoss(),
        train_dl=torch.utils.data.DataLoader(data, 64, shuffle=True),
        name="built-in",
    )
