"""Means of batches, however they are added, against sums that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fitloop import Phase
from fitloop._engine.loop_state import _BatchSizes
from fitloop._metrics.batch_values import CHUNK, BatchValues
from fitloop._metrics.means import Means

NUMBERS = st.floats(-10, 10, width=32)
BATCH = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("running_loss", "running_corr", "other"), NUMBERS),
        "running_count": st.integers(0, 9),
    },
)


def sequential(numbers: list[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number
    return total


def expected(batches: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """Return the means of all batches, as a loop written by hand has them."""
    names = {"running_loss": "loss", "running_corr": "accuracy", "other": "other"}
    means = {}
    for name, called in names.items():
        values, weights = [], []
        for batch, size in zip(batches, sizes, strict=True):
            if name in batch:
                values.append(batch[name] * (size if name == "other" else 1))
                weights.append(batch.get("running_count", size) if called == "accuracy" else size)
        if values:
            total = sequential(weights)
            means[called] = sequential(values) / total if total else math.nan
    return means


@given(
    rows=st.lists(st.tuples(BATCH, st.integers(1, 3)), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11)),
)
def test_means_when_batches_are_added_in_parts_then_are_those_of_all(
    rows: list[tuple[dict[str, float], int]], cuts: set[int]
) -> None:
    values, sizes, means = BatchValues(Phase.TRAIN), _BatchSizes(), Means()
    added = 0
    for number, (batch, size) in enumerate(rows, 1):
        values.put(batch, number)
        sizes.change(number, size)
        if number in cuts or number == len(rows):
            means.add(values.between(added, number), sizes.between(added, number))
            added = number
            restored = Means()
            restored.load_state_dict(means.state_dict())
            means = restored
    actual = means.result()
    hand = expected([batch for batch, _size in rows], [size for _batch, size in rows])
    assert {k: repr(v) for k, v in actual.items()} == {k: repr(hand[k]) for k in actual}
    assert actual.keys() == hand.keys()


def test_means_when_a_size_is_not_known_then_begin_anew_as_plain_ones() -> None:
    means = Means()
    means.add({"running_loss": ([8.0, 4.0], [0, 1])}, [4, 2])
    assert means.result() == {"loss": 2.0}
    means.add({}, [])
    means.add({"running_loss": ([3.0, 4.0], [0, 1])}, [-1, 2])
    assert means.result() == {"running_loss": 3.5}


@pytest.mark.parametrize(
    "state",
    [
        {"sums": {"x": 1.0}},
        {"sums": {"x": 1.0}, "weights": {"y": 1.0}},
        {"sums": {"x": 1}, "weights": {"x": 1.0}},
        {"sums": {3: 1.0}, "weights": {3: 1.0}},
    ],
)
def test_means_when_a_state_is_none_then_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="sums of metrics"):
        Means().load_state_dict(state)


class OnDevice(Tensor):
    """A tensor that says it is not on the CPU, so that it goes the way of those that are not."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


def test_values_when_on_a_device_then_arrive_with_their_block() -> None:
    values = BatchValues(Phase.TRAIN)
    for number in range(1, CHUNK + 3):
        values.put({"x": torch.tensor(float(number)).as_subclass(OnDevice)}, number)
        values.collect()  # begins no copy: this device would have to be waited for
        assert values.arrived(number) == (0 if number < CHUNK else CHUNK)
    assert list(values.between(1, 3)["x"][0]) == [2.0, 3.0]
    values.drain()
    assert values.arrived(CHUNK + 2) == CHUNK + 2
    assert list(values.between(CHUNK, CHUNK + 2)["x"][0]) == [CHUNK + 1, CHUNK + 2]
