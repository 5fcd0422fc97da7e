"""Weight files: a state dict as ``.msgpack``, ``.safetensors`` or ``.pt``.

Owns the names of these files and their formats; `tensors` owns the layout of a ``.msgpack``. All
functions block. The weights must not change while they are written.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, TypeAlias
from unicodedata import normalize

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fitloop._errors import CheckpointError, quoted_list
from fitloop._storage.durable import PART_SUFFIX, reason, write_file
from fitloop._storage.layout import LayoutError
from fitloop._storage.tensors import read_tensors, write_tensors

StateDict: TypeAlias = Mapping[str, Any]
"""the result of ``model.state_dict()``: tensors by name, and module versions in ``_metadata``"""
Writer: TypeAlias = Callable[[Path, int, StateDict], None]
Reader: TypeAlias = Callable[[Path, torch.device], dict[str, Any]]

DEFAULT_SUFFIX = ".msgpack"


def are_one_file(name: str, other: str) -> bool:
    """Return whether two names are of one file in a directory, on any file system.

    Such as ``best``, ``./best.msgpack`` and, where upper and lower case are the same, ``Best``.
    """
    return _comparable(name) == _comparable(other)


@lru_cache
def _comparable(name: str) -> str:
    return normalize("NFC", str(Path(with_suffix(name)))).casefold()


def with_suffix(name: str) -> str:
    """Return ``name`` with the suffix ``.msgpack``, unless it has the suffix of another format.

    Other suffixes do not count: ``lr=0.01`` becomes ``lr=0.01.msgpack``. Folders are allowed.

    Raises `CheckpointError` for a name that is empty or leads out of the directory.
    """
    windows = PureWindowsPath(name)
    leads_out = ".." in windows.parts or bool(windows.anchor) or PurePosixPath(name).is_absolute()
    # An empty name, a folder, a bare suffix, and NUL, which no file system accepts.
    unfit = name.endswith(("/", "\\", "/.")) or "\0" in name or windows.name in {"", *_FORMATS}
    if leads_out or unfit:
        raise CheckpointError(f"{name!r} cannot name a file: give a name within the directory")
    return name if suffix_of(name) else name + DEFAULT_SUFFIX


def write_weights(
    path: str | os.PathLike[str],
    state: StateDict,
    *,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a state dict to ``path``, in the format of the suffix, as `write_file` does.

    ``fields`` are more keys for the header of a ``.msgpack``.

    Raises `CheckpointError`, and leaves nothing behind, if the file exists and not ``overwrite``,
    the suffix is unknown, an entry is no tensor, or the file cannot be written.
    """
    path = Path(path)
    write, _ = _format_of(path)
    if fields is not None:
        write = partial(_write_msgpack, fields=fields)
    _check_tensors(state)
    if suffix_of(path.name) == ".safetensors":
        _safetensors(path)  # now, to name this file and not a temporary one
    try:
        write_file(path, lambda temporary, file: write(temporary, file, state), overwrite=overwrite)
    except (OSError, LayoutError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be written: {reason(error)}") from error


def read_weights(
    path: str | os.PathLike[str], *, map_location: str | torch.device | None = None
) -> dict[str, Any]:
    """Read a state dict from ``path``, in the format of the suffix. No file can run code.

    The tensors are on the CPU, or on the device ``map_location``.

    Raises `CheckpointError` for a file that is missing, damaged or of another format.
    """
    path = Path(path)
    _, read = _format_of(path)
    device = as_device(map_location)
    if os.path.lexists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise CheckpointError(f"{path} cannot be read: it is no file")
    try:
        state = read(path, device)
    except (OSError, LayoutError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return state


def as_device(map_location: str | torch.device | None) -> torch.device:
    """Return the device, by default the CPU; raise `CheckpointError` if there is none."""
    try:
        return torch.empty(0, device=map_location or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"map_location is {map_location!r}: {reason(error)}") from error


def check_materialized(state: StateDict) -> None:
    """Raise `CheckpointError` for a lazy tensor, or one on the meta device."""
    for key, value in state.items():
        if isinstance(value, Tensor) and (is_lazy(value) or value.is_meta):
            raise CheckpointError(
                f"{key!r} has no values yet; run a batch through the model, or move it from the "
                "meta device, before its weights are kept"
            )


def _check_tensors(state: StateDict) -> None:
    check_materialized(state)
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"the entry {key!r} of the state dict is a {type(value).__name__}; a weights file "
                "holds tensors only, so have get_extra_state return a tensor"
            )


def set_metadata(state: OrderedDict[str, Any], metadata: object) -> None:
    """Set the module versions of a state dict, as ``Module.state_dict`` does."""
    if metadata is not None:
        vars(state)["_metadata"] = metadata


def _write_msgpack(
    _path: Path,
    descriptor: int,
    state: StateDict,
    *,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    # Without module versions torch would treat the weights as those of an old version.
    metadata = getattr(state, "_metadata", None)
    modules = {} if metadata is None else {"modules": dict(metadata)}
    write_tensors(descriptor, "weights", state, {**modules, **fields})


def _read_msgpack(path: Path, device: torch.device) -> dict[str, Any]:
    header, tensors = read_tensors(path, "weights", device)
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    if "modules" in header:
        set_metadata(state, check_module_versions(header["modules"]))
    return state


def check_module_versions(modules: object) -> dict[str, dict[str, Any]]:
    """Return the module versions; raise `LayoutError` if torch could fail on them in mid-load."""
    if not isinstance(modules, dict):
        raise LayoutError("its modules are no map")
    for name, entry in modules.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise LayoutError("its modules are no map of names to maps")
        if type(entry.get("version", 1)) is not int:
            raise LayoutError("a module's version is no whole number")
    return modules


def _write_safetensors(path: Path, descriptor: int, state: StateDict) -> None:
    library = _safetensors(path)
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # The format has no tensors that share their memory.
        plain[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    temporary_file = path.with_suffix(PART_SUFFIX)
    try:
        library.save_file(plain, temporary_file, metadata={"format": "pt"})
        # Copied: safetensors would replace the locked file by one that only its owner can read.
        with temporary_file.open("rb") as source, open(descriptor, "wb", closefd=False) as file:
            shutil.copyfileobj(source, file, 2**24)
    except OSError:
        raise
    except Exception as error:  # such as a SafetensorError, or a KeyError
        raise LayoutError(f"safetensors refuses it: {error!r}") from error


def _read_safetensors(path: Path, device: torch.device) -> dict[str, Any]:
    library = _safetensors(path)
    try:
        return dict(library.load_file(path, device=str(device)))
    except OSError:
        raise
    except Exception as error:
        raise LayoutError(f"it is no whole safetensors file: {error}") from error


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def _write_pt(_path: Path, descriptor: int, state: StateDict) -> None:
    copies: dict[Any, Tensor] = {}
    plain = OrderedDict((key, _compact(value.detach(), copies)) for key, value in state.items())
    set_metadata(plain, getattr(state, "_metadata", None))
    with open(descriptor, "wb", closefd=False) as file:  # torch would store the name of a path
        torch.save(plain, file)


def _compact(value: Tensor, copies: dict[Any, Tensor]) -> Tensor:
    """Return a tensor that is no part of a larger storage, which torch would write whole.

    ``copies`` has those made before: tensors that share memory go on sharing it.
    """
    if value.layout is not torch.strided or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    memory = (value.data_ptr(), value.dtype, value.shape, value.stride())
    if memory not in copies:
        copies[memory] = value.clone()
    return copies[memory]


def _read_pt(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a forged file may raise anything
        raise LayoutError(f"torch does not load it as weights only: {error}") from error
    if not isinstance(state, dict):
        raise LayoutError(f"it holds a {type(state).__name__}; expected a state dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise LayoutError(
                f"its entry {key!r} is a {type(value).__name__}; expected a tensor{_advice(state)}"
            )
    return state


def _advice(state: Mapping[Any, Any]) -> str:
    """Return how to get the weights out of a checkpoint of a hand-written loop, if it is one."""
    for key, value in state.items():
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
            return (
                f". If {key!r} has the weights, write them to a file of their own: "
                f"torch.save(torch.load(path)[{key!r}], 'weights.pt')"
            )
    return ""


_FORMATS: dict[str, tuple[Writer, Reader]] = {
    ".msgpack": (_write_msgpack, _read_msgpack),
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".pt": (_write_pt, _read_pt),
    ".pth": (_write_pt, _read_pt),
}


def suffix_of(name: str) -> str | None:
    """Return the suffix of a weights file that ``name`` ends with; None if it has none."""
    return next((suffix for suffix in _FORMATS if name.lower().endswith(suffix)), None)


def _format_of(path: Path) -> tuple[Writer, Reader]:
    suffix = suffix_of(path.name)
    if suffix is None:
        raise CheckpointError(
            f"{path} has no suffix of a weights file; there are: {quoted_list(_FORMATS)}"
        )
    return _FORMATS[suffix]
