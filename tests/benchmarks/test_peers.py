"""All compared trainers train alike: to the weights and the means of the bare loop."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import loops
from benchmarks.harness import NotApplicableError, is_installed
from benchmarks.overhead import BARE, FEATURE_LOOPS, LOOPS
from benchmarks.peers import PEERS, Peer, Train
from benchmarks.workloads import Means, TimedBatches, make_batches, make_model, make_optimizer

EPOCHS, BATCHES = 3, 8


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def silenced(directory: Path) -> Iterator[None]:
    """Silence warnings and logs of another library, and let it write into ``directory``."""
    before = Path.cwd()
    variables = dict(os.environ)
    os.chdir(directory)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def train_small(
    train: Train, *, keep_metrics: bool
) -> tuple[list[Tensor], Means | None, TimedBatches]:
    model = make_model("mlp")
    batches = TimedBatches(make_batches("mlp", BATCHES))
    means = train(model, make_optimizer(model), batches, epochs=EPOCHS, keep_metrics=keep_metrics)
    return [parameter.detach().clone() for parameter in model.parameters()], means, batches


def check_same_training(train: Train, bare: Train = loops.bare, *, keep_metrics: bool) -> None:
    weights, means, batches = train_small(train, keep_metrics=keep_metrics)
    expected, expected_means, _batches = train_small(bare, keep_metrics=keep_metrics)
    assert all(map(torch.equal, weights, expected))
    if expected_means is None:
        assert means is None
    else:
        assert means == pytest.approx(expected_means, rel=1e-5)
    assert (
        len(batches.pass_starts) >= EPOCHS
    )  # an epoch is timed from the start of its pass to the next
    assert batches.seconds_between(EPOCHS - 2) > 0


@pytest.mark.parametrize("keep_metrics", [True, False], ids=["metrics", "no metrics"])
@pytest.mark.parametrize("name", LOOPS)
def test_loop_when_it_trained_then_weights_and_means_are_the_bare_loops(
    name: str, keep_metrics: bool
) -> None:
    check_same_training(LOOPS[name], keep_metrics=keep_metrics)


@pytest.mark.parametrize("keep_metrics", [True, False], ids=["metrics", "no metrics"])
def test_fitloop_when_all_features_are_used_then_trains_as_the_loop_with_them(
    keep_metrics: bool,
) -> None:
    with_fitloop, bare = FEATURE_LOOPS["fitloop"], FEATURE_LOOPS[BARE]
    check_same_training(with_fitloop, bare, keep_metrics=keep_metrics)


def test_bare_loop_when_it_trained_then_weights_changed() -> None:
    weights, means, _batches = train_small(loops.bare, keep_metrics=True)
    assert not any(map(torch.equal, weights, make_model("mlp").parameters()))
    assert means is not None
    assert 0 < means[0] < 10
    assert 0 <= means[1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("keep_metrics", [True, False], ids=["metrics", "no metrics"])
@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
# These libraries leave files open and use deprecated functions on import.
@pytest.mark.filterwarnings("ignore")
def test_peer_when_it_trained_then_weights_and_means_are_the_bare_loops(
    peer: Peer, keep_metrics: bool, tmp_path: Path
) -> None:
    if missing := [package for package in peer.needs if not is_installed(package)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    with silenced(tmp_path):
        try:
            check_same_training(peer.train, keep_metrics=keep_metrics)
        except NotApplicableError as reason:
            assert keep_metrics
            pytest.skip(str(reason))
