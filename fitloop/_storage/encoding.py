"""Nested Python values, such as state dicts, as plain msgpack values and a list of tensors.

Owns the encoding, and the choice of values that can be encoded: numbers, text, containers, and
plain values of numpy and torch. A file cannot name code that is imported or called. A value of a
type that msgpack does not have becomes a map with one key, its kind, which begins with ``!``::

    {"!tensor": 3}                          the fourth in the list of tensors
    {"!sparse": ["sparse_coo", [2, 3], true, [{"!tensor": 5}, {"!tensor": 6}]]}
                                            a sparse tensor: layout, shape, whether it is coalesced,
                                            and its indices and values
    {"!array": 4}                           a numpy array, stored as the fifth tensor
    {"!number": ["<f4", b"..."]}            a numpy scalar: its dtype and its bytes
    {"!tuple": [...]}, {"!set": [...]}, {"!frozenset": [...]}, {"!size": [...]}
    {"!map": [[key, value], ...]}           a dict whose keys are not all plain strings
    {"!ordered": ...}, {"!counter": ...}    as "!map"; OrderedDict, Counter
    {"!deque": [maxlen, [...]]}
    {"!int": "18446744073709551616"}        an integer beyond 64 bits
    {"!complex": [re, im]}
    {"!dtype": "float32"}, {"!device": "cuda:0"}, {"!layout": "strided"},
    {"!memory_format": "channels_last"}
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._storage.layout import LayoutError

MAX_DEPTH = 100
"""largest number of nested levels, well below the limit of msgpack libraries"""

_MARK = "!"
_MAX_BITS = 8192  # of an integer; Python does not convert much longer ones to text


def _torch_names(kind: type) -> dict[str, Any]:
    """Return torch's values of a type by name: no other attribute of torch is ever looked up."""
    values = [item for item in vars(torch).values() if type(item) is kind]
    return {str(value).removeprefix("torch."): value for value in values}


_DTYPES = _torch_names(torch.dtype)
_LAYOUTS = _torch_names(torch.layout)
_MEMORY_FORMATS = _torch_names(torch.memory_format)
_PLAIN_NUMBERS = "biufc"


