"""A batch costs no more than it did: opcodes and calls are counted, which no load changes.

Who makes a batch dearer on purpose raises the number here, and says why in the commit. The times
are in ``benchmarks/overhead.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from support.opcode_count import IS_TRACED, Fit, counts_text, work_per_batch
from torch import nn

from fitloop import EMA, FitLoop, LoopState

pytestmark = [
    pytest.mark.skipif(IS_TRACED, reason="something else traces the interpreter"),
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11), reason="opcodes are of Python 3.11 here, others differ"
    ),
]

FEATURES = {"accumulate": 4, "clip_grad": 1.0, "average": EMA(), "precision": "bf16"}


def silent_step(state: LoopState) -> None:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()
    state.optimizer.step()


class Unknown:
    """Batches of which nothing is known, so that they may draw random numbers."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def fitting(
    *,
    keep: bool,
    seed: int | None = None,
    unknown: bool = False,
    looks: bool = True,
    features: Mapping[str, Any] | None = None,
    log_every: int | None = None,
) -> Fit:
    async def fit(number: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        batches: Any = [(torch.randn(2, 4), torch.tensor([0, 1])) for _ in range(number)]
        trainer = FitLoop(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.CrossEntropyLoss(),
            train_dl=Unknown(batches) if unknown else batches,
            train_step=None if keep else silent_step,
            seed=seed,
            nonfinite="raise" if looks else "ignore",
            device="cpu",
            prefetch=0,
            **(features or {}),
        )
        await trainer.fit(1, verbose=False, progress=False, log_every=log_every)

    return fit


@pytest.mark.parametrize(
    ("fit", "opcodes", "calls"),
    [
        pytest.param(fitting(keep=True), 526, 16, id="metrics"),
        pytest.param(fitting(keep=True, log_every=50), 556, 16, id="metrics, logged"),
        pytest.param(fitting(keep=False), 333, 6, id="none"),
        pytest.param(fitting(keep=False, looks=False), 273, 4, id="none, unguarded"),
        pytest.param(fitting(keep=True, seed=0), 526, 16, id="seeded"),
        pytest.param(fitting(keep=True, features=FEATURES), 1110, 29, id="all features"),
        pytest.param(fitting(keep=True, seed=0, unknown=True), 957, 22, id="seeded, uses rng"),
    ],
)
def test_batch_when_trained_then_takes_no_more_opcodes_and_calls_than_it_did(
    fit: Fit, opcodes: int, calls: int
) -> None:
    executed, called = work_per_batch(fit)
    assert executed.total() <= opcodes, counts_text(executed)
    assert called.total() <= calls, counts_text(called)


def test_batch_when_counted_again_then_is_the_same() -> None:
    fit = fitting(keep=True, seed=0, unknown=True)
    assert work_per_batch(fit) == work_per_batch(fit)


def test_state_when_its_attributes_are_read_then_the_interpreter_may_take_its_short_cuts() -> None:
    """With a ``__getattr__`` of its class, each read took ten times as long: 15 us a batch."""
    assert not hasattr(LoopState, "__getattr__")
    assert LoopState.__getattribute__ is object.__getattribute__
