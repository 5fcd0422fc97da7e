from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fitloop._data.device import DeviceTransfer
from fitloop._data.structure import map_tensors

CPU = torch.device("cpu")


def transfer(batch: Any, dtype: torch.dtype = torch.float32, *, cast: bool = True) -> Any:
    device_transfer = DeviceTransfer(CPU, dtype, cast=cast)
    return device_transfer.finish(device_transfer.start(batch))


def doubles() -> Tensor:
    return torch.ones(2, dtype=torch.float64)


class Pair(NamedTuple):
    inputs: Any
    targets: Any


class Labelled(dict[str, Any]):
    label: str = "none"


class Pickle(list[Any]):
    """A subclass of list."""


class Boxes(list[Any]):
    """A list with a constructor of its own, and an attribute."""

    def __init__(self, inputs: Any, label: str) -> None:
        super().__init__([inputs])
        self.label = label


class Sample(tuple[Any, ...]):
    """A tuple with a constructor of its own, and an attribute."""

    label: str

    def __new__(cls, inputs: Any, label: str) -> Sample:
        made = super().__new__(cls, (inputs, inputs))
        made.label = label
        return made


class Unchangeable(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("it cannot be changed")


class Graph:
    """An object with its own ``.to``, as graph libraries have."""

    def __init__(self) -> None:
        self.moved: list[Any] = []

    def to(self, device: torch.device) -> Graph:
        self.moved.append(device)
        return self


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int32, torch.int64),
        (torch.uint8, torch.int64),
        (torch.int8, torch.int64),
        (torch.int16, torch.int64),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
        (torch.complex64, torch.complex64),
        (torch.complex128, torch.complex128),
    ],
    ids=str,
)
def test_transfer_when_cast_then_floating_is_dtype_and_integer_is_long(
    given_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    tensor = torch.ones(3).to(given_dtype)
    assert transfer(tensor).dtype is dtype
    assert transfer(tensor, cast=False).dtype is given_dtype
    assert transfer(tensor, cast=False) is tensor
    assert torch.equal(transfer(tensor), tensor.to(dtype))


def test_transfer_when_trainer_is_of_other_dtype_then_floating_follows_it() -> None:
    assert transfer(torch.ones(2), torch.float64).dtype is torch.float64
    assert transfer(torch.ones(2), torch.bfloat16).dtype is torch.bfloat16


def test_transfer_when_nothing_changes_then_nothing_is_copied() -> None:
    inputs, targets, mask = torch.ones(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2) > 0
    batch = (inputs, {"targets": targets, "deeper": [mask]})
    moved = transfer(batch)
    assert moved[0] is inputs
    assert moved[1]["targets"] is targets
    assert moved[1]["deeper"][0] is mask


@pytest.mark.parametrize("kind", [tuple, list])
def test_transfer_when_batches_need_nothing_then_a_list_can_still_be_changed(kind: Any) -> None:
    device_transfer = DeviceTransfer(torch.device("cpu"), torch.float32)
    batch = kind([torch.ones(2), torch.zeros(2, dtype=torch.long)])
    for _ in range(3):  # the first pass fills the cache of dtypes
        moved = device_transfer.start(batch)
        assert type(moved) is kind
        assert [id(element) for element in moved] == [id(element) for element in batch]
        assert kind is tuple or moved is not batch


def test_transfer_when_a_later_batch_is_of_another_dtype_then_it_is_cast() -> None:
    device_transfer = DeviceTransfer(torch.device("cpu"), torch.float32)
    for first, second in ((torch.ones(2), torch.ones(2)), (torch.ones(2), doubles())):
        moved = device_transfer.start((first, second, "name"))
        assert [element.dtype for element in moved[:2]] == [torch.float32, torch.float32]
        assert moved[2] == "name"


@pytest.mark.parametrize("batch", [Boxes(doubles(), "a"), Sample(doubles(), "a")])
def test_transfer_when_a_sequence_has_attributes_then_they_are_kept(batch: Any) -> None:
    assert transfer(batch).label == "a"
    assert [item.dtype for item in batch] == [torch.float64] * len(batch)


def test_transfer_when_tensor_is_cast_then_loaders_own_is_left_alone() -> None:
    tensor = doubles()
    batch = {"a": tensor, "b": [tensor]}
    transfer(batch)
    assert batch["a"] is tensor
    assert batch["b"] == [tensor]
    assert tensor.dtype is torch.float64


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([doubles(), "name", 5], id="list"),
        pytest.param((doubles(), None, 2.5), id="tuple"),
        pytest.param({"x": doubles(), "ids": ["a", "b"]}, id="dict"),
        pytest.param(OrderedDict(b=doubles(), a=doubles()), id="ordered-dict"),
        pytest.param(Labelled(x=doubles()), id="dict-subclass"),
        pytest.param(UserDict(x=doubles()), id="user-dict"),
        pytest.param(Pair(doubles(), Pair(doubles(), "x")), id="namedtuple"),
        pytest.param(Pickle([doubles()]), id="list-subclass"),
        pytest.param(Boxes(doubles(), "a"), id="list-constructor"),
        pytest.param(Sample(doubles(), "a"), id="tuple-constructor"),
        pytest.param(torch.linalg.qr(doubles().diag()), id="torch-result"),
        pytest.param(Unchangeable(x=doubles()), id="unchangeable-dict"),
        pytest.param([], id="empty-list"),
        pytest.param((), id="empty-tuple"),
        pytest.param({}, id="empty-dict"),
        pytest.param(([doubles(), {"x": (doubles(), [doubles()])}], doubles()), id="nested"),
        pytest.param("text", id="text"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param(None, id="none"),
        pytest.param(5, id="number"),
        pytest.param({1, 2}, id="set"),
    ],
)
def test_transfer_when_batch_is_nested_then_form_is_kept_and_all_tensors_cast(batch: Any) -> None:
    moved = transfer(batch)
    assert form_of(moved) == form_of(batch)
    assert all(tensor.dtype is torch.float32 for tensor in tensors_in(moved))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch)))


