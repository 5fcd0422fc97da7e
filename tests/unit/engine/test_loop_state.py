"""The sizes of the batches of a phase, which are stored as changes."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import arguments
from torch.nn.utils.rnn import pack_sequence

from fitloop import ConfigurationError, FitLoop, LoopState, Phase
from fitloop._engine.loop_state import StateWriter

SIZES = st.lists(st.integers(0, 3), max_size=30)


def new_writer() -> StateWriter:
    return StateWriter(FitLoop(**arguments())._state.config, Phase.TRAIN, 1, lambda: None)


def write_batches(writer: StateWriter, sizes: list[int]) -> None:
    for size in sizes:
        writer.next_batch([torch.empty(size, 1)])
        writer.values.put(None, writer.state.batch_num)


@settings(deadline=None)  # the first trainer of a process takes long
@given(before=SIZES, after=SIZES)
def test_batch_sizes_when_exported_and_restored_in_the_middle_are_those_of_all_batches(
    before: list[int], after: list[int]
) -> None:
    first = new_writer()
    write_batches(first, before)
    assert first.state.batch_sizes == before
    assert first.samples == sum(before)
    exported: Any = first.export()
    assert exported["sizes"].tolist() == before
    second = new_writer()
    second.restore(exported)
    write_batches(second, after)
    assert second.state.batch_sizes == before + after
    assert second.state.batch_num == len(before + after)
    assert second.state.size == sum(before + after)


def test_state_when_made_then_has_the_arguments_of_the_constructor_each_with_a_text() -> None:
    state = new_writer().state
    texts = []
    for name in inspect.signature(FitLoop).parameters:
        getattr(state, name)
        member = inspect.getattr_static(LoopState, name)
        if isinstance(member, property):
            texts.append(member.__doc__)
    assert len(set(texts)) == len(texts) > 30
    assert None not in texts
    assert not hasattr(state, "cast_model")  # no argument


def test_batch_sizes_when_they_change_then_all_are_told() -> None:
    writer = new_writer()
    write_batches(writer, [3] * 1000 + [2, 2, 3])
    assert writer.state.batch_sizes == [3] * 1000 + [2, 2, 3]
    assert writer.samples == 3007


def samples_of(kind: Any) -> Any:
    return kind([torch.ones(3, 4, 4) for _ in range(8)])


def jagged() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


class Named(NamedTuple):
    inputs: Any
    targets: Any


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        pytest.param((torch.ones(8, 2), torch.ones(8)), 8, id="pair"),
        pytest.param([torch.ones(8, 2)], 8, id="list-of-one"),
        pytest.param(torch.ones(8, 2), 8, id="tensor"),
        pytest.param({"x": torch.ones(8), "ids": ["a", "b"], "n": 5}, 8, id="dict"),
        pytest.param(Named(torch.ones(8, 2), {"y": np.ones(8)}), 8, id="namedtuple"),
        pytest.param(SimpleNamespace(x=torch.ones(8, 2), y=None), 8, id="fields"),
        pytest.param(((torch.ones(8, 2), torch.ones(8, 3)), torch.ones(8)), 8, id="two-inputs"),
        pytest.param(
            (samples_of(list), [{"boxes": torch.ones(n, 4)} for n in range(8)]), 8, id="detection"
        ),
        pytest.param(
            (samples_of(tuple), tuple(torch.tensor(1) for _ in range(8))), 8, id="samples"
        ),
        pytest.param({"text": ["a"] * 8, "label": [1] * 8}, 8, id="python-lists"),
        pytest.param(["a", "b", "c"], 3, id="texts"),
        pytest.param(
            (pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]), torch.ones(2)), 2, id="packed"
        ),
        pytest.param((torch.ones(8, 2).to_sparse(), torch.ones(8)), 8, id="sparse"),
        pytest.param(
            (jagged(), torch.ones(2)),
            2,
            id="nested",
        ),
        pytest.param((torch.ones(5, 8, 2), torch.ones(8)), None, id="time-first"),
        pytest.param((torch.ones(4), torch.tensor(1)), None, id="one-sample"),
        pytest.param({"images": samples_of(list)}, None, id="samples-or-fields"),
        pytest.param(object(), None, id="object"),
        pytest.param(5, None, id="number"),
        pytest.param([], None, id="empty"),
    ],
)
def test_batch_size_when_tensors_agree_then_is_their_first_dimension(batch: Any, size: Any) -> None:
    writer = new_writer()
    writer.next_batch((torch.ones(3, 2), torch.ones(3)))
    assert writer.state.batch_size == 3
    for _ in range(2):
        writer.next_batch(batch)
        if size is None:
            with pytest.raises(
                ConfigurationError, match=r"samples in train batch .*batch_size_of="
            ):
                _ = writer.state.batch_size
        else:
            assert writer.state.batch_size == size
    assert writer.samples == (None if size is None else 3 + 2 * size)


def test_batch_size_when_tensors_do_not_agree_and_the_step_sets_it_then_it_counts() -> None:
    writer = new_writer()
    for size in (2, 3, 3):
        writer.next_batch((torch.ones(5, size), torch.ones(size)))
        writer.state.batch_size = size
        assert writer.state.size == sum(writer.state.batch_sizes)
    writer.next_batch((torch.ones(6, 4), torch.ones(6)))
    assert writer.state.batch_sizes == [2, 3, 3, 6]
    writer.end()
    assert (writer.state.size, writer.samples) == (14, 14)


@pytest.mark.parametrize("size", [-1, 2.5, "8", None, True], ids=repr)
def test_batch_size_when_set_to_no_number_of_samples_then_error(size: Any) -> None:
    writer = new_writer()
    writer.next_batch(torch.ones(3))
    with pytest.raises(
        ConfigurationError, match=r"state.batch_size was set to .*expected a number"
    ):
        writer.state.batch_size = size


def test_batch_size_when_loader_has_another_then_error_says_both() -> None:
    writer = new_writer()
    writer.begin(3, 20, 8)
    writer.next_batch((torch.ones(8, 2), torch.ones(8)))
    assert writer.state.batch_size == 8
    writer.next_batch((torch.ones(5, 8), torch.ones(5, 8)))  # time first
    with pytest.raises(
        ConfigurationError, match=r"of 5 samples, but the DataLoader has batch_size=8"
    ):
        _ = writer.state.batch_size
    writer.next_batch({"images": samples_of(list)[:4]})  # the last batch, of samples, not fields
    assert writer.state.batch_size == 4


def test_batch_size_when_collate_fn_leaves_out_samples_then_is_that_of_the_others() -> None:
    writer = new_writer()
    writer.begin(5, 40, 8)
    sizes = 7, 8, 0, 1, 6
    for size in sizes:
        batch = (torch.ones(size, 8), torch.ones(size))  # the 8 are features
        writer.next_batch(batch if size else None)
        assert writer.state.batch_size == size
    assert writer.samples == sum(sizes)


@pytest.mark.parametrize("batch", [torch.ones(1, 30), (torch.ones(16, 2), torch.ones(16))])
def test_batch_size_when_samples_are_in_one_row_or_more_than_the_loader_has_then_error(
    batch: Any,
) -> None:
    writer = new_writer()
    writer.begin(3, 20, 8)
    writer.next_batch(batch)
    with pytest.raises(ConfigurationError, match="but the DataLoader has batch_size=8"):
        _ = writer.state.batch_size


def test_batch_size_of_when_given_then_is_asked_for_each_batch() -> None:
    config = FitLoop(**arguments(batch_size_of=lambda batch: batch[0].size(1)))._state.config
    writer = StateWriter(config, Phase.TRAIN, 1, lambda: None)
    for size in (4, 2, 2):
        writer.next_batch((torch.ones(5, size), torch.ones(5)))
        assert writer.state.batch_size == size
    assert writer.state.batch_sizes == [4, 2, 2]
