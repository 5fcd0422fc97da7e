"""Torch operations that use its default generators: known before they are called, and intercepted.

The list is derived from torch's own operator schemas, so it fits the torch that is installed. If
the answer is not certain, it is yes: that costs time, while the other answer would cost exactness.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, Protocol

import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode

from fitloop._concurrency.task_state import ThreadBoundMode, function_modes, set_function_modes

_len_torch_dispatch_stack: Callable[[], int] = torch._C._len_torch_dispatch_stack
_BUILTIN = frozenset(
    {BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType}
)
_CALL_PYTHON = frozenset({"apply_", "map_", "map2_"})
"""Operations that call Python functions, which may use random numbers."""
_RUN_HOOKS = frozenset({"run_backward", "_engine_run_backward", "_execution_engine"})
"""Names of autograd's engine, which runs hooks and computes checkpoints again."""
_BACKWARD = (Tensor.backward, torch.autograd.backward)
"""Functions that run autograd's engine and nothing else that could use random numbers."""
_redispatch: Callable[..., Any] | None = getattr(overrides, "redispatch_function", None)
"""Calls a function without asking modes about the function itself; None with an older torch."""
_PLAIN_TYPES = frozenset(
    {Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, nn.UninitializedBuffer}
)
_WATCHED_NAMES = frozenset(
    {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
)
"""Functions that return True while a mode is active; code that asks may choose other kernels."""
_RECURRENT = frozenset({"lstm", "gru", "rnn_relu", "rnn_tanh"})
_DROPOUT_INDEX = 4
"""Index of ``dropout_p`` among the arguments of ``scaled_dot_product_attention``."""


@cache
def rng_ops() -> frozenset[str]:
    """Return the names of operations that may use random numbers, with and without overloads."""
    names = set(_CALL_PYTHON)
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten":
            continue
        has_generator = any("Generator" in str(argument.type) for argument in schema.arguments)
        if has_generator or _is_tagged(name, schema.overload_name):
            names |= {name, f"{name}.{schema.overload_name or 'default'}"}
    return frozenset(names)


def _is_tagged(name: str, overload: str) -> bool:
    try:
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
    except (AttributeError, RuntimeError):  # an operation of TorchScript only
        return False
    return torch.Tag.nondeterministic_seeded in op.tags


def may_use_rng(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> bool:
    """Return whether a call, as a `TorchFunctionMode` gets it, may use the default generators."""
    name = getattr(function, "__name__", "")
    kind = type(function)
    if kind in _BUILTIN:
        is_known = name in rng_ops()
    elif kind is FunctionType:
        if any(map(_may_call, args)) or (kwargs and any(map(_may_call, kwargs.values()))):
            return True
        is_known = _reaches_rng(function)
    else:  # an operation of torch.ops, perhaps of a user, or something new
        packet = str(getattr(function, "_qualified_op_name", ""))
        if getattr(function, "namespace", "") != "aten" and not packet.startswith("aten::"):
            return True
        is_known = name in rng_ops()
    return is_known and _uses_rng_with(name, args, kwargs or {})


def _may_call(argument: object) -> bool:
    """Return whether an argument is, or contains, a function of the user."""
    if isinstance(argument, tuple | list):
        return any(map(_may_call, argument))
    return callable(argument) and not isinstance(argument, Tensor)


def _uses_rng_with(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation uses the default generators with these arguments."""
    generator = kwargs.get("generator")
    if generator is not None:
        return generator is torch.default_generator or generator.device.type != "cpu"
    if kwargs.get("training") is False:  # dropout, rrelu, attention
        return False
    if name == "scaled_dot_product_attention":
        positional = args[_DROPOUT_INDEX] if len(args) > _DROPOUT_INDEX else 0.0
        return bool(kwargs.get("dropout_p", positional) != 0.0)
    if name in _RECURRENT and not kwargs:
        return any(type(argument) is float and argument for argument in args)
    return not (name == "multi_head_attention_forward" and kwargs.get("dropout_p") == 0.0)


@cache
def _reaches_rng(function: FunctionType) -> bool:
    """Return whether a Python function of torch calls such an operation, by the names in it."""
    visited: set[FunctionType] = set()
    todo = [function]
    while todo:
        current = todo.pop()
        if current in visited:
            continue
        visited.add(current)
        if not (current.__module__ or "").startswith("torch"):
            return True
        names = _names(current.__code__)
        if names & _RUN_HOOKS or names & rng_ops():
            return True
        values = [current.__globals__.get(name) for name in names]
        values += [getattr(torch.autograd, name, None) for name in names]
        values += [cell.cell_contents for cell in current.__closure__ or ()]
        todo += [value for value in values if isinstance(value, FunctionType)]
    return False


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


_CODE = (torch.jit.ScriptFunction, nn.Module, functools.partial, MethodType, FunctionType)
"""the code that `CodeTraits` looks at"""


class CodeTraits:
    """Properties of the code of a run that decide whether its steps can be intercepted.

    Args:
        code: modules and functions; those that the functions refer to are looked at too.
    """

    def __init__(self, *code: object) -> None:
        self.is_opaque = False
        """Some of the code is compiled or scripted, or its tensors call code of the user."""
        self._watching: list[nn.Module] = []
        """modules that choose other kernels while a mode of torch is active"""
        self._visited: set[int] = set()
        for item in code:
            self._visit(item)

    def must_hold_lock(self, *, train: bool) -> bool:
        """Return whether steps of a phase cannot be intercepted, or only with other results.

        torch's attention layers compute by a faster way in eval mode, but not under a mode.
        """
        return self.is_opaque or any(not (train and module.training) for module in self._watching)

    def _visit(self, item: object) -> None:
        kind: Any = type(item)  # isinstance would run code of the user's proxies
        if not issubclass(kind, _CODE) or id(item) in self._visited or self.is_opaque:
            return
        self._visited.add(id(item))
        value: Any = item
        if issubclass(kind, torch.jit.ScriptFunction):
            self.is_opaque = True
        elif issubclass(kind, nn.Module):
            for module in value.modules():
                self._visit_module(module)
        elif issubclass(kind, functools.partial):
            self._visit(value.func)
        elif issubclass(kind, MethodType):
            self._visit(value.__self__)
            self._visit_attributes(value.__self__)
            self._visit(value.__func__)
        elif issubclass(kind, FunctionType):
            self._visit_function(value)

    def _visit_function(self, function: FunctionType) -> None:
        if hasattr(function, "_torchdynamo_orig_callable"):
            self.is_opaque = True
        package = _package(function)
        if package in ("torch", "fitloop"):
            return
        values: list[object] = []
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            is_other = isinstance(value, FunctionType) and _package(value) != package
            if not is_other or hasattr(value, "_torchdynamo_orig_callable"):
                values.append(value)  # functions of other libraries are too many
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # the cell is empty
                values.append(cell.cell_contents)
        for value in values:
            self._visit(value)

    def _visit_attributes(self, item: object) -> None:
        with suppress(AttributeError):
            for value in object.__getattribute__(item, "__dict__").values():
                self._visit(value)

    def _visit_module(self, module: nn.Module) -> None:
        self._visited.add(id(module))
        self._visit_attributes(module)
        self.is_opaque = self.is_opaque or (
            isinstance(module, torch.jit.ScriptModule)
            or hasattr(module, "_torchdynamo_orig_callable")
            or type(module).__name__ == "OptimizedModule"
            or getattr(module, "_compiled_call_impl", None) is not None
            or not _PLAIN_TYPES.issuperset(map(type, module.parameters(recurse=False)))
            or not _PLAIN_TYPES.issuperset(map(type, module.buffers(recurse=False)))
        )
        forward = getattr(type(module), "forward", None)
        if isinstance(forward, FunctionType):
            if _names(forward.__code__) & _WATCHED_NAMES:
                self._watching.append(module)
            self._visit_function(forward)


def _package(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


class RngCaller(Protocol):
    """Calls the intercepted operations; a lease."""

    def call_rng_op(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call an operation that may use torch's generators, and return its result."""


class RngFunctionMode(TorchFunctionMode, ThreadBoundMode):
    """Intercepts the torch operations of one thread that may use random numbers.

    torch passes the modes of a thread on to its autograd threads. So ``caller`` also tells which
    lease they belong to.
    """

    def __init__(self, caller: RngCaller) -> None:
        super().__init__()
        self.caller = caller
        self._thread = threading.get_ident()
        self._has_ended = False

    def begin(self) -> None:
        """Intercept the operations of this thread from now on, also those of the user's modes."""
        set_function_modes(function_modes(), bound=self)

    def end(self) -> None:
        """Intercept nothing any more; also from another thread, for one that hangs."""
        self._has_ended = True
        if threading.get_ident() == self._thread:
            set_function_modes(function_modes())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, through the caller if it may use random numbers."""
        runs_user_code = _len_torch_dispatch_stack() or not _PLAIN_TYPES.issuperset(types)
        kwargs = kwargs or {}
        if self._has_ended:
            return func(*args, **kwargs)
        if func in _BACKWARD and _redispatch is not None and not runs_user_code:
            with self:  # for hooks, functions of the user, and checkpoints that are computed again
                return _redispatch(func, types, args, kwargs)
        if runs_user_code or may_use_rng(func, args, kwargs):
            return self.caller.call_rng_op(func, args, kwargs)
        return func(*args, **kwargs)


class _Probe:
    """A caller that counts the calls that are intercepted."""

    def __init__(self) -> None:
        self.draws = 0

    def call_rng_op(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Count a call. No mode is active in it, so only the outermost call is counted."""
        self.draws += 1
        return function(*args, **kwargs)


@cache
def can_intercept() -> bool:
    """Return whether the installed torch calls modes as `RngFunctionMode` expects.

    Tries a draw in a step, one in a hook of its backward, and one in a function that a function of
    torch calls. The caller holds the lock on the generators, which stay as they are.
    """
    was_intercepted: list[bool] = []
    thread = threading.Thread(
        target=_try_interception, args=(was_intercepted,), name="fitloop probe"
    )
    thread.start()  # a thread without modes of the user
    thread.join()
    is_known = {"rand", "dropout", "normal_", "randperm", "bernoulli"} <= rng_ops()
    return is_known and was_intercepted == [True] * 3


def _try_interception(was_intercepted: list[bool]) -> None:
    state, probe = torch.default_generator.get_state(), _Probe()
    mode = RngFunctionMode(probe)

    def tried(call: Callable[[], object]) -> bool:
        before = probe.draws
        call()
        return probe.draws == before + 1

    def draw(*_: Tensor) -> Tensor:
        return torch.rand(1)

    mode.begin()
    try:
        leaf = torch.zeros(1, requires_grad=True)
        leaf.register_hook(draw)  # type: ignore[no-untyped-call]
        distance_loss = nn.functional.triplet_margin_with_distance_loss
        was_intercepted += [
            tried(lambda: torch.rand(1)),
            tried((leaf * 1).sum().backward),
            tried(lambda: distance_loss(leaf, leaf, leaf, distance_function=draw)),
        ]
    except Exception:  # modes are called in another way
        was_intercepted.clear()
    finally:
        mode.end()
        torch.default_generator.set_state(state)