def form_of(item: Any) -> Any:
    """Return the structure: types, keys in order, and all objects but tensors."""
    if isinstance(item, Tensor):
        return Tensor, item.shape
    if isinstance(item, (dict, UserDict)):
        return type(item), [(key, form_of(element)) for key, element in item.items()]
    if isinstance(item, (list, tuple)):
        return type(item), [form_of(element) for element in item]
    return item


def tensors_in(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (dict, UserDict)):
        for element in item.values():
            yield from tensors_in(element)
    elif isinstance(item, (list, tuple)):
        for element in item:
            yield from tensors_in(element)


leaves = st.one_of(
    st.sampled_from([torch.float64, torch.int32, torch.bool]).map(
        lambda dtype: torch.ones(2).to(dtype)
    ),
    st.text(max_size=2),
    st.none(),
)
structures = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.tuples(inner, inner).map(lambda both: Pair(*both)),
    ),
    max_leaves=8,
)


@given(structures)
def test_transfer_when_structure_is_any_then_form_is_kept(batch: Any) -> None:
    assert form_of(transfer(batch)) == form_of(batch)
    expected = {torch.float64: torch.float32, torch.int32: torch.int64, torch.bool: torch.bool}
    dtypes = [expected[tensor.dtype] for tensor in tensors_in(batch)]
    assert [tensor.dtype for tensor in tensors_in(transfer(batch))] == dtypes


def test_transfer_when_defaultdict_then_factory_is_kept() -> None:
    batch: defaultdict[str, list[Tensor]] = defaultdict(list, x=[doubles()])
    moved = transfer(batch)
    assert type(moved) is defaultdict
    assert moved["unknown"] == []
    assert moved["x"][0].dtype is torch.float32
    assert "unknown" not in batch


