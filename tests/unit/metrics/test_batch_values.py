from __future__ import annotations

import gc
import math
import tracemalloc
import weakref
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitloop import MetricError, Phase, Stage, UnknownMetricError
from fitloop._metrics.batch_values import CHUNK, BatchValues, _DeviceScalars, as_numbers


def collected(*batches: Any) -> BatchValues:
    values = BatchValues(Phase.TRAIN)
    for number, batch in enumerate(batches, 1):
        values.put(batch, number)
    return values


def column(values: BatchValues, name: str = "x") -> list[float]:
    value = values[name]
    assert isinstance(value, Tensor)
    assert value.dtype is torch.float64
    assert list(values.scalars(len(value))[name]) == value.tolist()
    listed: list[float] = value.tolist()
    return listed


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.1, 0.1),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (Fraction(1, 4), 0.25),
        (torch.tensor(3), 3.0),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(True), 1.0),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (float("inf"), float("inf")),
        (2**53 - 1, 2.0**53 - 1),
    ],
    ids=repr,
)
def test_put_when_value_is_a_number_then_kept_in_full_precision(value: Any, number: float) -> None:
    assert column(collected({"x": value}, {"x": value})) == [number, number]


def test_put_when_value_is_nan_then_kept() -> None:
    value = collected({"x": float("nan")}, {"x": torch.tensor(float("nan"))})["x"]
    assert isinstance(value, Tensor)
    assert value.isnan().tolist() == [True, True]


@pytest.mark.parametrize("nothing", [None, {}])
def test_put_when_step_returns_nothing_then_there_are_no_names(nothing: Any) -> None:
    values = collected(nothing, nothing)
    assert values.names() == []
    assert "x" not in values


@pytest.mark.parametrize("batch", [5, [("x", 1.0)], "x", torch.tensor(1.0), (1, 2)], ids=repr)
def test_put_when_step_returns_no_mapping_then_error_says_what_it_was(batch: Any) -> None:
    with pytest.raises(MetricError, match=r"^train batch_step returned .*; expected a dict"):
        collected(batch)


def test_put_when_mapping_is_no_plain_dict_then_it_will_do() -> None:
    assert column(collected(OrderedDict(x=1.0), OrderedDict(x=2.0))) == [1.0, 2.0]


