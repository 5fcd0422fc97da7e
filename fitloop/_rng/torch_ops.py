"""Which of torch's functions draw from its default generators: told before they are called.

Derived from torch's own op schemas, so that it knows the ops of the torch that is installed. Where
it cannot tell, it says yes: that costs time, the other answer would cost exactness.
"""

from __future__ import annotations

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
from typing import Any

import torch
from torch import nn

BUILTIN = frozenset(
    {BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType}
)
_CALLERS = frozenset({"apply_", "map_", "map2_"})
"""they call Python functions, which may draw"""
_DROPOUT_PLACE = 4
"""of ``dropout_p`` among the arguments of ``scaled_dot_product_attention``"""
_RECURRENT = frozenset({"lstm", "gru", "rnn_relu", "rnn_tanh"})


@cache
def rng_ops() -> frozenset[str]:
    """Return the names of the ops that may draw, alone and with their overloads."""
    names = set(_CALLERS)
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space != "aten":
            continue
        takes = any("Generator" in str(argument.type) for argument in schema.arguments)
        if takes or _is_tagged(name, schema.overload_name):
            names |= {name, f"{name}.{schema.overload_name or 'default'}"}
    return frozenset(names)


def _is_tagged(name: str, overload: str) -> bool:
    try:
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
    except (AttributeError, RuntimeError):  # an op of TorchScript's alone
        return False
    return torch.Tag.nondeterministic_seeded in op.tags


def may_use_rng(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> bool:
    """Return whether this call of a function that a `TorchFunctionMode` sees may draw."""
    name = getattr(function, "__name__", "")
    kind = type(function)
    if kind in BUILTIN:
        return name in rng_ops() and _really_draws(name, args, kwargs or {})
    if kind is FunctionType:
        return _reaches_a_draw(function) and _really_draws(name, args, kwargs or {})
    # an op of torch.ops, perhaps somebody's own, or something new
    packet = str(getattr(function, "_qualified_op_name", ""))
    if getattr(function, "namespace", "") == "aten" or packet.startswith("aten::"):
        return name in rng_ops() and _really_draws(name, args, kwargs or {})
    return True


def _really_draws(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether it draws with these arguments, so far as that is easily seen."""
    generator = kwargs.get("generator")
    if generator is not None:
        return generator is torch.default_generator or generator.device.type != "cpu"
    if kwargs.get("training") is False:  # the dropouts, rrelu, attention
        return False
    if name == "scaled_dot_product_attention":
        place = args[_DROPOUT_PLACE] if len(args) > _DROPOUT_PLACE else 0.0
        return bool(kwargs.get("dropout_p", place) != 0.0)
    if name in _RECURRENT and not kwargs:
        return any(type(argument) is float and argument for argument in args)
    return not (name == "multi_head_attention_forward" and kwargs.get("dropout_p") == 0.0)


@cache
def _reaches_a_draw(function: FunctionType) -> bool:
    """Return whether a function of torch's in Python calls what may draw, by the names in it."""
    seen: set[FunctionType] = set()
    todo = [function]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if not (current.__module__ or "").startswith("torch"):
            return True
        names = _names(current.__code__)
        if names & _DRAWING_IN_PYTHON or names & rng_ops():
            return True
        found = [current.__globals__.get(name) for name in names]
        found += [cell.cell_contents for cell in current.__closure__ or ()]
        todo += [item for item in found if isinstance(item, FunctionType)]
    return False


_DRAWING_IN_PYTHON = frozenset({"run_backward", "_engine_run_backward", "_execution_engine"})
"""what runs hooks, and what checkpoints compute again"""


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def is_opaque(*modules: object) -> bool:
    """Return whether one of these is compiled or scripted, so that its draws cannot be seen."""
    for module in modules:
        if hasattr(module, "_torchdynamo_orig_callable") or isinstance(
            module, torch.jit.ScriptFunction
        ):
            return True
        if isinstance(module, nn.Module) and any(
            isinstance(part, torch.jit.ScriptModule)
            or hasattr(part, "_torchdynamo_orig_callable")
            or type(part).__name__ == "OptimizedModule"
            or getattr(part, "_compiled_call_impl", None) is not None
            for part in module.modules()
        ):
            return True
    return False