def test_transfer_when_dict_subclass_has_attributes_then_they_are_kept() -> None:
    batch = Labelled(x=doubles())
    batch.label = "cats"
    moved = transfer(batch)
    assert moved.label == "cats"
    assert moved["x"].dtype is torch.float32
    assert batch["x"].dtype is torch.float64


def test_transfer_when_mapping_cannot_be_changed_then_a_mapping_comes_back() -> None:
    moved = transfer(MappingProxyType({"x": doubles()}))
    assert moved["x"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_transfer_when_sequence_is_packed_then_cast_like_a_tensor(dtype: torch.dtype) -> None:
    packed = pack_sequence([torch.ones(3, 1).to(dtype), torch.ones(2, 1).to(dtype)])
    moved = transfer([packed])[0]
    assert type(moved) is PackedSequence
    assert moved.data.dtype is (torch.float32 if dtype is torch.float64 else torch.int64)
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)
    assert transfer(packed, cast=False).data.dtype is dtype


def test_transfer_when_object_has_to_then_it_is_moved_by_it() -> None:
    graph = Graph()
    assert transfer({"graph": graph})["graph"] is graph
    assert graph.moved == [CPU]


def test_transfer_when_tensor_requires_grad_then_it_still_does() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert transfer([tensor])[0] is tensor


def test_map_tensors_when_type_is_structseq_then_it_is_kept() -> None:
    result = torch.ones(2, 2).max(dim=0)
    mapped = map_tensors(result, lambda tensor: tensor + 1)
    assert type(mapped) is type(result)
    assert torch.equal(mapped[0], torch.full((2,), 2.0))


@dataclass
class Fields:
    inputs: Any
    targets: Any
    note: str = "none"


@dataclass(frozen=True, slots=True)
class Frozen:
    inputs: Any
    targets: Any
    total: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        if self.inputs.dtype is not torch.float64:
            raise ValueError("it takes doubles only")


class OfAttrs:
    """A class as the library attrs makes it."""

    __attrs_attrs__ = (SimpleNamespace(name="inputs"), SimpleNamespace(name="targets"))

    def __init__(self, inputs: Any, targets: Any) -> None:
        self.inputs, self.targets = inputs, targets


class Movable(Fields):
    def to(self, device: torch.device) -> Movable:
        return Movable(self.inputs.to(device), self.targets, f"on {device}")


@pytest.mark.parametrize(
    "kind",
    [Fields, Frozen, OfAttrs, Movable, lambda x, y: SimpleNamespace(inputs=x, targets=y)],
    ids=["dataclass", "frozen", "attrs", "own-to", "namespace"],
)
def test_transfer_when_batch_has_declared_fields_then_they_are_cast_in_a_copy(kind: Any) -> None:
    targets = [torch.zeros(2, dtype=torch.int32)]
    batch = kind(doubles(), targets)
    moved = transfer({"deep": batch})["deep"]
    assert type(moved) is type(batch)
    assert (moved.inputs.dtype, moved.targets[0].dtype) == (torch.float32, torch.int64)
    assert (batch.inputs.dtype, batch.targets[0].dtype) == (torch.float64, torch.int32)
    assert getattr(moved, "total", 3) == 3
    assert kind is not Movable or moved.note == "on cpu"


