"""Whoever is compared does the same training: weights and means of the bare loop."""

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
from benchmarks.overhead import OWN
from benchmarks.peers import PEERS, Peer, Train
from benchmarks.workloads import Means, Timed, make_batches, make_model, make_optimizer

EPOCHS, BATCHES = 3, 8


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def guest(directory: Path) -> Iterator[None]:
    """Let a library of somebody else's warn, log and write where nobody minds."""
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


def trained(train: Train, *, keep: bool) -> tuple[list[Tensor], Means | None, Timed]:
    model = make_model("mlp")
    batches = Timed(make_batches("mlp", BATCHES))
    means = train(model, make_optimizer(model), batches, epochs=EPOCHS, keep=keep)
    return [parameter.detach().clone() for parameter in model.parameters()], means, batches


def check_same_training(train: Train, *, keep: bool) -> None:
    weights, means, batches = trained(train, keep=keep)
    expected, expected_means, _batches = trained(loops.bare, keep=keep)
    assert all(map(torch.equal, weights, expected))
    if expected_means is None:
        assert means is None
    else:
        assert means == pytest.approx(expected_means, rel=1e-5)
    assert len(batches.began) >= EPOCHS  # an epoch is timed from a pass's beginning to the next
    assert batches.seconds_between(EPOCHS - 2) > 0


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "nothing kept"])
@pytest.mark.parametrize("name", OWN)
def test_own_loop_when_it_trained_then_weights_and_means_are_the_bare_loops(
    name: str, keep: bool
) -> None:
    check_same_training(OWN[name], keep=keep)


def test_bare_loop_when_it_trained_then_weights_changed() -> None:
    weights, means, _batches = trained(loops.bare, keep=True)
    assert not any(map(torch.equal, weights, make_model("mlp").parameters()))
    assert means is not None
    assert 0 < means[0] < 10
    assert 0 <= means[1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "nothing kept"])
@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
# Importing these libraries closes over files and deprecations of their own, which are not ours.
@pytest.mark.filterwarnings("ignore")
def test_peer_when_it_trained_then_weights_and_means_are_the_bare_loops(
    peer: Peer, keep: bool, tmp_path: Path
) -> None:
    if absent := [package for package in peer.needs if not is_installed(package)]:
        pytest.skip(f"{', '.join(absent)} not installed")
    with guest(tmp_path):
        try:
            check_same_training(peer.train, keep=keep)
        except NotApplicableError as why:
            assert keep
            pytest.skip(str(why))
