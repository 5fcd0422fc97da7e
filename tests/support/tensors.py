"""Small states to write, and bit-for-bit comparison with the state that is read back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitloop._storage import tensors

SUFFIXES = [".msgpack", ".safetensors", ".pt", ".pth"]


def small_state() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1, -1])}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of random bit patterns, which may be NaNs."""
    number = 1
    for length in shape:
        number *= length
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (number * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: Tensor) -> bytes:
    bits = tensor.view(tensors._INTEGER_OF_SIZE[tensor.dtype.itemsize])
    return bits.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(actual: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert raw_bytes(actual[name]) == raw_bytes(tensor)
