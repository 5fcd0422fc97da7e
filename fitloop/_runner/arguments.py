"""The arguments of a job's function, by name and as plain values: the columns of result tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from reprlib import Repr
from typing import Any, TypeAlias

import numpy as np

from fitloop._format import printable

Plain: TypeAlias = "bool | int | float | str | None"

MAX_TEXT = 60
"""characters of an argument that is no number"""
_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = MAX_TEXT


def named_arguments(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Plain]:
    """Return the arguments of a call by the names of the function's parameters, for people.

    They are those that the call gives, those that `functools.partial` has bound, and the defaults
    that are plain values. Arguments without a name have a number, such as ``"0"``. Numbers, bools,
    None and strings stay as they are; other values are a short text.
    """
    if not callable(target):
        return {}
    args, kwargs = tuple(args), dict(kwargs)
    while isinstance(target, partial):
        args, kwargs = (*target.args, *args), {**target.keywords, **kwargs}
        target = target.func
    try:
        named = _bound(target, args, kwargs)
    except TypeError:  # the call will fail
        named = kwargs
    except ValueError:  # some functions in C have no signature
        named = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    return {str(name): plain_value(value) for name, value in named.items()}


def _bound(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    signature = inspect.signature(target)
    bound = signature.bind(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name not in bound:
            if isinstance(parameter.default, bool | int | float | str):
                named[name] = parameter.default
        elif parameter.kind is parameter.VAR_POSITIONAL:
            named |= {f"{name}[{index}]": value for index, value in enumerate(bound[name])}
        elif parameter.kind is parameter.VAR_KEYWORD:
            named |= bound[name]
        else:
            named[name] = bound[name]
    return named


def plain_value(value: Any) -> Plain:
    """Return a value that msgpack and JSON hold: the value, or a short text for it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, float):
        return value  # type: ignore[no-any-return]
    if isinstance(value, int):
        number = int(value)
        return number if -(2**63) <= number < 2**64 else str(number)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return printable(str(value))[:MAX_TEXT]
    return _text(value)


def _text(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):  # a class or a function
        return printable(name)[:MAX_TEXT]
    try:
        # Arrays and tables of data: their values would be much text, or wait for a device.
        shape = getattr(value, "shape", None)
        sizes = "x".join(map(str, shape)) if isinstance(shape, tuple) else None
        text = (
            f"{type(value).__name__} {sizes}".strip() if sizes is not None else _short.repr(value)
        )
    except Exception:
        text = type(value).__name__
    text = printable(text)
    has_address = " at 0x" in text  # which differs from run to run
    return type(value).__name__ if has_address else text[:MAX_TEXT]
