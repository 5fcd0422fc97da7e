"""Pickles for other processes of the program, large values apart. Sole importer of cloudpickle.

With cloudpickle a function or class is stored by name if another process can import it; else by
value, such as one of a script, of a notebook or inside another function.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

ValueBuffer = pickle.PickleBuffer | bytes


def has_cloudpickle() -> bool:
    """Return whether functions and classes can be stored by value."""
    with suppress(ImportError):
        import cloudpickle  # noqa: F401

        return True
    return False


def pickled(value: object) -> bytes:
    """Return the pickle of a value; raises any error of its pickling."""
    if not has_cloudpickle():
        return pickle.dumps(value)
    import cloudpickle

    data: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return data


def pickled_message(value: object) -> bytes:
    """Return the pickle of plain values, tensors and arrays, which is faster than torch's own."""
    file = io.BytesIO()
    write_pickle(value, file, None)
    return file.getvalue()


def write_pickle(
    value: object,
    file: Any,
    keep_values: Callable[[pickle.PickleBuffer], object] | None,
    override: Callable[[Any], Any] = lambda _value: NotImplemented,
) -> None:
    """Write the pickle of a value to a file; pass the values of arrays and tensors to a function.

    Without a function they are a part of the pickle. ``override`` is called with each object: it
    returns what ``__reduce__`` would, or NotImplemented.
    Raises any error of the pickling.
    """

    def keep(buffer: pickle.PickleBuffer) -> None:
        assert keep_values is not None
        keep_values(buffer)  # returns None: the values are not in the pickle

    pickler = _pickler_class(stores_code=has_cloudpickle())(
        file,
        protocol=pickle.HIGHEST_PROTOCOL,
        buffer_callback=None if keep_values is None else keep,
    )
    pickler.override = override
    pickler.dump(value)


@cache
def _pickler_class(*, stores_code: bool) -> Any:
    base: Any = pickle.Pickler
    reduce_code: Any = lambda _pickler, _value: NotImplemented  # noqa: E731
    if stores_code:
        import cloudpickle

        base, reduce_code = cloudpickle.Pickler, cloudpickle.Pickler.reducer_override

    class ValuePickler(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            reduced = self.override(value)
            if reduced is NotImplemented and type(value) is Tensor:
                reduced = _reduced_tensor(value)
            return reduce_code(self, value) if reduced is NotImplemented else reduced

    return ValuePickler


def _reduced_tensor(tensor: Tensor) -> Any:
    """Return a tensor as a buffer of its values, without the rest of the memory it is a part of."""
    if not tensor.is_leaf or not _is_plain(tensor):
        return NotImplemented
    source, stride = tensor.detach(), None
    if not source.is_contiguous():
        # Another order of the dimensions, as of images with the channels last, is kept.
        order = sorted(range(source.dim()), key=source.stride, reverse=True)
        dense = source.permute(order)
        if dense.is_contiguous():
            source, stride = dense, tensor.stride()
    buffer = pickle.PickleBuffer(_values_of(source))
    return _tensor_of, (buffer, tensor.dtype, tensor.shape, stride, tensor.requires_grad)


def _values_of(tensor: Tensor) -> Any:
    """Return the memory of a plain tensor, or that of a contiguous copy, as an array of bytes.

    No memoryview: the garbage collector of CPython crashes on a PickleBuffer over one.
    """
    # `reshape` alone may return a view with gaps.
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy()


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is its values, dtype and shape, and nothing else."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _tensor_of(
    values: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return the tensor of a buffer, which it keeps and can write to."""
    flat = torch.from_numpy(np.frombuffer(values, np.uint8)).view(dtype)
    tensor = flat.reshape(shape) if stride is None else flat.as_strided(shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor
