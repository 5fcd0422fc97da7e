"""The settings of a training, and the problems of a request with wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict, get_args

Model = Literal["small", "medium", "large"]
MODELS: tuple[str, ...] = get_args(Model)
MAX_NAME_LENGTH = 60
MAX_EPOCHS = 1000
MAX_LR = 1000.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of a client for one training."""

    name: str = "digits"
    model: Model = "small"
    lr: float = 0.05
    epochs: int = 10
    ask_every: int = 0
    """epochs between two questions whether to go on; 0: no questions"""

    def as_dict(self) -> dict[str, Any]:
        """Return field -> value."""
        return asdict(self)


class Problem(TypedDict):
    """An error in one field of a request."""

    field: str
    message: str
    """the value, the expected values, and the remedy"""


class BadRequestError(Exception):
    """A request that cannot be fulfilled; ``problems`` lists every wrong field."""

    def __init__(self, problems: list[Problem], status: int = 422) -> None:
        super().__init__("; ".join(problem["message"] for problem in problems))
        self.problems = problems
        self.status = status


def refusal(status: int, message: str, field: str = "") -> BadRequestError:
    """Return the error for a request as a whole, or for one field of it."""
    return BadRequestError([Problem(field=field, message=message)], status)


def read_settings(body: object) -> Settings:
    """Return the settings in a decoded JSON body.

    Raises:
        BadRequestError: the body is no object, or has unknown or wrong fields; lists them all.
    """
    if not isinstance(body, dict):
        raise refusal(422, f"the body is {as_text(body)}; expected an object such as {EXAMPLE}")
    names = [item.name for item in fields(Settings)]
    problems = [
        Problem(
            field=sendable(field),
            message=f"{as_text(field)} is no setting; there are {', '.join(names)}; leave it out",
        )
        for field in body
        if field not in names
    ]
    for field, (is_right, expected) in _RULES.items():
        if field in body and not is_right(body[field]):
            value = as_text(body[field])
            problems.append(
                Problem(field=field, message=f"{field} is {value}; expected {expected}")
            )
    if problems:
        raise BadRequestError(problems)
    if "name" in body:
        body = {**body, "name": body["name"].strip()}
    return Settings(**body)


def as_text(value: object) -> str:
    """Return a value of a request as short text for a message."""
    try:
        text = repr(value)
    except RecursionError:  # it may need more of the stack than decoding did
        return f"a {type(value).__name__} in too many others"
    return text if len(text) <= 60 else f"{text[:57]}..."


def sendable(text: str) -> str:
    r"""Return a text that UTF-8 can encode; JSON may hold half a character, such as "\ud800"."""
    return text.encode(errors="backslashreplace").decode()


def _is_name(value: object) -> bool:
    return (
        isinstance(value, str) and 0 < len(value.strip()) <= MAX_NAME_LENGTH and value.isprintable()
    )


def _is_lr(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_LR  # type: ignore[operator]


def _is_count(least: int) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return type(value) is int and least <= value <= MAX_EPOCHS

    return check


EXAMPLE = '{"name": "digits", "model": "small", "lr": 0.05, "epochs": 10}'

_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "name": (
        _is_name,
        f"a text of 1 to {MAX_NAME_LENGTH} printable characters; choose a short one",
    ),
    "model": (lambda value: value in MODELS, f"one of {', '.join(MODELS)}; choose one of them"),
    "lr": (_is_lr, f"a number above 0, {MAX_LR:g} at most; 0.05 is a good beginning"),
    "epochs": (_is_count(1), f"a whole number from 1 to {MAX_EPOCHS}; 10 is a good beginning"),
    "ask_every": (_is_count(0), f"a whole number from 0 to {MAX_EPOCHS}; 0 never asks"),
}
"""field -> check of a value, and description of valid values"""
