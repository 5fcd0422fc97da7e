"""Copies of tensors at one moment, in memory that is reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.tensors import random_tensor
from torch import Tensor, nn

from fitloop._storage import tensors
from fitloop._storage.layout import LayoutError, Payload, TensorAlias
from fitloop._storage.tensors import SnapshotBuffers, as_integers, payload_of


def payloads(items: list[Payload | TensorAlias]) -> dict[str, Payload]:
    return {item.name: item for item in items if isinstance(item, Payload)}


def numbers(payload: Payload) -> Tensor:
    """Return what was staged as a tensor; shares its memory."""
    dtype = tensors.DTYPES[payload.dtype]
    return torch.frombuffer(payload.data, dtype=torch.uint8).view(dtype).reshape(payload.shape)


def address(payload: Payload) -> int:
    return int(np.frombuffer(payload.data, dtype=np.uint8).ctypes.data)


def base() -> Tensor:
    return torch.arange(24.0).reshape(4, 6)


SHAPES: dict[str, Any] = {
    "plain": base,
    "column": lambda: base()[:, 1],
    "transposed": lambda: base().T,
    "strided": lambda: base()[::2, ::3],
    "reversed": lambda: base().flip(0),
    "expanded": lambda: base()[0].expand(5, 6),
    "0-d": lambda: base()[1, 1],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one element, odd stride": lambda: base()[:1, 1],
    "parameter": lambda: nn.Parameter(base()),
    "of a graph": lambda: nn.Parameter(base()) * 2,
    "bool": lambda: base() > 7,
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_copy_when_of_any_shape_then_holds_the_same_numbers(name: str) -> None:
    tensor = SHAPES[name]()
    for constant in (set(), {"x"}) if name != "one element, odd stride" else (set[str](),):
        (payload,) = payloads(SnapshotBuffers().copy({"x": tensor}, constant)).values()
        assert (payload.dtype, payload.shape) == (
            tensors.dtype_name(tensor.dtype),
            tuple(tensor.shape),
        )
        assert torch.equal(numbers(payload), tensor.detach())


@pytest.mark.parametrize(
    "tensor",
    [base()[:1, 1], torch.ones(()).expand(1), torch.empty(0).as_strided((0,), (0,))],
    ids=["slice", "expanded", "empty"],
)
def test_payload_when_one_element_has_an_odd_stride_then_is_written(tensor: Tensor) -> None:
    assert len(payload_of("x", tensor, as_integers("x", tensor)).data) == tensor.numel() * 4


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
def test_copy_when_of_any_dtype_then_holds_the_same_bytes(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = random_tensor(dtype, shape)
    (payload,) = payloads(SnapshotBuffers().copy({"x": tensor}, ())).values()
    expected = payload_of("x", tensor, as_integers("x", tensor))
    assert (payload.dtype, payload.shape) == (expected.dtype, expected.shape)
    assert bytes(payload.data) == bytes(expected.data)


def test_copy_when_lazily_conjugate_or_negative_then_holds_the_real_numbers() -> None:
    plain = torch.randn(3, dtype=torch.complex64)
    copied = payloads(SnapshotBuffers().copy({"c": plain.conj(), "n": plain.conj().imag}, ()))
    assert torch.equal(numbers(copied["c"]), plain.conj().resolve_conj())
    assert torch.equal(numbers(copied["n"]), -plain.imag)


def test_copy_when_tensors_are_tied_then_the_memory_is_copied_once() -> None:
    shared = base()
    state = {"a": shared, "b": shared, "c": shared[:2], "d": shared.T, "e": shared.clone()}
    copied = SnapshotBuffers().copy({**state, "f": shared.view(4, 6), "empty": torch.empty(0)}, ())
    assert [item for item in copied if isinstance(item, TensorAlias)] == [
        TensorAlias("b", "a"),
        TensorAlias("f", "a"),
    ]
    assert list(payloads(copied)) == ["a", "c", "d", "e", "empty"]
    for name, payload in payloads(copied).items():
        if name != "empty":
            assert torch.equal(numbers(payload), state[name])


def test_copy_when_one_is_a_lazy_conjugate_of_the_other_then_both_are_copied() -> None:
    plain = torch.randn(3, dtype=torch.complex64)
    copied = SnapshotBuffers().copy({"a": plain, "b": plain.conj()}, ())
    assert not any(isinstance(item, TensorAlias) for item in copied)


def test_copy_when_the_source_changes_then_the_copy_does_not() -> None:
    source, constant = base(), base()
    copied = payloads(SnapshotBuffers().copy({"x": source, "best": constant}, {"best"}))
    source.zero_()
    assert torch.equal(numbers(copied["x"]), base())
    constant.zero_()  # a caller must not do this: the payload refers to this memory
    assert not numbers(copied["best"]).any()
    assert address(copied["best"]) == constant.data_ptr()


def test_copy_when_repeated_then_the_buffers_are_used_again() -> None:
    staging, source = SnapshotBuffers(), {"x": base(), "y": base().T, "z": torch.tensor(3)}
    first = payloads(staging.copy(source, ()))
    source = {name: tensor + 1 for name, tensor in source.items()}
    second = payloads(staging.copy(source, ()))
    for name, payload in second.items():
        assert address(payload) == address(first[name])
        assert torch.equal(numbers(payload), source[name])


@pytest.mark.parametrize(
    "other", [base()[:2], base().double(), torch.arange(24), base().reshape(-1)], ids=str
)
def test_copy_when_a_tensor_has_another_look_then_its_buffer_is_another(other: Tensor) -> None:
    staging = SnapshotBuffers()
    staging.copy({"x": base(), "y": base()}, ())
    copied = payloads(staging.copy({"x": other, "y": base()}, ()))
    assert torch.equal(numbers(copied["x"]), other)
    assert torch.equal(numbers(copied["y"]), base())


def test_copy_when_a_tie_is_made_and_loosened_then_all_numbers_are_right() -> None:
    staging, shared = SnapshotBuffers(), base()
    for second in (shared, base() + 1, shared, base() + 2):
        copied = staging.copy({"a": shared, "b": second}, ())
        assert isinstance(copied[1], TensorAlias) == (second is shared)
        for name, payload in payloads(copied).items():
            assert torch.equal(numbers(payload), {"a": shared, "b": second}[name])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.empty(2, device="meta"), "on the meta device"),
        (lambda: torch.eye(2).to_sparse(), "of layout torch.sparse_coo"),
        (lambda: torch.ones([1] * 65), "65 dimensions"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "torch.quint8"),
    ],
    ids=["meta", "sparse", "dimensions", "quantized"],
)
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_copy_when_a_tensor_has_no_plain_bytes_then_it_is_named(
    make: Callable[[], Tensor], words: str
) -> None:
    with pytest.raises(LayoutError, match=rf"tensor 'bad' .*{words}"):
        SnapshotBuffers().copy({"good": base(), "bad": make()}, ())


def test_copy_when_grad_mode_is_on_then_nothing_is_recorded() -> None:
    parameter = nn.Parameter(base())
    staging = SnapshotBuffers()
    with torch.enable_grad():
        staging.copy({"x": parameter}, ())
        staging.copy({"x": parameter * 2}, ())
    assert not any(buffer.requires_grad for buffer in staging._buffers.values())


@pytest.mark.cuda
def test_copy_when_on_cuda_then_the_buffers_are_pinned_and_used_again() -> None:
    staging, source = SnapshotBuffers(), base().cuda()
    first = payloads(staging.copy({"x": source}, ()))["x"]
    source += 1
    assert torch.equal(numbers(first), base())
    second = payloads(staging.copy({"x": source}, ()))["x"]
    assert address(first) == address(second)
    assert torch.equal(numbers(second), base() + 1)
    assert staging._buffers["x"].is_pinned()
