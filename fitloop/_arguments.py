"""The arguments of public calls: their checks, and the refusal of unknown ones by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fitloop._errors import ConfigurationError, leave_user_frames

F = TypeVar("F", bound=Callable[..., Any])

_OTHER_NAMES = {
    **dict.fromkeys(("max_epochs", "num_epochs", "nb_epochs", "n_epochs"), "epochs"),
    **dict.fromkeys(("train_loader", "train_dataloader", "train_dataloaders"), "train_dl"),
    **dict.fromkeys(("val_loader", "val_dataloaders", "validation_data"), "valid_dl"),
    **dict.fromkeys(("valid_loader", "valid_dataloader", "val_dataloader"), "valid_dl"),
    **dict.fromkeys(("test_loader", "test_dataloader", "dataloaders"), "test_dl"),
    **dict.fromkeys(("loss", "loss_fn", "criterion"), "loss_function"),
    **dict.fromkeys(("scheduler", "lr_schedulers"), "lr_scheduler"),
    **dict.fromkeys(("patience", "early_stopping"), "early_stop"),
    **dict.fromkeys(("gradient_clip_val", "max_grad_norm"), "clip_grad"),
    **dict.fromkeys(("accumulate_grad_batches", "gradient_accumulation_steps"), "accumulate"),
    "monitor": "criteria",
    "accelerator": "device",
    "logger": "callbacks",
    "ckpt_path": "resume",
    "enable_progress_bar": "progress",
    "max_steps": "steps",
}
"""names that other trainers have for an argument -> the name here"""

_CALLS: dict[str, tuple[str, ...]] = {}
"""call, such as ``fit()`` -> the names of its arguments"""


def _keep(_name: str, value: Any) -> Any:
    return value


def checked_arguments(
    check: Callable[[str, Any], Any] = _keep, *, passed_on: Iterable[str] = ()
) -> Callable[[F], F]:
    """Return a decorator for methods: it refuses unknown keywords and checks all given arguments.

    ``check`` takes the name and the value of an argument and returns the value for the method, or
    raises an error. Defaults are not checked. ``passed_on`` are the names of a method's
    ``**options``. Errors have no frames of fitloop before those of the user's code.
    """

    def decorate(method: F) -> F:
        parameters = list(inspect.signature(method).parameters.values())[1:]
        own_names = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        names = (*own_names, *passed_on)
        _name_as_users_do(method)
        owner, _, name = method.__qualname__.rpartition(".")
        call_name = f"{owner if name == '__init__' else name}()"
        if not passed_on:
            _CALLS[call_name] = names

        def checked(args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
            for option in options:
                if option not in names:
                    call_text = _class_call(args[0], call) if name == "__init__" else call_name
                    refuse_call(unknown_argument(call_text, option, names))
            options.update((option, check(option, value)) for option, value in options.items())
            positional = [check(*pair) for pair in zip(names, args[1:], strict=False)]
            return [args[0], *positional, *args[1 + len(positional) :]]

        if inspect.iscoroutinefunction(method):

            @wraps(method)
            async def call(*args: Any, **options: Any) -> Any:
                __tracebackhide__ = True  # IPython leaves out this frame
                try:
                    return await method(*checked(args, options), **options)
                except BaseException as error:
                    leave_user_frames(error)
                    raise

        else:

            @leaves_user_frames
            @wraps(method)
            def call(*args: Any, **options: Any) -> Any:
                return method(*checked(args, options), **options)

        return call  # type: ignore[return-value]

    return decorate


def leaves_user_frames(function: F) -> F:
    """Decorate a plain function: its errors have no frames of fitloop before the user's code."""
    _name_as_users_do(function)

    @wraps(function)
    def call_plain(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True  # IPython leaves out this frame
        try:
            return function(*args, **options)
        except BaseException as error:
            leave_user_frames(error)
            raise

    return call_plain  # type: ignore[return-value]


def _name_as_users_do(function: Callable[..., Any]) -> None:
    """Have errors name the class that users know, also those of Python about missing arguments."""
    function.__qualname__ = function.__qualname__.replace("TrainerBase", "FitLoop")


def expect(fits: object, name: str, value: object, expected: str) -> None:
    """Raise ConfigurationError, with the name and the value of an argument, unless it fits."""
    if not fits:
        raise ConfigurationError(f"{name} is {value!r:.80}; expected {expected}")


def is_number(value: object) -> bool:
    """Return whether a value is a number of Python: True and False count as none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def absolute_path(name: str, value: Any, expected: str = "a path") -> Path:
    """Return a path that stays the same when the program changes its working directory.

    If the working directory was removed, a relative path stays relative: the file system refuses it
    when it is used.

    Raises:
        ConfigurationError: it is no path, or has characters that no path can have.
    """
    try:
        path = Path(value)
        is_possible = b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        is_possible = False
    expect(is_possible, name, value, expected)
    try:
        return path.absolute()
    except FileNotFoundError:
        return path


def _class_call(instance: object, constructor: object) -> str:
    """Return the call of the class that inherits a constructor, such as ``CSV()``."""
    classes = type(instance).__mro__
    kind = next(each for each in classes if getattr(each, "__init__") is constructor)  # noqa: B009
    return f"{kind.__name__}()"


def refuse_call(message: str) -> NoReturn:
    """Raise TypeError about the arguments of a call; `leave_user_frames` knows it by this module.

    So does Python about a missing argument, which it raises here too.
    """
    raise TypeError(message)


def unknown_argument(call: str, name: str, expected: Iterable[str]) -> str:
    """Return the message about an unknown argument of a call, with the nearest known name."""
    names = list(expected)
    everywhere = {*names, *(other for arguments in _CALLS.values() for other in arguments)}
    exact = [each for each in (_OTHER_NAMES.get(name), name) if each in everywhere]
    suggestions = exact or _closest(name, names) or _closest(name, everywhere)
    if not suggestions:
        hint = f"expected one of {', '.join(names)}"
    elif suggestions[0] in names:
        hint = f"did you mean {suggestions[0]!r}?"
    else:
        calls = [other for other, arguments in _CALLS.items() if suggestions[0] in arguments]
        hint = f"{suggestions[0]!r} is an argument of {'fit()' if 'fit()' in calls else calls[0]}"
    return f"{call} has no argument {name!r}; {hint}"


def _closest(name: str, names: Iterable[str]) -> list[str]:
    return get_close_matches(name, sorted(names), 1, 0.7)