class Shared(MutableMapping[str, Any]):
    """A mapping whose copy shares its values."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_by_name = values

    def __getitem__(self, name: str) -> Any:
        return self.values_by_name[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.values_by_name[name] = value

    def __delitem__(self, name: str) -> None:
        del self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class Odd(Shared):
    def __init__(self, values: dict[str, Any], more: int) -> None:
        super().__init__(values)


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (Shared({"x": doubles()}), Shared),
        (MappingProxyType({"x": doubles()}), MappingProxyType),
        (Odd({"x": doubles()}, 1), dict),
    ],
    ids=["shared", "proxy", "odd"],
)
def test_transfer_when_mapping_is_unusual_then_loaders_own_is_left_alone(
    batch: Any, kind: Any
) -> None:
    moved = transfer(batch)
    assert type(moved) is kind
    assert moved["x"].dtype is torch.float32
    assert batch["x"].dtype is torch.float64


class Quantity:
    """An object whose ``.to`` converts units."""

    def to(self, unit: str) -> Any:
        raise ValueError(f"{unit} is no unit")


class InPlace:
    """An object whose ``.to`` moves in place and returns nothing."""

    def __init__(self) -> None:
        self.device: Any = None

    def to(self, device: torch.device) -> None:
        self.device = device


def test_transfer_when_to_is_unusual_then_the_object_stays() -> None:
    quantity, in_place = Quantity(), InPlace()
    assert transfer([quantity, in_place]) == [quantity, in_place]
    assert in_place.device == CPU


# -- on a device --------------------------------------------------------------------------------


@pytest.mark.cuda
def test_transfer_when_device_is_cuda_then_values_arrive_with_their_dtypes() -> None:
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    batch = {"x": torch.arange(6.0, dtype=torch.float64), "y": [torch.arange(3, dtype=torch.uint8)]}
    moved = device_transfer.finish(device_transfer.start(batch))
    assert moved["x"].device.type == "cuda"
    assert moved["x"].dtype is torch.float32
    assert moved["y"][0].dtype is torch.int64
    assert moved["x"].tolist() == batch["x"].tolist()  # type: ignore[attr-defined]


@pytest.mark.cuda
def test_transfer_when_tensor_is_on_the_device_already_then_it_is_not_copied() -> None:
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    tensor = torch.ones(3, device="cuda")
    assert (
        device_transfer.finish(device_transfer.start([tensor]))[0].data_ptr() == tensor.data_ptr()
    )


@pytest.mark.cuda
def test_transfer_when_sequence_is_packed_then_it_crosses() -> None:
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    packed = pack_sequence([torch.ones(3, 1, dtype=torch.float64), torch.ones(2, 1).double()])
    moved = device_transfer.finish(device_transfer.start(packed))
    assert moved.data.device.type == "cuda"
    assert moved.data.dtype is torch.float32


@pytest.mark.cuda
def test_transfer_when_many_batches_are_in_flight_then_none_overwrites_another() -> None:
    """Placed ahead and freed while a slow kernel still reads: the allocator must not reuse them."""
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    slow = torch.randn(2048, 2048, device="cuda")
    sums: list[Tensor] = []
    for number in range(50):
        moved = device_transfer.start(torch.full((256, 1024), float(number)))
        following = device_transfer.start(torch.full((256, 1024), -1.0))
        batch = device_transfer.finish(moved)
        for _ in range(3):
            slow = slow @ slow
            slow = slow / slow.norm()
        sums.append(batch.mean() + 0 * slow[0, 0])
        del batch, moved, following
    assert [round(value) for value in torch.stack(sums).tolist()] == list(range(50))


@pytest.mark.cuda
def test_transfer_when_consumer_uses_its_own_stream_then_the_copy_is_waited_for() -> None:
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for number in range(50):
            moved = device_transfer.start(torch.full((1 << 20,), float(number)))
            assert device_transfer.finish(moved).sum().item() == number * (1 << 20)


@pytest.mark.cuda
def test_transfer_when_the_loader_made_it_on_the_device_then_it_is_cast_after_it_was_made() -> None:
    device_transfer = DeviceTransfer(torch.device("cuda"), torch.float32)
    slow = torch.randn(4096, 4096, device="cuda", dtype=torch.float64)
    for number in range(20):
        computed = (slow @ slow).clamp(0, 0) + number
        moved = device_transfer.finish(device_transfer.start([computed]))[0]
        del computed
        assert moved.dtype is torch.float32
        assert moved.sum().item() == number * moved.numel()
