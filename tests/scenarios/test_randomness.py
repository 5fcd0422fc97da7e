"""With ``seed=`` a run is repeatable bit for bit, and does not change the global generators."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import pytest
import torch
from support.models import (
    Augmented,
    Batch,
    batches,
    bits,
    blobs,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from torch.utils.data import DataLoader

from fitloop import FitLoop, LoopState, SyncFitLoop

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}

History = dict[str, dict[str, dict[str, list[list[float]]]]]


def recorded(fitted: FitLoop | SyncFitLoop) -> History:
    return {
        phase: {
            stage: {name: [run.tolist() for run in runs] for name, runs in names.items()}
            for stage, names in stages.items()
        }
        for phase, stages in fitted.M.to_dict().items()
    }


def random_arguments(**changes: Any) -> dict[str, Any]:
    """Return a training that draws everywhere: shuffle, augmentation, dropout."""
    model = mlp(dropout=0.3)
    train_dl = DataLoader(Augmented(blobs()), 4, shuffle=True)
    valid_dl = DataLoader(Augmented(blobs(14, 2)), 4)
    options = {"model": model, "train_dl": train_dl, "valid_dl": valid_dl, "seed": 41}
    return {**options, **changes}


Outcome = tuple[dict[str, bytes], History]


async def random_run(epochs: tuple[int, ...] = (3,), **changes: Any) -> Outcome:
    fitted = trainer(**random_arguments(**changes))
    for more in epochs:
        await fitted.fit(more, **QUIET)
    return bits(fitted.model), recorded(fitted)


async def test_sync_trainer_when_seeded_then_equals_the_async_one() -> None:
    expected = await random_run()

    def blocking() -> Outcome:
        fitted = sync_trainer(**random_arguments())
        fitted.fit(3, **QUIET)
        return bits(fitted.model), recorded(fitted)

    assert await anyio.to_thread.run_sync(blocking) == expected


@pytest.mark.parametrize("prefetch", [1, 2, 5, None])
async def test_prefetch_when_seeded_then_equals_loading_inline(prefetch: int | None) -> None:
    assert await random_run(prefetch=prefetch) == await random_run(prefetch=0)


async def test_fit_twice_when_nothing_is_restored_then_equals_fit_once() -> None:
    parts, whole = await random_run((2, 2)), await random_run((4,))
    assert parts[0] == whole[0]
    for phase in ("train", "valid"):
        actual, expected = parts[1][phase]["batch_step"], whole[1][phase]["batch_step"]
        assert {
            name: [[x for run in runs for x in run]] for name, runs in actual.items()
        } == expected


async def test_fit_twice_when_there_is_no_validation_then_equals_fit_once() -> None:
    """Nothing is restored without validation, so load_best may stay on."""
    parts, whole = (trainer(**random_arguments(valid_dl=None)) for _ in range(2))
    await parts.fit(2, verbose=False)
    await parts.fit(2, verbose=False)
    await whole.fit(4, verbose=False)
    assert bits(parts.model) == bits(whole.model)


async def test_validation_when_seeded_then_does_not_change_the_training() -> None:
    with_it, without = await random_run(), await random_run(valid_dl=None)
    assert with_it[0] == without[0]
    assert with_it[1]["train"] == without[1]["train"]


def plain_step(state: LoopState) -> dict[str, float]:
    inputs, targets = state.batch
    loss = state.loss_function(state.model(inputs), targets)
    loss.backward()
    state.optimizer.step()
    return {"running_loss": loss.item(), "running_corr": 0}


async def async_step(state: LoopState) -> dict[str, float]:
    return plain_step(state)


async def test_async_step_when_seeded_then_equals_the_plain_one() -> None:
    assert await random_run(train_step=async_step) == await random_run(train_step=plain_step)


async def drawing_batches() -> AsyncIterator[Batch]:
    for batch in batches(160):
        torch.rand(1000)
        yield batch


async def test_async_loader_when_it_draws_then_the_steps_keep_their_numbers() -> None:
    expected = await random_run(train_dl=batches(160))
    assert await random_run(train_dl=drawing_batches) == expected


async def test_seeded_run_when_repeated_then_gives_the_same_bits() -> None:
    seed_process(1)
    first = await random_run()
    seed_process(2)
    assert await random_run() == first


async def test_seeded_run_when_seed_differs_then_gives_other_bits() -> None:
    assert await random_run(seed=42) != await random_run()


@pytest.mark.parametrize("prefetch", [0, 2, None])
async def test_seeded_run_when_over_then_process_generators_are_as_before(
    prefetch: int | None,
) -> None:
    seed_process(51)
    torch.randn(3)  # somewhere in the middle of a sequence
    before = process_generators()
    await random_run(prefetch=prefetch)
    assert process_generators() == before


async def test_callback_when_run_is_seeded_then_draws_from_the_process_generators() -> None:
    """Other random code does not change the stream of the trainer, nor the trainer its numbers."""
    expected = await random_run()
    seed_process(52)
    numbers = [torch.rand(()).item() for _ in range(12)]
    seed_process(52)
    drawn: list[float] = []
    actual = await random_run(callbacks=[lambda _event: drawn.append(torch.rand(()).item())])
    assert actual == expected
    assert drawn[:12] == numbers


async def test_reset_when_fitted_again_then_gives_the_first_bits() -> None:
    fitted = trainer(**random_arguments())
    optimizer = fitted.optimizer
    untrained = bits(fitted.model)
    await fitted.fit(3, **QUIET)
    first = bits(fitted.model), recorded(fitted)

    await fitted.reset()
    assert bits(fitted.model) == untrained
    assert optimizer.state_dict()["state"] == {}

    await fitted.fit(3, **QUIET)
    assert (bits(fitted.model), recorded(fitted)) == first
