"""Nested values: decoding returns the same types, or the error names the path of a value."""

from __future__ import annotations

import enum
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.state_comparison import fingerprint
from torch import Tensor, nn

from fitloop._storage import layout
from fitloop._storage.encoding import (
    _FROM_ITEMS,
    _FROM_PAIRS,
    _FROM_VALUE,
    MAX_DEPTH,
    Decoder,
    Encoder,
)
from fitloop._storage.layout import LayoutError
from fitloop._storage.tensors import SnapshotBuffers


def back(value: Any) -> Any:
    """Encode, pack, unpack and decode."""
    encoder = Encoder()
    packed = layout.pack(encoder.encode(value, "state"))
    return Decoder(list(encoder.tensors.values())).decode(layout.unpack(packed, "the tree"))


# -- what comes back -------------------------------------------------------------------------------

NUMBERS = ["?", *(sign + size for sign in "iu" for size in "1248"), "f2", "f4", "f8", "c8", "c16"]
TORCH_VALUES = [
    *(torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.uint16, torch.quint8),
    *(torch.float8_e4m3fn, torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")),
    *(torch.device("cuda"), torch.strided, torch.sparse_coo, torch.contiguous_format),
    *(torch.channels_last, torch.channels_last_3d, torch.preserve_format),
    *(torch.Size(()), torch.Size((2, 0, 5))),
]
arrays = st.sampled_from(NUMBERS).flatmap(
    lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_side=3, min_side=0))
)
hashable_leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.binary(max_size=9)),
    *(st.text(max_size=9), st.sampled_from(["!", "!tensor", "", "state"]), st.complex_numbers()),
    st.sampled_from(TORCH_VALUES),
)
hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
scalars = st.sampled_from(NUMBERS).flatmap(lambda kind: hnp.from_dtype(np.dtype(kind)))
tensors = arrays.map(lambda array: torch.from_numpy(np.array(array)))
values = st.recursive(
    st.one_of(hashable_leaves, scalars, arrays, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.sets(hashables, max_size=3),
        st.frozensets(hashables, max_size=3),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.dictionaries(st.sampled_from(["!tensor", "!", "a"]), inner, max_size=2),
        st.dictionaries(hashables, inner, max_size=3),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, st.integers(), max_size=3).map(Counter),
        st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 5)),
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(value=values)
def test_tree_when_encoded_and_decoded_then_is_the_same(value: Any) -> None:
    assert fingerprint(back(value)) == fingerprint(value)


@pytest.mark.parametrize("value", TORCH_VALUES, ids=str)
def test_tree_when_of_torchs_plain_values_then_is_the_same(value: Any) -> None:
    decoded = back(value)
    assert type(decoded) is type(value)
    assert decoded == value


@pytest.mark.parametrize(
    "value",
    [
        *(
            2**63,
            2**64,
            -(2**63) - 1,
            2**8191,
            -(2**8191),
            float("nan"),
            float("-inf"),
            -0.0,
            1e-320,
        ),
        *(complex("nan"), complex(0.0, -0.0), "\0", "😀", b"", (), set(), frozenset(), {}, []),
        *(OrderedDict(), Counter(), deque(maxlen=0), Counter(a=-1, b=2), {"!": 1}, {"": {}}),
        *({1: "int", "1": "text", (1,): "tuple", None: 0, 1.5: 0}, {True: 1}, {"a": {"!a": 1}}),
        *(np.float64("nan"), np.bool_(True), np.uint64(2**64 - 1), np.float16(0.1), np.int8(-1)),
        *(np.array(3), np.empty((0, 3)), np.arange(6, dtype="u2").reshape(2, 3).T),
        *(np.arange(9.0)[::-2], np.array([True, False]), np.array([1 + 2j], dtype="c8")),
    ],
    ids=lambda value: f"{type(value).__name__} {value!r:.20}",
)
def test_tree_when_of_special_values_then_is_the_same(value: Any) -> None:
    assert fingerprint(back(value)) == fingerprint(value)


def test_tree_when_of_an_extended_float_then_is_the_same() -> None:
    value = np.longdouble("0.1")
    assert back(value) == value
    assert type(back(value)) is np.longdouble


def test_tree_when_of_an_array_then_the_copy_is_its_own_and_can_be_written_to() -> None:
    decoded = back({"x": np.arange(3)})["x"]
    decoded[0] = 7
    encoder = Encoder()
    source = np.arange(3)
    encoder.encode(source, "state")
    source[0] = 9
    assert encoder.tensors["state"].tolist() == [0, 1, 2]


def test_tree_when_tensors_are_nested_then_they_are_named_by_their_paths() -> None:
    encoder = Encoder()
    encoder.encode(
        {"a": [torch.ones(1), {"b": torch.zeros(2)}], "c": nn.Parameter(torch.ones(3))}, "s"
    )
    assert list(encoder.tensors) == ["s/a/0", "s/a/1/b", "s/c"]
    assert not encoder.tensors["s/c"].requires_grad


