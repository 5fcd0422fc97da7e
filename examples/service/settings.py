"""What a training may be asked to do, and what is wrong with a request that asks otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

Model = Literal["small", "medium", "large"]
MODELS: tuple[str, ...] = get_args(Model)
LONGEST_NAME = 60
MOST_EPOCHS = 1000
HIGHEST_LR = 1000.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training: all a client may choose."""

    name: str = "digits"
    model: Model = "small"
    lr: float = 0.05
    epochs: int = 10
    ask_every: int = 0
    """epochs between two questions whether to go on; 0 never asks"""

    def as_dict(self) -> dict[str, Any]:
        """Return field -> value."""
        return asdict(self)


class Problem(TypedDict):
    """What is wrong with one field of a request."""

    field: str
    message: str
    """what was given, what was expected, how to mend it"""


class BadRequestError(Exception):
    """A request that cannot be done; ``problems`` has every field that is wrong."""

    def __init__(self, problems: list[Problem], status: int = 422) -> None:
        super().__init__("; ".join(problem["message"] for problem in problems))
        self.problems = problems
        self.status = status


def refusal(status: int, message: str, field: str = "") -> BadRequestError:
    """Return the error for a request as a whole, or for one field of it."""
    return BadRequestError([Problem(field=field, message=message)], status)


def read_settings(body: object) -> Settings:
    """Return the settings that a decoded JSON body asks for.

    Raises:
        BadRequestError: it is no object, or fields are unknown or wrong; all are told at once.
    """
    if not isinstance(body, dict):
        raise refusal(422, f"the body is {shown(body)}; expected an object such as {EXAMPLE}")
    known = [item.name for item in fields(Settings)]
    problems = [
        Problem(
            field=sendable(field),
            message=f"{shown(field)} is no setting; there are {', '.join(known)}; leave it out",
        )
        for field in body
        if field not in known
    ]
    for field, (is_right, expected) in _RULES.items():
        if field in body and not is_right(body[field]):
            given = shown(body[field])
            problems.append(
                Problem(field=field, message=f"{field} is {given}; expected {expected}")
            )
    if problems:
        raise BadRequestError(problems)
    if "name" in body:
        body = {**body, "name": body["name"].strip()}
    return Settings(**body)


def shown(value: object) -> str:
    """Return a value of a request for a message, cut short."""
    try:
        told = repr(value)
    except RecursionError:  # it may need more of the stack than decoding did
        return f"a {type(value).__name__} in too many others"
    return told if len(told) <= 60 else f"{told[:57]}..."


def sendable(text: str) -> str:
    r"""Return a text of a request as UTF-8 can say it; JSON may hold half a character, "\ud800"."""
    return text.encode(errors="backslashreplace").decode()


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= LONGEST_NAME and value.isprintable()


def _is_lr(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= HIGHEST_LR  # type: ignore[operator]


def _is_count(least: int) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return type(value) is int and least <= value <= MOST_EPOCHS

    return check


EXAMPLE = '{"name": "digits", "model": "small", "lr": 0.05, "epochs": 10}'

_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "name": (_is_name, f"a text of 1 to {LONGEST_NAME} printable characters; choose a short one"),
    "model": (lambda value: value in MODELS, f"one of {', '.join(MODELS)}; choose one of them"),
    "lr": (_is_lr, f"a number above 0, {HIGHEST_LR:g} at most; 0.05 is a good beginning"),
    "epochs": (_is_count(1), f"a whole number from 1 to {MOST_EPOCHS}; 10 is a good beginning"),
    "ask_every": (_is_count(0), f"a whole number from 0 to {MOST_EPOCHS}; 0 never asks"),
}
"""field -> whether a value will do, and what to say when it does not"""
