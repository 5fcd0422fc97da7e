"""Torch operations that use its default generators: known before they are called, and intercepted.

The list is derived from torch's own operator schemas, so it fits the torch that is installed. If
the answer is not certain, it is yes: that costs time, while the other answer would cost exactness.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fitloop._concurrency.task_state import ThreadBoundMode

_BUILTIN = frozenset(
    {BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType}
)
_CALL_PYTHON = frozenset({"apply_", "map_", "map2_"})
"""Operations that call Python functions, which may use random numbers."""
_RUN_HOOKS = frozenset({"run_backward", "_engine_run_backward", "_execution_engine"})
"""Names of autograd's engine, which runs hooks and computes checkpoints again."""
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
        is_known = _reaches_rng(function)
    else:  # an operation of torch.ops, perhaps of a user, or something new
        packet = str(getattr(function, "_qualified_op_name", ""))
        if getattr(function, "namespace", "") != "aten" and not packet.startswith("aten::"):
            return True
        is_known = name in rng_ops()
    return is_known and _uses_rng_with(name, args, kwargs or {})


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
        values += [cell.cell_contents for cell in current.__closure__ or ()]
        todo += [value for value in values if isinstance(value, FunctionType)]
    return False


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def is_opaque(*code: object) -> bool:
    """Return whether one of these modules and functions is compiled or scripted.

    Their torch operations are not intercepted.
    """
    return any(map(_is_opaque, code))


def _is_opaque(code: object) -> bool:
    if hasattr(code, "_torchdynamo_orig_callable") or isinstance(code, torch.jit.ScriptFunction):
        return True
    return isinstance(code, nn.Module) and any(
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_torchdynamo_orig_callable")
        or type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in code.modules()
    )


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
        self._ops = rng_ops()
        self._thread = threading.get_ident()
        self._has_ended = False

    def begin(self) -> None:
        """Intercept the operations of this thread from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Intercept nothing any more; also from another thread, for one that hangs."""
        self._has_ended = True
        if threading.get_ident() == self._thread:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, through the caller if it may use random numbers."""
        if type(func) in _BUILTIN and func.__name__ not in self._ops:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if self._has_ended:
            return func(*args, **kwargs)
        if func is Tensor.backward and not types:
            with self:  # for hooks, and for checkpoints that are computed again
                return _backward(*args, **kwargs)
        if may_use_rng(func, args, kwargs):
            return self.caller.call_rng_op(func, args, kwargs)
        return func(*args, **kwargs)


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Do the same as `Tensor.backward` after its handling of modes."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)