def test_tree_when_two_paths_read_the_same_then_both_tensors_are_kept() -> None:
    value = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.ones(2), "1": torch.ones(3)}
    assert fingerprint(back(value)) == fingerprint(value)


KINDS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "deque": lambda inner: deque([inner], 3),
    "map": lambda inner: {1: inner},
    "ordered": lambda inner: OrderedDict(a=inner),
    "marked": lambda inner: {"!a": inner},
}


def nested(kind: str, levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = KINDS[kind](value)
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_tree_when_nested_as_deep_as_allowed_then_is_the_same(kind: str) -> None:
    value = nested(kind, MAX_DEPTH)
    assert repr(back(value)) == repr(value)


@pytest.mark.parametrize("kind", KINDS)
def test_tree_when_nested_deeper_then_is_refused(kind: str) -> None:
    with pytest.raises(LayoutError, match=f"nested more than {MAX_DEPTH} levels deep"):
        Encoder().encode(nested(kind, MAX_DEPTH + 1), "state")


# -- what is refused -------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Name(enum.StrEnum):
    A = "a"


class OwnDict(dict[str, int]):
    pass


class OwnText(str):
    __slots__ = ()


class OwnList(list[int]):
    pass


class OwnFloat(float):
    __slots__ = ()


class OwnArray(np.ndarray[Any, Any]):
    pass


Pair = namedtuple("Pair", "a b")

UNFIT = [
    *(print, lambda: 0, object(), object, Colour.RED, Number.ONE, Name.A, OwnDict(), OwnText("a")),
    *(OwnList(), OwnFloat(1), Pair(1, 2), defaultdict(int), range(3), slice(3), bytearray(b"a")),
    *(memoryview(b"a"), np.dtype("f4"), np.str_("a"), np.bytes_(b"a"), np.datetime64(1, "s")),
    *(np.array(["a"]), np.array([None]), np.zeros(1, "f4,i4"), np.zeros(2).view(OwnArray)),
    *(
        np.zeros(2, ">f4"),
        np.zeros(2, "g"),
        np.ma.masked_array([1.0], [True]),
        np.array([[1, "b"]]),
    ),
    *(torch.Generator(), nn.Linear(1, 1), Exception("a"), iter(()), sys, ..., NotImplemented),
    np.datetime64("NaT"),
]


@pytest.mark.parametrize("value", UNFIT, ids=lambda value: f"{type(value).__name__}")
def test_tree_when_a_value_is_of_another_kind_then_the_path_is_named(value: Any) -> None:
    with pytest.raises(LayoutError, match=r"(?s)^state/a/1/b is a.*cannot be kept"):
        Encoder().encode({"a": [0, {"b": value}]}, "state")


@pytest.mark.parametrize("key", [Number.ONE, OwnText("k"), print, Pair(1, 2)], ids=repr)
def test_tree_when_a_key_is_of_another_kind_then_the_path_is_named(key: Any) -> None:
    with pytest.raises(LayoutError, match=r"^state/a \(a key\) is a"):
        Encoder().encode({"a": {key: 1}}, "state")


def test_tree_when_a_set_holds_another_kind_then_the_path_is_named() -> None:
    with pytest.raises(LayoutError, match=r"^state/a/0 is a"):
        Encoder().encode({"a": {Number.ONE}}, "state")


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, [{"a": "x\ud800"}]], ids=repr)
def test_tree_when_text_has_half_a_pair_then_the_path_is_named(value: Any) -> None:
    with pytest.raises(LayoutError, match=r"^state.* half a surrogate pair"):
        Encoder().encode(value, "state")


def test_tree_when_it_holds_itself_then_is_refused() -> None:
    circle: list[Any] = []
    circle.append([{"a": (circle, circle)}])
    mapping: dict[Any, Any] = {}
    mapping[1] = mapping
    for value in (circle, mapping):
        with pytest.raises(LayoutError, match="nested more than"):
            Encoder().encode(value, "state")


@pytest.mark.parametrize("make", [lambda n: [n], lambda n: {n: 1}], ids=["item", "key"])
@pytest.mark.parametrize("bits", [8193, 13_500, 14_500, 10**6])
def test_tree_when_an_integer_is_enormous_then_is_refused(
    make: Callable[[int], Any], bits: int
) -> None:
    """Python writes no more than 4300 digits."""
    for sign in (1, -1):
        with pytest.raises(LayoutError, match="an integer of more than 8192 bits"):
            Encoder().encode(make(sign * 2 ** (bits - 1)), "state")


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.jagged], ids=str)
def test_tree_when_of_a_rare_layout_then_is_refused_or_the_same(layout: torch.layout) -> None:
    try:
        packed = Encoder().encode(layout, "state")
    except LayoutError:
        return
    assert Decoder([]).decode(packed) == layout


