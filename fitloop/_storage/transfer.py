"""Loading a part of a weights file into a model, perhaps under other names.

`LoadedWeights` says which weights were loaded and which were not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitloop._arguments import expect
from fitloop._errors import (
    CheckpointError,
    ConfigurationError,
    WeightsWarning,
    quoted_list,
    warn_user,
)
from fitloop._public import public
from fitloop._storage.tensors import memory_key
from fitloop._storage.weight_files import StateDict, set_metadata
from fitloop._storage.weight_store import apply_weights, plain_weights, shortened, weights_of

Strict: TypeAlias = bool | Literal["shapes"]
Rename: TypeAlias = Mapping[str, str] | tuple[str, str] | Callable[[str], str]


@public
@dataclass(frozen=True)
class LoadedWeights:
    """The result of ``load_model``: which weights were loaded, and which were not.

    All names are those of the model, after ``rename``. Printed, it is a summary in one line.
    """

    loaded: tuple[str, ...]
    """weights of the model that have the values of the file now"""
    kept: tuple[str, ...]
    """weights of the model that have kept their values"""
    unused: dict[str, str]
    """weights of the file that were not loaded, each with the reason"""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} weights were loaded"]
        if self.kept:
            parts.append(f"of the model kept: {shortened([repr(name) for name in self.kept])}")
        if self.unused:
            unused = [f"{name!r} ({why})" for name, why in self.unused.items()]
            parts.append(f"of the file not used: {shortened(unused)}")
        return "; ".join(parts)


def check_strict(strict: object) -> None:
    """Raise ConfigurationError unless ``strict`` is a bool or ``"shapes"``."""
    fits = isinstance(strict, bool) or strict == "shapes"
    expect(fits, "strict", strict, "True, False or 'shapes'")


def transfer_weights(
    model: nn.Module,
    state: StateDict,
    *,
    strict: Strict = True,
    only: str | Sequence[str] | None = None,
    rename: Rename | None = None,
) -> LoadedWeights:
    """Load weights into a model as ``FitLoop.load_model`` describes it.

    Raises `CheckpointError`, with nothing changed, if they do not fit, or if there are none to
    load; ConfigurationError for arguments of the wrong type.
    """
    target = weights_of(model)
    state = plain_weights(state, target)
    if rename is not None:
        state = _with_other_names(state, _renaming(rename, state))
    selects = _selection(only, state)
    chosen: OrderedDict[str, Any] = OrderedDict()
    unused: dict[str, str] = {}
    for name, value in state.items():
        reason = _reason_not_to_load(name, value, target, strict, selects)
        if reason is None:
            chosen[name] = value
        else:
            unused[name] = reason
    if not chosen and target and strict is not True:
        raise CheckpointError(
            f"none of the weights fits the model: the file has {shortened(list(state))}; the "
            f"model has {shortened(list(target))}. rename= gives them the names of the model"
        )
    loaded = [name for name in target if name in chosen]
    memories = {memory_key(target[name]) for name in loaded if isinstance(target[name], Tensor)}
    unchanged = [
        name
        for name, value in target.items()
        if name not in chosen
        and not (isinstance(value, Tensor) and memory_key(value) in memories - {None})
    ]
    if only is not None and strict is True:  # all that is not selected stays
        chosen |= {name: present for name, present in target.items() if not selects(name)}
    set_metadata(chosen, getattr(state, "_metadata", None))
    apply_weights(model, chosen, strict=strict is True)
    report = LoadedWeights(tuple(loaded), tuple(unchanged), unused)
    if strict == "shapes":
        _warn_of_others(report, selects)
    return report


def _reason_not_to_load(
    name: str, value: object, target: StateDict, strict: Strict, selects: Callable[[str], bool]
) -> str | None:
    if not selects(name):
        return "not selected by only="
    if strict is True:
        return None
    if name not in target:
        return "the model has no weight of this name"
    present = target[name]
    if strict != "shapes" or not isinstance(value, Tensor) or not isinstance(present, Tensor):
        return None
    if is_lazy(present) or is_lazy(value) or present.shape == value.shape:
        return None
    return f"model {tuple(present.shape)}, file {tuple(value.shape)}"


def _warn_of_others(report: LoadedWeights, selects: Callable[[str], bool]) -> None:
    """Warn of selected weights that were not loaded."""
    unchanged = tuple(name for name in report.kept if selects(name))
    unused = {name: why for name, why in report.unused.items() if selects(name)}
    if unchanged or unused:
        warn_user(str(LoadedWeights(report.loaded, unchanged, unused)), WeightsWarning)


def _selection(only: object, state: StateDict) -> Callable[[str], bool]:
    """Return a function that tells whether ``only`` selects a name."""
    if only is None:
        return lambda name: True
    patterns = [only] if isinstance(only, str) else only
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise ConfigurationError(
            f"only is {only!r:.80}; expected a pattern of names such as 'backbone.*', or a list"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise CheckpointError(
                f"only={pattern!r} selects none of the weights: {shortened(list(state))}"
            )
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _renaming(rename: object, state: StateDict) -> Callable[[str], str]:
    """Return the function that gives a weight its new name."""
    if callable(rename):
        return rename
    pairs: Any = [rename] if isinstance(rename, tuple) else rename
    try:
        table = dict(pairs)
    except (TypeError, ValueError):
        table = {}
    if not table or not all(isinstance(text, str) for pair in table.items() for text in pair):
        raise ConfigurationError(
            f"rename is {rename!r:.80}; expected beginnings of names and what replaces them, such "
            "as {'encoder': 'backbone'}, or a function of a name"
        )
    beginnings = sorted((text.strip(".") for text in table), key=len, reverse=True)
    table = {old.strip("."): new.strip(".") for old, new in table.items()}
    for old in beginnings:
        if not any(_begins_with(name, old) for name in state):
            raise CheckpointError(
                f"rename= has {old!r}, with which none of the weights begins: "
                f"{shortened(list(state))}"
            )

    def renamed(name: str) -> str:
        for old in beginnings:
            if _begins_with(name, old):
                return ".".join(filter(None, (table[old], name[len(old) :].lstrip("."))))
        return name

    return renamed


def _begins_with(name: str, beginning: str) -> bool:
    return not beginning or f"{name}.".startswith(f"{beginning}.")


def _with_other_names(state: StateDict, rename: Callable[[str], str]) -> StateDict:
    """Return weights under other names, with the versions of their modules."""
    renamed: OrderedDict[str, Any] = OrderedDict()
    before: dict[str, str] = {}
    versions = getattr(state, "_metadata", None)
    modules: dict[str, Any] = {}
    for name, value in state.items():
        new = rename(name)
        if not isinstance(new, str):
            raise ConfigurationError(f"rename gave {new!r:.60} for {name!r}; expected a name")
        if new in renamed:
            raise CheckpointError(
                f"rename gives {quoted_list([before[new], name])} the same name {new!r}"
            )
        renamed[new], before[new] = value, name
        module, _, leaf = name.rpartition(".")
        new_module, _, new_leaf = new.rpartition(".")
        if versions is not None and leaf == new_leaf and module in versions:
            modules[new_module] = versions[module]
    set_metadata(renamed, None if versions is None else modules)
    return renamed
