"""Tensors in files: reading returns the written values, or the error names the damage."""

from __future__ import annotations

import pickle
import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgpack as msgpack_library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tensors import assert_same_tensors, random_tensor, raw_bytes, small_state
from torch import Tensor, nn

from fitloop import CheckpointError
from fitloop._storage import layout, tensors
from fitloop._storage.weight_files import read_weights, write_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

msgpack: Any = msgpack_library


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(list(tensors.DTYPES.values())),
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    transposed=st.booleans(),
)
def test_every_dtype_and_shape_round_trips_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    tensor = random_tensor(dtype, shape)
    state = {"x": tensor.mT if transposed and tensor.dim() > 1 else tensor}
    path = tmp_path / "w.msgpack"
    write_weights(path, state, overwrite=True)
    assert_same_tensors(read_weights(path), state)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"x": random_tensor(dtype, (3, 2))}
    write_weights(tmp_path / "w.msgpack", state)
    assert_same_tensors(read_weights(tmp_path / "w.msgpack"), state)


def test_views_strides_and_lazy_conjugates_round_trip(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    numbers = torch.randn(3, dtype=torch.complex64)
    state: dict[str, Tensor] = {
        "column": base[:, 1],
        "every_other": base[::2, ::3],
        "expanded": base[0].expand(5, 6),
        "scalar": base[1, 1],
        "complex": numbers,
        "conjugate": numbers.conj(),
        "negative": numbers.conj().imag,
        "parameter": nn.Parameter(base),
    }
    write_weights(tmp_path / "w.msgpack", state)
    weights = read_weights(tmp_path / "w.msgpack")
    for name, tensor in state.items():
        assert_same_tensors(
            {name: weights[name]}, {name: tensor.detach().resolve_conj().resolve_neg()}
        )
    assert not weights["parameter"].requires_grad


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    write_weights(tmp_path / "w.msgpack", {"a": shared, "b": shared, "c": shared[:500]})
    assert (tmp_path / "w.msgpack").stat().st_size < 7000
    weights = read_weights(tmp_path / "w.msgpack")
    assert weights["a"].data_ptr() == weights["b"].data_ptr()
    assert torch.equal(weights["c"], shared[:500])


def test_any_msgpack_library_can_walk_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MAX_BIN", 10)
    state = {**small_state(), "empty": torch.empty(0, 3)}
    write_weights(tmp_path / "w.msgpack", state)
    unpacker = msgpack.Unpacker()
    data = (tmp_path / "w.msgpack").read_bytes()
    unpacker.feed(data)
    header = unpacker.unpack()
    assert (header["format"], header["version"], header["kind"]) == ("fitloop", 1, "weights")
    assert header["tensors"][0]["shape"] == [2, 3]
    payloads = []
    for item in unpacker:
        if item is not None:
            assert (unpacker.tell() - len(item)) % 64 == 0
            payloads.append(item)
    assert unpacker.tell() == len(data)
    assert [len(item) for item in payloads] == [10, 10, 4, 10, 6, 0]
    assert b"".join(payloads) == raw_bytes(state["weight"]) + raw_bytes(state["bias"])
    assert_same_tensors(read_weights(tmp_path / "w.msgpack"), state)


def forged(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the header of a file, and compute its checksum again."""
    data = path.read_bytes()
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(data)
    header = unpacker.unpack()
    payloads = [item for item in unpacker if item is not None]
    change(header)
    header.pop("header_crc32", None)
    body = msgpack.packb({**header, "header_crc32": 2**32 - 1})[:-4]
    data = body + struct.pack(">I", zlib.crc32(body))
    for payload in payloads:
        data += layout.frame(len(data), len(payload)) + payload
    path.write_bytes(data)
    return path


# Files that are not complete


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.msgpack"
    write_weights(path, small_state())
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_weights(path)


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.msgpack"
    write_weights(path, small_state())
    data = path.read_bytes()
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                read_weights(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@pytest.mark.parametrize("start", [b"", b"\x87" + layout._MAGIC], ids=["any", "magic"])
def test_junk_is_refused(tmp_path: Path, start: bytes, data: bytes) -> None:
    path = tmp_path / "w.msgpack"
    path.write_bytes(start + data)
    with pytest.raises(CheckpointError):
        read_weights(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (pickle.dumps(small_state), "does not begin as a fitloop file"),
        (b"\x87" + layout._MAGIC, "ends within its header, after 16 bytes"),
        (b"\x87" + layout._MAGIC + b"\x91" * 5000, "its header is no plain msgpack"),
        (b"\x82" + layout._MAGIC + b"\xa1a\xdd\xff\xff\xff\xff", "ends within its header"),
        (b"\x81" + layout._MAGIC, "does not end with a checksum"),
    ],
    ids=["empty", "pickle", "short", "deep", "huge", "no checksum"],
)
def test_foreign_bytes_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "w.msgpack"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "version is 2, from a newer fitloop"),
        (lambda h: h.update(version=True), "version is True"),
        (lambda h: h.update(kind="other"), "holds 'other'; expected 'weights'"),
        (lambda h: h.update(byteorder="middle"), "byte order is 'middle'"),
        (lambda h: h.update(tensors=None), "tensors are None"),
        (lambda h: h["tensors"].append(7), r"tensors\[2\] is 7"),
        (lambda h: h["tensors"].append(h["tensors"][0]), "two tensors have the name 'weight'"),
        (lambda h: h["tensors"].append({"name": "a", "same_as": "z"}), "same as 'z', which"),
        (lambda h: h["tensors"][0].update(dtype="float31"), "dtype 'float31'"),
        (lambda h: h["tensors"][0].update(dtype=[]), r"dtype \[\]"),
        (lambda h: h["tensors"][0].update(dtype="int64"), "which its shape and dtype do not"),
        (lambda h: h["tensors"][0].update(shape=[2, -3]), r"shape \[2, -3\]"),
        (lambda h: h["tensors"][0].update(shape=[1] * 65), "shape"),
        (lambda h: h["tensors"][0].update(shape=[2**40], nbytes=2**42), "truncated to"),
        (lambda h: h["tensors"][0].update(shape=[2**63 - 1, 2], nbytes=2**63), "nbytes"),
        (lambda h: h["tensors"][0].update(crc32=0), "'weight' is damaged: its checksum"),
        (lambda h: h["tensors"].pop(), "bytes trail after its end"),
        (lambda h: h.update(modules=[]), "its modules are no map"),
        (lambda h: h.update(modules={"": 1}), "its modules are no map"),
        (lambda h: h.update(modules={"": {"version": "x"}}), "no whole number"),
    ],
)
def test_forged_headers_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write_weights(tmp_path / "w.msgpack", small_state())
    path = forged(tmp_path / "w.msgpack", change)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_unknown_keys_in_the_header_are_ignored(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.msgpack", small_state())
    path = forged(tmp_path / "w.msgpack", lambda header: header.update(later={"a": [1]}))
    assert_same_tensors(read_weights(path), small_state())


def test_bools_that_are_neither_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.msgpack", {"x": torch.tensor([2], dtype=torch.uint8)})
    path = forged(tmp_path / "w.msgpack", lambda h: h["tensors"][0].update(dtype="bool"))
    with pytest.raises(CheckpointError, match="neither 0 nor 1"):
        read_weights(path)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.msgpack", small_state())
    with (tmp_path / "w.msgpack").open("ab") as file:
        file.write(b"\xc0")
    with pytest.raises(CheckpointError, match="1 bytes trail after its end"):
        read_weights(tmp_path / "w.msgpack")


def test_a_header_beyond_the_limit_is_refused_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "w.msgpack", small_state())
    monkeypatch.setattr(layout, "HEADER_LIMIT", 100)
    with pytest.raises(CheckpointError, match="header takes more than 100 bytes"):
        read_weights(tmp_path / "w.msgpack")
    with pytest.raises(CheckpointError, match="header takes more than 100 bytes"):
        write_weights(tmp_path / "v.msgpack", small_state())


def test_a_header_larger_than_the_first_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_FIRST_READ", 7)
    write_weights(tmp_path / "w.msgpack", small_state())
    assert_same_tensors(read_weights(tmp_path / "w.msgpack"), small_state())
