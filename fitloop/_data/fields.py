"""The declared fields of objects in batches: dataclasses, classes of attrs, and namespaces."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any


def field_names(item: Any) -> list[str]:
    """Return the names of the declared fields of ``item`` that have values, if it has any."""
    kind = type(item)
    if hasattr(kind, "__dataclass_fields__"):
        names = [field.name for field in dataclasses.fields(item)]
    elif hasattr(kind, "__attrs_attrs__"):
        names = [field.name for field in kind.__attrs_attrs__]
    elif hasattr(kind, "_fields") and isinstance(item, tuple):
        names = list(kind._fields)
    elif kind is SimpleNamespace:
        names = list(vars(item))
    else:
        return []
    return [name for name in names if hasattr(item, name)]
