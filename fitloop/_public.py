"""The decorator of public classes and functions: `public`."""

from __future__ import annotations

import inspect
from typing import ForwardRef, TypeVar

T = TypeVar("T")


def public(item: T) -> T:
    """Name ``fitloop`` as the module of a class or function, instead of the private module.

    Reprs, documentation and pickles then stay the same when the item moves to another module.
    Make this the outermost decorator: `dataclasses.dataclass` needs the name of the real module.
    """
    if isinstance(item, type):
        # `typing.get_type_hints` looks names up in the module that the class names.
        item.__annotations__ = {
            name: _reference(annotation, item.__module__)
            for name, annotation in inspect.get_annotations(item).items()
        }
    item.__module__ = "fitloop"
    return item


def _reference(annotation: str | ForwardRef, module: str) -> ForwardRef:
    """Return an annotation, of which a NamedTuple has a reference already, with its module."""
    text = annotation if isinstance(annotation, str) else annotation.__forward_arg__
    return ForwardRef(text, is_argument=False, module=module, is_class=True)