_SPARSE_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""the methods that return the dense parts of a sparse tensor, by its layout"""


class Encoder:
    """Converts values to plain ones, and collects their tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        """tensors by their path in the encoded value"""

    def encode(self, value: Any, path: str) -> Any:
        """Return ``value`` as a plain value for msgpack.

        Raises `LayoutError`, which names the path, for a value that cannot be encoded.
        """
        return self._encode(value, path, 0)

    def _encode(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise LayoutError(f"{path[:80]}... is nested more than {MAX_DEPTH} levels deep")
        kind = type(value)
        if value is None or kind is bool or kind is float or kind is bytes:
            return value
        if kind is int:
            return _integer(value, path)
        if kind is str:
            return _text(value, path)
        if kind is list:
            return self._items(value, path, depth)
        if kind is dict and all(type(key) is str and key[:1] != _MARK for key in value):
            return {
                _text(key, path): self._encode(item, f"{path}/{key}", depth + 1)
                for key, item in value.items()
            }
        if isinstance(value, Tensor):
            return self._tensor(value.detach(), path)
        container = self._container(value, path, depth)
        return _scalar(value, path) if container is None else container

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.is_nested or tensor.layout not in _SPARSE_PARTS:
            return {"!tensor": self._add(tensor, path)}
        parts = [getattr(tensor, name)() for name in _SPARSE_PARTS[tensor.layout]]
        is_coalesced = tensor.layout == torch.sparse_coo and tensor.is_coalesced()
        return {
            "!sparse": [
                str(tensor.layout).removeprefix("torch."),
                list(tensor.shape),
                is_coalesced,
                [{"!tensor": self._add(values, f"{path}/{i}")} for i, values in enumerate(parts)],
            ]
        }

    def _container(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _SEQUENCES:
            return {_SEQUENCES[kind]: self._items(value, path, depth)}
        if kind in _MAPPINGS:
            return {_MAPPINGS[kind]: self._pairs(value, path, depth)}
        if kind is deque:
            return {"!deque": [value.maxlen, self._items(value, path, depth)]}
        if kind is np.ndarray:
            if value.dtype.kind not in _PLAIN_NUMBERS or not value.dtype.isnative:
                raise _unfit(value, path, f"an array of dtype {value.dtype}")
            try:
                tensor = torch.from_numpy(np.array(value, order="C"))
            except TypeError:
                raise _unfit(value, path, f"an array of dtype {value.dtype}") from None
            return {"!array": self._add(tensor, path)}
        return None

    def _items(self, values: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self._encode(v, f"{path}/{i}", depth + 1) for i, v in enumerate(values)]

    def _pairs(self, mapping: Any, path: str, depth: int) -> list[Any]:
        return [
            [
                self._encode(key, f"{path} (a key)", depth + 1),
                self._encode(item, f"{path}/{_key_text(key)}", depth + 1),
            ]
            for key, item in mapping.items()
        ]

    def _add(self, tensor: Tensor, path: str) -> int:
        name, number = path, 2
        while name in self.tensors:  # 1 and "1" are two keys
            name, number = f"{path} ({number})", number + 1
        self.tensors[name] = tensor
        return len(self.tensors) - 1


_SEQUENCES: dict[type, str] = {
    tuple: "!tuple",
    set: "!set",
    frozenset: "!frozenset",
    torch.Size: "!size",
}
_MAPPINGS: dict[type, str] = {dict: "!map", OrderedDict: "!ordered", Counter: "!counter"}


def _integer(value: int, path: str) -> Any:
    if -(2**63) <= value < 2**64:
        return value
    if value.bit_length() > _MAX_BITS:
        raise LayoutError(f"{path} is an integer of more than {_MAX_BITS} bits")
    return {"!int": str(value)}


def _key_text(key: object) -> str:
    return "..." if type(key) is int and key.bit_length() > _MAX_BITS else str(key)


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LayoutError(f"{path} is text with half a surrogate pair in it") from None
    return value


def _scalar(value: Any, path: str) -> Any:
    kind = type(value)
    if isinstance(value, np.generic) and value.dtype.kind in _PLAIN_NUMBERS:
        return {"!number": [value.dtype.str, value.tobytes()]}
    if kind is complex:
        return {"!complex": [value.real, value.imag]}
    for name, (torch_kind, values) in _TORCH_VALUES.items():
        if kind is torch_kind and (not values or value in values.values()):
            return {name: str(value).removeprefix("torch.")}
    raise _unfit(value, path, f"a {kind.__module__}.{kind.__qualname__}")


_TORCH_VALUES: dict[str, tuple[type, dict[str, Any]]] = {
    "!dtype": (torch.dtype, _DTYPES),
    "!device": (torch.device, {}),
    "!layout": (torch.layout, _LAYOUTS),
    "!memory_format": (torch.memory_format, _MEMORY_FORMATS),
}


def _unfit(value: object, path: str, what: str) -> LayoutError:
    return LayoutError(
        f"{path} is {what}, {value!r:.60}, which cannot be kept; expected numbers, text, "
        "tensors, numpy's numbers and arrays, or lists, tuples, dicts and sets of these"
    )


class Decoder:
    """Converts plain values back; ``tensors`` are those of the `Encoder`, in its order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._used: set[int] = set()
        self._arrays: set[int] = set()

    def decode(self, value: Any, path: str = "state") -> Any:
        """Return the value that was encoded.

        Raises `LayoutError`, which names the path, for a value that no encoder returns.
        """
        return self._decode(value, path, 0)

    def _decode(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise LayoutError(f"{path[:80]}... is nested more than {MAX_DEPTH} levels deep")
        if type(value) is list:
            return self._items(value, path, depth)
        if type(value) is not dict:
            if value is not None and type(value) not in _PLAIN:
                raise LayoutError(f"{path} is a {type(value).__name__}, which no encoder makes")
            return value
        if len(value) == 1:
            ((key, content),) = value.items()
            if type(key) is str and key[:1] == _MARK:
                return self._marked(key, content, path, depth)
        if not all(type(key) is str for key in value):
            raise LayoutError(f"{path} has keys that are no strings")
        return {key: self._decode(v, f"{path}/{key}", depth + 1) for key, v in value.items()}

    def _items(self, values: Any, path: str, depth: int) -> list[Any]:
        if type(values) is not list:
            raise LayoutError(f"{path} is {short(values)}; expected a list")
        return [self._decode(v, f"{path}/{i}", depth + 1) for i, v in enumerate(values)]

    def _marked(self, key: str, content: Any, path: str, depth: int) -> Any:
        try:
            if key in _FROM_ITEMS:
                return _FROM_ITEMS[key](self._items(content, path, depth))
            if key in _FROM_PAIRS:
                pairs = [
                    (self._decode(k, path, depth + 1), self._decode(v, f"{path}/...", depth + 1))
                    for k, v in content
                ]
                mapping = _FROM_PAIRS[key](dict(pairs))
                if len(mapping) != len(pairs):
                    raise LayoutError(f"{path} has a key twice")
                return mapping
            if key == "!tensor":
                return self._tensor(content)
            if key == "!sparse":
                return self._sparse(*content)
            if key == "!array":
                return self._array(self._tensor(content))
            if key == "!deque":
                return deque(self._items(content[1], path, depth), content[0])
            if key in _FROM_VALUE:
                return _FROM_VALUE[key](content)
        except LayoutError:
            raise
        except Exception as error:  # a forged value may raise anything
            raise LayoutError(f"{path} is no {key[1:]}: {short(content)}") from error
        raise LayoutError(f"{path} is of the kind {short(key)}, unknown here")

    def _tensor(self, index: Any) -> Tensor:
        # Each one once: copies for a forged value could use any amount of memory.
        if type(index) is not int or index < 0 or index in self._used:
            raise ValueError
        self._used.add(index)
        return self._tensors[index]

    def _sparse(self, layout: str, shape: list[int], is_coalesced: bool, parts: Any) -> Tensor:
        tensors = [self._tensor(item["!tensor"]) for item in parts]
        if _LAYOUTS[layout] == torch.sparse_coo:
            indices, values = tensors
            return torch.sparse_coo_tensor(
                indices, values, shape, is_coalesced=is_coalesced or None, check_invariants=True
            )
        outer, inner, values = tensors
        return torch.sparse_compressed_tensor(
            outer, inner, values, shape, layout=_LAYOUTS[layout], check_invariants=True
        )

    def _array(self, tensor: Tensor) -> Any:
        if id(tensor) in self._arrays:  # an alias
            raise ValueError
        self._arrays.add(id(tensor))
        return tensor.numpy().copy()


_PLAIN = {bool, int, float, str, bytes}


def _number(content: Any) -> Any:
    code, data = content
    dtype = np.dtype(code)
    if dtype.kind not in _PLAIN_NUMBERS or dtype.itemsize != len(data):
        raise ValueError
    return np.frombuffer(data, dtype)[0]


def _int_from(text: str) -> int:
    if len(text) > 4000:  # Python does not convert longer ones
        raise ValueError
    return int(text)


_FROM_ITEMS = {mark: kind for kind, mark in _SEQUENCES.items()}
_FROM_PAIRS = {mark: kind for kind, mark in _MAPPINGS.items()}
_FROM_VALUE: dict[str, Callable[[Any], Any]] = {
    "!int": _int_from,
    "!complex": lambda parts: complex(*parts),
    "!number": _number,
    "!dtype": lambda name: _DTYPES[name],
    "!device": torch.device,
    "!layout": lambda name: _LAYOUTS[name],
    "!memory_format": lambda name: _MEMORY_FORMATS[name],
}