SPARSE: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "without values": lambda: torch.zeros(2, 2).to_sparse(),
    "hybrid": lambda: torch.ones(2, 3).to_sparse(1),
    "duplicated": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2), (3,)),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", SPARSE)
def test_tree_when_a_tensor_is_sparse_then_is_the_same(kind: str) -> None:
    tensor = SPARSE[kind]()
    decoded = back({"a": tensor})["a"]
    assert (decoded.layout, decoded.shape) == (tensor.layout, tensor.shape)
    assert torch.equal(decoded.to_dense(), tensor.to_dense())
    if tensor.layout == torch.sparse_coo:
        assert (decoded._nnz(), decoded.is_coalesced()) == (tensor._nnz(), tensor.is_coalesced())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_tensors_when_one_is_nested_then_its_path_is_named(layout: torch.layout) -> None:
    encoder = Encoder()
    rows = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    encoder.encode({"a": [rows]}, "state")
    with pytest.raises(LayoutError, match=r"'state/a/0' is nested"):
        SnapshotBuffers().copy(encoder.tensors, constant=())


# -- forged ones -----------------------------------------------------------------------------------

MARKS = ["!tensor", "!array", "!deque", "!x", "!", *_FROM_ITEMS, *_FROM_PAIRS, *_FROM_VALUE]
plain = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats()),
        *(st.text(max_size=6), st.binary(max_size=6), st.integers(-3, 3)),
        st.sampled_from(["<f4", "O", "V", "f4,f4", "float32", "cpu", "cuda:-1", "1e9", "strided"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(lambda mark, content: {mark: content}, st.sampled_from(MARKS), inner),
        st.builds(
            lambda mark, pairs: {mark: [list(pair) for pair in pairs]},
            st.sampled_from(sorted(_FROM_PAIRS)),
            st.lists(st.tuples(inner, inner), max_size=3),
        ),
    ),
    max_leaves=15,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(value=plain)
def test_decoder_when_a_tree_is_forged_then_only_layout_errors_come(value: Any) -> None:
    with suppress(LayoutError):
        Decoder([torch.ones(2), torch.zeros(())]).decode(value)


@pytest.mark.parametrize(
    "value",
    [
        *({"!tensor": number} for number in (-1, 1, 2**70, True, 0.0, "0", None, [0])),
        *({"!array": 1}, {"!new": 1}, {"!": 1}, {"!tuple": 5}, {"!set": [[1]]}, {"!size": ["a"]}),
        *({"!map": [[1]]}, {"!map": [[1, 2], [1, 3]]}, {"!map": [[[1], 2]]}, {"!map": {"a": 1}}),
        *({"!deque": [1]}, {"!deque": [-1, []]}, {"!deque": [None, 5]}, {"!deque": None}),
        *(
            {"!int": "x"},
            {"!int": "1" * 5000},
            {"!int": 5},
            {"!complex": [1, 2, 3]},
            {"!complex": 1},
        ),
        *({"!number": ["<f4", b"123"]}, {"!number": ["O", b"1" * 8]}, {"!number": ["<f4", "1234"]}),
        *(
            {"!number": ["S4", b"1234"]},
            {"!number": ["<f4"]},
            {"!number": [[["a", "O"]], b"1" * 8]},
        ),
        *({"!sparse": 1}, {"!sparse": ["sparse_coo", [2], True, []]}),
        *({"!sparse": [layout, [2], True, [{"!tensor": 0}]]} for layout in ("strided", "x", 1)),
        *({"!dtype": "nn"}, {"!dtype": "tensor"}, {"!dtype": 1}, {"!device": "moon"}),
        *({"!layout": "round"}, {"!memory_format": "any"}, {"!device": None}, {1: 2}, [{2: 2}]),
    ],
    ids=repr,
)
def test_decoder_when_a_value_is_forged_then_it_is_refused(value: Any) -> None:
    with pytest.raises(LayoutError):
        Decoder([torch.ones(1)]).decode({"a": value})


def test_decoder_when_a_tree_is_nested_without_end_then_is_refused() -> None:
    value: Any = []
    for _ in range(900):
        value = [value]
    with pytest.raises(LayoutError, match="nested more than"):
        Decoder([]).decode(value)
    marked: Any = {"!tuple": []}
    for _ in range(400):
        marked = {"!map": [[marked, marked]]}
    with pytest.raises(LayoutError, match="nested more than"):
        Decoder([]).decode(marked)


def test_decoder_when_a_dtype_is_forged_then_torch_imports_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def lazily(name: str) -> Any:
        asked.append(name)
        raise AttributeError(name)

    monkeypatch.setattr(torch, "__getattr__", lazily)
    with pytest.raises(LayoutError):
        Decoder([]).decode({"!dtype": "some_module_that_torch_imports_when_it_is_asked_for"})
    assert asked == []
