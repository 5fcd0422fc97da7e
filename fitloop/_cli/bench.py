"""``fitloop bench``: the benchmark of a trainer that a script or a module makes.

Owns how the trainer is found and made, and what is printed. What is measured is `_bench`'s.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
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
from fitloop._cli.common import Commands, add_command, say
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._errors import ConfigurationError, FitLoopError, quoted_list
from fitloop._storage.durable import reason, write_file
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop.backends.thread import as_trainer, build_from

_ABOUT = """\
Time the train phase of your own trainer: what fitloop's loop costs beside one written by hand,
whether the loader keeps up with the steps, what loading ahead brings; and say what to change.
Model, optimizers, random generators and files are afterwards as before. It takes some 15 seconds.

TARGET is a function that returns a FitLoop, in a module that can be imported from here or in a
script: package.module:function or script.py:function, plain or async. Without a TARGET a small
model is measured, to see what the report looks like."""

_EXAMPLES = """\
  fitloop bench train.py:make_trainer
  fitloop bench project.training:make_trainer --arg lr=0.1 --arg size=large
  fitloop bench train.py:make_trainer --seconds 60 --json before.json"""


def add_bench(commands: Commands) -> None:
    """Add the command ``bench``."""
    does = "time a trainer's loop and loader, and say what to change"
    parser = add_command(commands, "bench", does, _ABOUT, _EXAMPLES, _bench)
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
        "--batches", type=int, metavar="N", help="batches of each way in a round (default: by time)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="turns of each way (default 3 to 25, by time)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="that it may take, about (default 15)",
    )
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda:0 ... for a trainer that is given none"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all figures there, too; its directory must be there",
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


def _bench(given: argparse.Namespace) -> int:
    # Before the target has a say in what the current directory is.
    figures = None if given.json is None else _place(given.json)
    if given.target is None:
        if given.arg:
            raise ConfigurationError("--arg is for the function of a TARGET, and there is none")
        say("no TARGET: a built-in model, two hidden layers of 256 on made-up data\n")
        report = _measure(built_in_trainer, given)
    else:
        with _on_path(given.target) as target:
            report = _measure(_factory(target, dict(given.arg)), given)
    say(str(report))
    if figures is not None:
        _write(figures, report)
    return 0


def _measure(factory: Callable[[], Any], given: argparse.Namespace) -> BenchReport:
    token = TRAINER_DEFAULTS.set(replace(TRAINER_DEFAULTS.get(), device=given.device))
    try:
        return anyio.run(partial(_run, factory, given))
    finally:
        TRAINER_DEFAULTS.reset(token)


async def _run(factory: Callable[[], Any], given: argparse.Namespace) -> BenchReport:
    async def make() -> FitLoop:
        made = as_trainer(await build_from(factory, (), "bench"), str(given.target))
        if given.device is not None and made.device != given.device:
            raise ConfigurationError(
                f"--device is {given.device}, but the function gives its trainer device="
                f"'{made.device}'; leave that out of it, or leave out --device"
            )
        return made

    return await benchmark(make, batches=given.batches, rounds=given.rounds, seconds=given.seconds)


def _place(path: Path) -> Path:
    """Check beforehand, as far as it can be, that a file can be written: measuring takes a while.

    Raises:
        ConfigurationError: it cannot.
    """
    there = path.parent
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "no plain file"
        raise ConfigurationError(f"--json is {path}, which is {kind}; expected a file to write")
    if not os.path.isdir(there):  # which is not made: it may be a slip of the pen
        raise ConfigurationError(
            f"--json is {path}, but {there} is no directory; make it, or name a file in another"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"--json is {path}, but {there} cannot be written to; name a file in another directory"
        )
    return path.absolute()


def _write(path: Path, report: BenchReport) -> None:
    text = json.dumps(report.to_dict(), indent=1)
    try:
        write_file(path, lambda part, _descriptor: part.write_text(text), overwrite=True)
    except OSError as error:
        raise FitLoopError(f"{path} cannot be written: {reason(error)}") from error


# -- finding the function ----------------------------------------------------------------------


@contextmanager
def _on_path(target: str) -> Iterator[tuple[str, str]]:
    """Split a target; modules are found from here, and from beside a script, while it is used."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ConfigurationError(
            f"TARGET is {target!r}; expected MODULE:FUNCTION or SCRIPT.py:FUNCTION, such as "
            "train.py:make_trainer"
        )
    path = str(Path(place).resolve().parent) if place.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, path)
    try:
        yield place, name
    finally:
        if path in sys.path:
            sys.path.remove(path)


def _factory(target: tuple[str, str], arguments: dict[str, Any]) -> Callable[[], Any]:
    """Return what makes the trainer; a trainer that is there already is as good.

    What the module itself raises is raised as it is.

    Raises:
        ConfigurationError: it is not there, or cannot be called so.
    """
    place, name = target
    module = _script(place) if place.endswith(".py") else _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(
                f"{place} has no {name!r}; its functions are: {quoted_list(_functions(module))}"
            )
        found = getattr(found, part)
    if isinstance(found, FitLoop | SyncFitLoop):
        return lambda: found
    if not callable(found):
        raise ConfigurationError(
            f"{place}:{name} is {found!r:.60}; expected a function that returns a FitLoop"
        )
    try:
        signature(found).bind(**arguments)
    except TypeError as error:
        takes = str(signature(found))
        raise ConfigurationError(
            f"{place}:{name}{takes:.80} cannot be called with {_shown(arguments)}: {error}; give "
            "its arguments as --arg NAME=VALUE"
        ) from None
    except ValueError:  # some built-in functions have no signature
        pass
    return partial(found, **arguments)


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"


def _functions(module: ModuleType) -> Sequence[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not isclass(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        raise ConfigurationError(
            f"there is no module {error.name!r}; expected one that can be imported from "
            f"{Path.cwd()}, or a script: SCRIPT.py:FUNCTION"
        ) from None
    except ValueError as error:  # such as an empty name
        raise ConfigurationError(f"{name!r} is no name of a module: {error}") from None


def _script(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {place}; expected SCRIPT.py:FUNCTION")
    # Under its own name, so that worker processes of a DataLoader find what is in it.
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        if known is not None:
            sys.modules[path.stem] = known
        raise
    return module


def built_in_trainer() -> FitLoop:
    """Return a small classifier over made-up data, to try the command with."""
    numbers = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(4096, 64, generator=numbers), torch.randint(0, 10, (4096,), generator=numbers)
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
