"""When ranks exchange the weights of their losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fitloop import ConfigurationError, FitLoop
from fitloop._concurrency.control import RunControl
from fitloop._engine.optimization import OptimizerSteps, StepCounts


class OtherRank:
    """A second rank, whose losses have a weight of 3 each, or none."""

    def __init__(self, *, has_weight: bool) -> None:
        self.has_weight = has_weight
        self.exchanged: list[list[Any]] = []

    def reduce_in_backward(self, *, reduces: bool) -> None:
        pass

    def reduces_in_backward(self) -> bool:
        return True

    def check_gradients(self) -> None:
        pass

    def average(self, parameters: Iterable[Any]) -> None:
        raise AssertionError(parameters)

    def mean_weights(self, weights: Sequence[Any]) -> list[Any]:
        self.exchanged.append(list(weights))
        return [(weight + (3 if self.has_weight else 1)) / 2 for weight in weights]

    def is_on_any(self, fact: bool) -> bool:
        return fact or self.has_weight


def gradients_of_steps(rank: Any, weights: Sequence[float | None], **options: Any) -> list[float]:
    """Return the gradient of each step of a training whose loss is its only weight."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    trainer = FitLoop(model, optimizer, train_step=lambda _state: None, train_dl=[1], **options)
    gradients: list[float] = []

    def keep(*_arguments: Any) -> None:
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.item())

    optimizer.register_step_post_hook(keep)
    steps = OptimizerSteps(trainer._state.config, StepCounts(1), ranks=rank)
    state = SimpleNamespace(batch_num=0, batches=len(weights), epoch_num=1)
    before, after = steps.batch_hooks(state, RunControl(), defines_all=False)
    for weight in weights:
        state.batch_num += 1
        for hook in before:
            hook()
        steps.optimize(model.weight.sum(), weight, None, state.batch_num)
        for hook in after:
            hook()
    return gradients


def test_weights_when_no_rank_gives_one_then_are_not_exchanged() -> None:
    rank = OtherRank(has_weight=False)
    assert gradients_of_steps(rank, [None, None, None]) == [1, 1, 1]
    assert rank.exchanged == []


@pytest.mark.parametrize(
    ("has_weight", "weights"), [(True, [None, None]), (False, [5, None]), (True, [5, 7])]
)
def test_weights_when_a_rank_gives_one_then_all_exchange_them(
    has_weight: bool, weights: list[float | None]
) -> None:
    rank = OtherRank(has_weight=has_weight)
    own = [1 if weight is None else weight for weight in weights]
    means = [(weight + (3 if has_weight else 1)) / 2 for weight in own]
    gradients = gradients_of_steps(rank, weights)
    assert rank.exchanged == [[weight] for weight in own]
    assert gradients == pytest.approx([w / mean for w, mean in zip(own, means, strict=True)])


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"nonfinite": "skip"}])
def test_weights_when_windows_may_differ_then_are_exchanged(options: dict[str, Any]) -> None:
    rank = OtherRank(has_weight=False)
    gradients_of_steps(rank, [None, None], **options)
    assert len(rank.exchanged) == 2 // options.get("accumulate", 1)


def test_weights_when_the_first_step_had_none_then_a_later_one_is_refused() -> None:
    rank = OtherRank(has_weight=False)
    with pytest.raises(ConfigurationError, match="had no weight on any rank; give a weight in eac"):
        gradients_of_steps(rank, [None, 5])
