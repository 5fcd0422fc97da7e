"""A copy of one tensor, restored in place: values, memory, shape, gradient.

Handles tensors that are not dense (sparse, quantized, nested), overlap themselves (``expand``),
were made in inference mode, or change their shape or memory after the copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


class TensorCopy:
    """A copy of a tensor; `restore` can be called several times.

    Args:
        values: whether the values are copied; otherwise only memory and shape are restored.
        on_cpu: copy the values to CPU memory.
    """

    def __init__(self, tensor: Tensor, *, values: bool = True, on_cpu: bool = False) -> None:
        if is_lazy(tensor):
            raise ValueError("it is uninitialized: run a batch through its module first")
        self._tensor = tensor
        self._same_memory = tensor.detach()
        self._requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        """the gradient, which is restored as the same object"""
        self._nbytes = _storage_size(tensor)
        is_readable = not tensor.is_meta and not _has_lost_memory(tensor)
        self._values = _values(tensor, on_cpu) if values and is_readable else None

    def restore(self) -> None:
        """Make the tensor as it was."""
        tensor, memory = self._tensor, self._same_memory
        if self._nbytes and _storage_size(memory) < self._nbytes:
            memory.untyped_storage().resize_(self._nbytes)
        if _address(tensor) != _address(memory):
            tensor.data = memory
        if self._values is not None:
            self._write(self._values)
        if tensor.is_leaf:
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad

    def _write(self, values: Tensor) -> None:
        tensor = self._tensor
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            target = _distinct(tensor)  # not detached, which shares no memory if it is sparse
            # A write would invalidate the graph that a tensor with a history belongs to.
            if not tensor.is_leaf and torch.equal(target, values.to(target.device)):
                return
            try:
                target.copy_(values)
            except RuntimeError:
                if tensor.layout == torch.strided:
                    raise
                tensor.data = values.to(tensor.device, copy=True)


def clone_of(tensor: Tensor) -> Tensor:
    """Return a copy with memory of its own and no history; lazy and meta tensors are not copied."""
    if is_lazy(tensor) or tensor.is_meta:
        return tensor
    return tensor.detach().clone()


def _values(tensor: Tensor, on_cpu: bool) -> Tensor:
    values = _distinct(tensor.detach())
    return values.to("cpu", copy=True) if on_cpu and values.device.type != "cpu" else values.clone()


def _distinct(tensor: Tensor) -> Tensor:
    """Return a view without the repeated elements of an expanded tensor."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _storage_size(tensor: Tensor) -> int:
    """Return the size of the memory in bytes; 0 if the tensor has none of the usual kind."""
    try:
        return tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return 0


def _has_lost_memory(tensor: Tensor) -> bool:
    is_plain = type(tensor.detach()) is Tensor and tensor.layout == torch.strided
    return is_plain and not tensor.is_nested and tensor.numel() > 0 and not _storage_size(tensor)


def _address(tensor: Tensor) -> tuple[Any, ...]:
    """Return memory and shape of a tensor, to compare them."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return (tensor.dtype, tensor.device, tensor.layout, tensor.is_nested)
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # a wrapper subclass without storage
        start = 0
    return (start, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
