"""The shares of ranks: together they are what one process with larger batches reads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from fitloop import ConfigurationError
from fitloop._data.inspection import sample_counts
from fitloop._data.sharing import SharedBatches, Shares


def loader(samples: int, size: int, **options: object) -> DataLoader[object]:
    return DataLoader(TensorDataset(torch.arange(samples)), size, **options)  # type: ignore[arg-type]


@given(
    samples=st.integers(0, 60),
    size=st.integers(1, 7),
    ranks=st.integers(1, 5),
    drop_last=st.booleans(),
    trains=st.booleans(),
)
def test_shares_when_put_together_then_are_the_batches_of_one_process(
    samples: int, size: int, ranks: int, drop_last: bool, trains: bool
) -> None:
    given_sampler = BatchSampler(SequentialSampler(range(samples)), size, drop_last)
    shares = [
        SharedBatches(given_sampler, rank, ranks, drops_short=trains) for rank in range(ranks)
    ]
    read = [list(share) for share in shares]
    whole = list(BatchSampler(SequentialSampler(range(samples)), size * ranks, drop_last))
    if trains and whole and len(whole[-1]) < ranks:
        whole.pop()  # a rank would have nothing
    together = [
        [*itertools.chain.from_iterable(part or [] for part in parts)]
        for parts in itertools.zip_longest(*read)
    ]
    assert together == whole
    assert [len(share) for share in shares] == [len(part) for part in read]
    assert [share.samples for share in shares] == [sum(map(len, part)) for part in read]
    if trains:
        assert len({len(part) for part in read}) == 1  # or a rank would wait for another one


def test_shares_when_batches_are_of_the_user_then_stay_whole() -> None:
    batches = [[0, 1], [2], [3, 4, 5], [6], [7, 8]]
    shares = [SharedBatches(batches, rank, 2, drops_short=False) for rank in range(2)]
    assert [list(share) for share in shares] == [[[0, 1], [3, 4, 5], [7, 8]], [[2], [6]]]
    assert [len(share) for share in shares] == [3, 2]
    short = SharedBatches(batches, 0, 2, drops_short=True)
    assert (list(short), len(short)) == ([[0, 1], [3, 4, 5]], 2)


def test_share_when_asked_for_again_then_is_the_same_and_knows_its_samples() -> None:
    shares, given_loader = Shares(), loader(10, 2)
    share = shares.of("train_dl", given_loader, 1, 2, trains=True)
    assert shares.of("train_dl", given_loader, 1, 2, trains=True) is share
    assert [batch[0].tolist() for batch in share] == [[2, 3], [6, 7], [9]]
    assert sample_counts(share, None) == (5, 2)
    assert [len(batch[0]) for batch in given_loader] == [2] * 5


@pytest.mark.parametrize(
    ("given_loader", "message"),
    [(loader(3, None), "batch_size=None"), (loader(1, 1), "has 1 samples, and 2 ranks need 2")],  # type: ignore[arg-type]
)
def test_loader_when_it_cannot_be_shared_out_then_is_refused(
    given_loader: DataLoader[object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Shares().of("train_dl", given_loader, 0, 2, trains=True)


def test_loader_when_it_is_shared_out_by_the_user_then_is_left_alone() -> None:
    data = TensorDataset(torch.arange(8))
    sampler: Any = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    given_loader = DataLoader(data, 2, sampler=sampler)
    assert Shares().of("train_dl", given_loader, 0, 2, trains=True) is given_loader