@pytest.mark.parametrize(
    "value", [None, "1", b"1", object(), [1.0], {"a": 1}, 1j, torch.tensor(1j), np.ones(2)]
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_put_when_value_is_no_metric_then_error_names_it(value: Any, first: bool) -> None:
    values = collected() if first else collected({"x": 1.0})
    with pytest.raises(MetricError, match=r"^train batch_step returned 'x'.*; expected a number"):
        values.put({"x": value}, 1)


@pytest.mark.parametrize("value", [1.0, torch.ones(2)], ids=["number", "tensor"])
def test_put_when_name_is_no_string_then_error(value: Any) -> None:
    with pytest.raises(MetricError, match="metric named 5, a int; expected names to be strings"):
        collected({5: value})


@pytest.mark.parametrize("swap", [False, True], ids=["number-first", "tensor-first"])
@pytest.mark.parametrize("number", [1.0, torch.tensor(1.0)], ids=["float", "0-d"])
def test_put_when_kinds_are_mixed_then_error(swap: bool, number: Any) -> None:
    batches = [{"x": number}, {"x": torch.ones(2)}]
    with pytest.raises(MetricError, match="'x' as a number in one batch and as a tensor"):
        collected(*(reversed(batches) if swap else batches))


def test_put_when_names_are_missing_in_some_batches_then_each_has_what_came() -> None:
    values = collected({"x": 1.0}, {"y": 2.0}, None, {"x": 3.0, "y": 4.0, "z": torch.ones(2)})
    assert values["x"].tolist() == [1.0, 3.0]  # type: ignore[union-attr]
    assert values["y"].tolist() == [2.0, 4.0]  # type: ignore[union-attr]
    assert values.names() == ["x", "y", "z"]
    assert "z" in values
    columns = {name: [list(c) for c in column] for name, column in values.columns().items()}
    assert columns == {"x": [[1.0, 3.0], [0, 3]], "y": [[2.0, 4.0], [1, 3]]}
    assert [str(number) for number in values.scalars(4)["y"]] == ["nan", "2.0", "nan", "4.0"]


def test_put_when_later_batches_return_nothing_then_their_places_are_empty() -> None:
    values = collected({"x": 1.0}, None, {})
    assert str(values.scalars(3)["x"].tolist()) == "[1.0, nan, nan]"
    restored = BatchValues(Phase.TRAIN)
    restored.restore(values.export())
    restored.put({"x": 4.0}, 4)
    assert str(restored.scalars(4)["x"].tolist()) == "[1.0, nan, nan, 4.0]"


def test_columns_when_all_tensors_have_one_element_then_they_are_numbers() -> None:
    values = collected(
        {"norm": torch.ones(1), "pred": torch.ones(1, 1)},
        {"norm": torch.full((1,), 3.0), "pred": torch.ones(2, 1)},
    )
    assert isinstance(values["norm"], list)
    assert {name: list(column) for name, (column, _) in values.columns().items()} == {
        "norm": [1.0, 3.0]
    }
    assert {name: column.tolist() for name, column in values.scalars(2).items()} == {
        "norm": [1.0, 3.0]
    }


def test_getitem_when_value_has_dimensions_then_a_list_of_detached_tensors() -> None:
    weight = torch.ones(2, requires_grad=True)
    value = collected({"x": weight * 2}, {"x": weight * 3})["x"]
    assert isinstance(value, list)
    assert [tensor.tolist() for tensor in value] == [[2.0, 2.0], [3.0, 3.0]]
    assert not any(tensor.requires_grad for tensor in value)


def test_getitem_when_name_is_unknown_then_error_lists_the_known() -> None:
    with pytest.raises(UnknownMetricError, match="x"):
        collected({"x": 1.0})["loss"]


def test_getitem_when_changed_by_the_reader_then_values_are_not() -> None:
    values = collected({"x": 1.0, "y": torch.ones(1)})
    value, tensors = values["x"], values["y"]
    assert isinstance(value, Tensor)
    assert isinstance(tensors, list)
    value.zero_()
    tensors.clear()
    assert column(values) == [1.0]
    assert len(values["y"]) == 1


@pytest.mark.parametrize("shape", [(), (2,)], ids=["scalar", "vector"])
def test_put_when_tensor_is_changed_in_place_afterwards_then_value_is_the_one_returned(
    shape: tuple[int, ...],
) -> None:
    running, values = torch.zeros(shape), BatchValues(Phase.TRAIN)
    for number in range(1, 4):
        running.add_(1)
        values.put({"x": running}, number)
    value = values["x"]
    assert [torch.as_tensor(item).sum().item() / max(1, running.numel()) for item in value] == [
        1.0,
        2.0,
        3.0,
    ]


@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
def test_put_when_tensor_has_a_graph_then_graph_is_let_go(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape, requires_grad=True)
    saved = weight.exp()  # saved for backward by the multiplication
    alive = weakref.ref(saved)
    values = collected({"x": saved * saved})
    del saved
    gc.collect()
    assert alive() is None
    value = values["x"]
    assert all(torch.as_tensor(item).grad_fn is None for item in value)


@pytest.mark.slow
def test_put_when_many_values_come_then_each_takes_nine_bytes() -> None:
    gc.collect()
    tracemalloc.start()
    try:
        before, _peak = tracemalloc.get_traced_memory()
        values = BatchValues(Phase.TRAIN)
        put = values.put
        for number in range(250_000):
            put({"loss": number / 3}, number + 1)
        after, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(values.scalars(250_000)["loss"]) == 250_000
    assert after - before <= 9 * 250_000


# -- scalars on a device: the same path, on the CPU ----------------------------------------------


class Rows:
    """Scalars on a device, and the values that they passed on."""

    def __init__(self) -> None:
        self.out: dict[str, list[float]] = {}
        self.count = 0
        self.rows = _DeviceScalars(lambda name, value: self.out.setdefault(name, []).append(value))

    def put(self, **values: Tensor) -> Rows:
        self.count += 1
        self.rows.put(list(values.items()), self.count)
        return self

    def drained(self) -> dict[str, list[float]]:
        self.rows.drain()
        return self.out


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_device_rows_when_drained_then_all_values_in_order(count: int) -> None:
    rows = Rows()
    for number in range(count):
        rows.put(loss=torch.tensor(float(number)), corr=torch.tensor(number))
    expected = [float(number) for number in range(count)]
    assert rows.drained() == ({"loss": expected, "corr": expected} if count else {})
    assert rows.drained() == rows.out


def test_device_rows_when_names_change_then_order_of_each_is_kept() -> None:
    rows = Rows()
    for number in range(20):
        names = ["a", "b"][: 1 + number % 2] if number % 3 else ["b", "a"]
        rows.put(**{name: torch.tensor(float(number)) for name in names})
    assert rows.drained() == {
        "a": [float(n) for n in range(20)],
        "b": [float(n) for n in range(20) if not n % 3 or n % 2],
    }


@pytest.mark.parametrize(
    ("other", "number"),
    [
        pytest.param(torch.tensor(0.5, dtype=torch.bfloat16), 301, id="bfloat16"),
        pytest.param(torch.tensor(0.5, dtype=torch.float16), 4097, id="float16"),
        pytest.param(torch.tensor(0.5), 2**24 + 1, id="float32"),
        pytest.param(torch.tensor(True), 2**31 + 1, id="bool"),
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["one-row", "two-rows"])
def test_device_rows_when_dtypes_differ_then_no_digit_is_lost(
    other: Tensor, number: int, together: bool
) -> None:
    rows = Rows()
    if together:
        rows.put(loss=other, corr=torch.tensor(number))
    else:
        rows.put(corr=other).put(corr=torch.tensor(number))
    assert rows.drained()["corr"][-1] == number


def test_device_rows_when_tensor_changes_in_place_afterwards_then_value_is_the_one_given() -> None:
    rows, running = Rows(), torch.zeros(())
    for _ in range(3):
        running.add_(1)
        rows.put(x=running)
    assert rows.drained() == {"x": [1.0, 2.0, 3.0]}


def test_device_rows_when_tensor_has_a_graph_then_graph_is_let_go() -> None:
    weight = torch.ones((), requires_grad=True)
    saved = weight.exp()
    alive = weakref.ref(saved)
    rows = Rows().put(x=saved * saved)
    del saved
    gc.collect()
    assert alive() is None
    rows.drained()


class OnDevice(Tensor):
    """A tensor that says it is not on the CPU, so that it goes the way of those that are not."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


def on_device(number: float) -> Tensor:
    tensor: Tensor = torch.tensor(number).as_subclass(OnDevice)
    return tensor


@given(
    plan=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.booleans(), max_size=3), max_size=CHUNK // 16
    ),
    repeat=st.sampled_from([1, 40]),
    look=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_put_when_floats_and_device_values_are_mixed_then_order_is_kept(
    plan: list[dict[str, bool]], repeat: int, look: bool
) -> None:
    values = BatchValues(Phase.TRAIN)
    expected: dict[str, list[float]] = {}
    for number, batch in enumerate(plan * repeat):
        returned = {name: on_device(number) if far else number for name, far in batch.items()}
        values.put(returned, number + 1)
        for name in batch:
            expected.setdefault(name, []).append(float(number))
        if look and number % 7 == 0:
            assert set(values.names()) == set(expected)
    columns = values.columns()
    assert {name: list(column) for name, (column, _batches) in columns.items()} == expected
    assert all(list(column) == list(batches) for column, batches in columns.values())
    for name, column in values.scalars(len(plan * repeat)).items():
        assert [number for number in column if not math.isnan(number)] == expected[name]


def test_put_when_a_float_follows_values_that_have_not_come_then_order_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = collected({"x": on_device(1.0)})
    values._device._copy_to_host()
    values.put({"x": on_device(2.0)}, 2)
    values._device._copy_to_host()
    has_come = iter([True, False])  # the first copy, and not yet the second
    monkeypatch.setattr(_DeviceScalars, "_is_complete", lambda *_event: next(has_come))
    values.collect()
    values.put({"x": 3.0}, 3)
    assert column(values) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("swap", [False, True], ids=["scalar-first", "tensor-first"])
def test_put_when_device_value_and_tensor_are_mixed_then_error(swap: bool) -> None:
    batches: list[dict[str, Any]] = [{"x": on_device(1.0)}, {"x": torch.ones(2)}]
    with pytest.raises(MetricError, match="'x' as a number in one batch and as a tensor"):
        collected(*(reversed(batches) if swap else batches)).scalars(2)


@pytest.mark.cuda
def test_put_when_values_are_on_cuda_then_they_cross_in_order_and_nothing_waits() -> None:
    values = BatchValues(Phase.TRAIN)
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = torch.arange(2 * CHUNK + 5, device="cuda")
        for number in range(2 * CHUNK + 5):
            values.put({"loss": counts[number] / 2, "corr": counts[number]}, number + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert column(values, "loss") == [number / 2 for number in range(2 * CHUNK + 5)]
    assert column(values, "corr") == [float(number) for number in range(2 * CHUNK + 5)]


# -- metrics of epoch_start and epoch_end ---------------------------------------------------------


def test_as_numbers_when_values_are_numbers_then_floats() -> None:
    given_values = {"a": 1, "b": torch.tensor([2.0]), "c": np.array([[3]]), "d": np.float32(0.5)}
    numbers = as_numbers(given_values, Phase.VALID, Stage.EPOCH_END)
    assert numbers == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.5}
    assert {type(value) for value in numbers.values()} == {float}


@pytest.mark.parametrize("value", ["0.5", b"1", None, 1j, torch.tensor(1j), [1.0]], ids=repr)
def test_as_numbers_when_value_is_no_number_then_error_names_it(value: Any) -> None:
    with pytest.raises(MetricError, match=r"^valid epoch_end returned 'a': .*; expected a number"):
        as_numbers({"a": value}, Phase.VALID, Stage.EPOCH_END)


@pytest.mark.parametrize("value", [torch.ones(2), np.ones((1, 2)), torch.ones(0)], ids=repr)
def test_as_numbers_when_value_has_several_elements_then_error_gives_the_shape(value: Any) -> None:
    with pytest.raises(MetricError, match=r"'a' with shape .*; expected one number"):
        as_numbers({"a": value}, Phase.VALID, Stage.EPOCH_END)
