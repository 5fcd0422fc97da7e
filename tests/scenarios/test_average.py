"""Averaged weights: ``FitLoop(average=)``."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.event_loops import every_loop, one_event_loop
from support.models import BATCHES, arguments, batches, bits, internals, mlp
from support.resumed_trainings import TrainingSetup, check_resumed_training, write_snapshots_at_once
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, swa_utils
from torch.optim.swa_utils import AveragedModel, update_bn

from fitloop import (
    EMA,
    SWA,
    ConfigurationError,
    FitLoop,
    LoopState,
    PhaseEnded,
    SyncFitLoop,
    default_batch_step,
)
from fitloop._storage.weight_files import read_weights
from fitloop._training.averaging import AveragedWeights

anyio_backend = one_event_loop

QUIET: dict[str, Any] = {"print_every": 0, "progress": False}
ema_function: Any = swa_utils.get_ema_multi_avg_fn
swa_function: Any = swa_utils.get_swa_multi_avg_fn
LOSS = nn.CrossEntropyLoss()


def batch_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 3)
    )


def tied_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def spectral_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 3))


MODELS = {
    "mlp": mlp,
    "batch norm": batch_norm_model,
    "tied": tied_model,
    "spectral norm": spectral_model,
}


class HandWritten:
    """A loop with torch's own `AveragedModel`, whose buffers are those of the model."""

    def __init__(self, model: nn.Module, average: Any, optimizers: list[Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self.averaged = AveragedModel(model, multi_avg_fn=average)
        self.has_average = False

    def train(self, *, accumulate: int = 1, update: bool = True) -> None:
        self.model.train()
        data = batches()
        for number, (inputs, targets) in enumerate(data):
            if number % accumulate == 0:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            weight = len(targets) if accumulate > 1 else 1
            loss = LOSS(self.model(inputs), targets)
            (loss if weight == 1 else loss * weight).backward()
            if (number + 1) % accumulate == 0 or number + 1 == len(data):
                if accumulate > 1:
                    first = number - number % accumulate
                    total = sum(len(t) for _x, t in data[first : number + 1])
                    grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                    torch._foreach_div_(grads, total)
                for optimizer in self.optimizers:
                    optimizer.step()
                if update:
                    self.update()

    def update(self) -> None:
        self.averaged.update_parameters(self.model)
        self.has_average = True

    def model_to_validate(self) -> nn.Module:
        """Return a copy of the model with the averaged parameters."""
        copied = copy.deepcopy(self.model)
        if self.has_average:
            pairs = zip(copied.parameters(), self.averaged.module.parameters(), strict=True)
            with torch.no_grad():
                for parameter, average in pairs:
                    parameter.copy_(average)
        return copied

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        model.eval()
        sums: list[float] = [LOSS(model(x), t).item() * len(t) for x, t in batches(seed=2)]
        return sum(sums) / sum(len(t) for _x, t in batches(seed=2))


def averages_of(trainer: FitLoop | SyncFitLoop) -> list[Tensor]:
    average = internals(trainer).average
    assert average is not None
    return list(average.state_dict().get("weights", {}).values())


def valid_arguments(model: nn.Module, optimizer: Any, **changes: Any) -> dict[str, Any]:
    data = {"train_dl": batches(), "valid_dl": batches(seed=2), "test_dl": None}
    criteria = {"criteria": "loss", "criteria_direction": -1}
    return arguments(**{"model": model, "optimizer": optimizer, **data, **criteria, **changes})


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_ema_when_trained_then_equals_the_loop(kind: str, accumulate: int) -> None:
    by_hand = MODELS[kind]()
    loop = HandWritten(by_hand, ema_function(0.9), [Adam(by_hand.parameters(), lr=0.05)])
    losses = []
    for _ in range(3):
        loop.train(accumulate=accumulate)
        losses.append(loop.validate(loop.model_to_validate()))
    model = MODELS[kind]()
    trainer = FitLoop(
        **valid_arguments(
            model, Adam(model.parameters(), lr=0.05), average=EMA(0.9), accumulate=accumulate
        )
    )

    result = await trainer.fit(3, load_best=False, **QUIET)

    assert result.metrics["valid"]["loss"].tolist() == losses
    assert bits(model) == bits(by_hand)
    expected = list(loop.averaged.module.parameters())
    assert all(map(torch.equal, averages_of(trainer), expected))
    assert len(averages_of(trainer)) == len(expected)


async def test_swa_when_batch_norm_is_prepared_then_equals_the_loop() -> None:
    by_hand = batch_norm_model()
    loop = HandWritten(by_hand, swa_function(), [SGD(by_hand.parameters(), lr=0.1)])
    losses = []
    for epoch in range(1, 6):
        loop.train(update=False)
        if epoch >= 2:
            loop.update()
        validated = loop.model_to_validate()
        if loop.has_average:
            update_bn(batches(), validated)
        losses.append(loop.validate(validated))
    model = batch_norm_model()
    average = SWA(start_epoch=2, prepare=partial(update_bn, batches()))
    trainer = FitLoop(**valid_arguments(model, SGD(model.parameters(), lr=0.1), average=average))

    result = await trainer.fit(5, load_best=False, **QUIET)

    assert result.metrics["valid"]["loss"].tolist() == losses
    assert bits(model) == bits(by_hand)
    assert all(map(torch.equal, averages_of(trainer), loop.averaged.module.parameters()))
    await trainer.load_average()
    assert bits(model.eval()) == bits(validated)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (0, 3), (2, 4), (50, 1)])
async def test_ema_when_it_starts_later_or_skips_then_counts_steps(start: int, every: int) -> None:
    by_hand = mlp()
    loop = HandWritten(by_hand, ema_function(0.5), [SGD(by_hand.parameters(), lr=0.1)])
    made = 0

    def update_some() -> None:
        nonlocal made
        if made >= start and (made - start) % every == 0:
            HandWritten.update(loop)
        made += 1

    loop.update = update_some  # type: ignore[method-assign]
    for _ in range(3):
        loop.train()
    model = mlp()
    trainer = FitLoop(
        **valid_arguments(
            model, SGD(model.parameters(), lr=0.1), average=EMA(0.5, start=start, every=every)
        )
    )

    for _ in range(3):
        await trainer.fit(load_best=False, **QUIET)

    assert len(averages_of(trainer)) == (0 if start == 50 else len(list(model.parameters())))
    assert all(map(torch.equal, averages_of(trainer), loop.averaged.module.parameters()))


async def test_best_weights_when_averaged_then_are_those_that_were_scored() -> None:
    model = mlp()
    trainer = FitLoop(**valid_arguments(model, SGD(model.parameters(), lr=0.5), average=EMA(0.8)))

    result = await trainer.fit(4, **QUIET)

    losses = result.metrics["valid"]["loss"].tolist()
    assert result.best_score == min(losses)
    tested = await trainer.test(batches(seed=2), **QUIET)
    assert float(tested["loss"]) == result.best_score
    with pytest.raises(ConfigurationError, match="there is no average"):
        await trainer.save_model(average=True)


async def test_own_steps_when_one_of_two_optimizers_steps_then_the_average_follows() -> None:
    model = mlp()
    optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[-1].parameters(), lr=0.1)]
    reference = AveragedModel(model, multi_avg_fn=ema_function(0.7))

    def step(state: LoopState) -> dict[str, Any]:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        loss.backward()
        if state.batch_num % 2:
            state.optimizers[0].step()
            if state.batch_num == 3:
                state.optimizers[1].step()
            reference.update_parameters(state.model)
        return {"running_loss": loss.detach() * len(targets)}

    trainer = FitLoop(
        **valid_arguments(
            model, optimizers, average=EMA(0.7), train_step=step, valid_step=step_only
        )
    )

    await trainer.fit(2, load_best=False, **QUIET)

    assert int(reference.n_averaged) == 4
    assert all(map(torch.equal, averages_of(trainer), reference.module.parameters()))


def step_only(state: LoopState) -> dict[str, Any]:
    return default_batch_step(state)


@every_loop
@pytest.mark.parametrize("moment", ["error", "cancelled", "stopped"])
@pytest.mark.parametrize("batch", [1, 2, BATCHES])
async def test_validation_when_it_ends_early_then_the_model_has_its_weights(
    moment: str, batch: int
) -> None:
    by_hand = mlp()
    loop = HandWritten(by_hand, ema_function(0.9), [SGD(by_hand.parameters(), lr=0.1)])
    loop.train()
    model = mlp()
    reached, go_on = anyio.Event(), anyio.Event()

    async def valid_step(state: LoopState) -> dict[str, Any]:
        if state.batch_num == batch:
            assert bits(model) == bits(loop.model_to_validate())
            if moment == "error":
                raise RuntimeError("bad batch")
            if moment == "stopped":
                state.stop()
            else:
                reached.set()
                await go_on.wait()
        return default_batch_step(state)

    trainer = FitLoop(
        **valid_arguments(
            model, SGD(model.parameters(), lr=0.1), average=EMA(0.9), valid_step=valid_step
        )
    )
    if moment == "cancelled":
        async with anyio.create_task_group() as group:
            group.start_soon(partial(trainer.fit, 2, load_best=False, **QUIET))
            await reached.wait()
            group.cancel_scope.cancel()
    elif moment == "error":
        with pytest.raises(RuntimeError, match="bad batch"):
            await trainer.fit(2, load_best=False, **QUIET)
    else:
        await trainer.fit(2, load_best=False, **QUIET)

    assert bits(model) == bits(by_hand)
    assert all(map(torch.equal, averages_of(trainer), loop.averaged.module.parameters()))


@pytest.mark.parametrize("average", [EMA(0.9, start=2), SWA(1)], ids=["ema", "swa"])
async def test_dry_runs_when_between_fits_then_leave_no_trace(average: Any) -> None:
    def trainer_of(model: nn.Module) -> FitLoop:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return FitLoop(**valid_arguments(model, optimizer, average=average, seed=3))

    plain, checked = trainer_of(mlp()), trainer_of(mlp())
    await plain.fit(2, load_best=False, **QUIET)
    await plain.fit(2, load_best=False, **QUIET)

    await checked.run_sanity_check()
    await checked.fit(2, load_best=False, **QUIET)
    before = [item.clone() for item in averages_of(checked)]
    await checked.run_sanity_check()
    await checked.run_profiler(steps=2)
    assert all(map(torch.equal, averages_of(checked), before))
    await checked.fit(2, load_best=False, **QUIET)

    assert bits(checked.model) == bits(plain.model)
    assert all(map(torch.equal, averages_of(checked), averages_of(plain)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("average", [EMA(0.9, start=1), SWA(1)], ids=["ema", "swa"])
def test_training_when_interrupted_then_goes_on_to_the_same_averages(
    average: Any, accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)

    def make() -> TrainingSetup:
        model = mlp()
        optimizer = Adam(model.parameters(), lr=0.05)
        return TrainingSetup(
            trainer={
                "model": model,
                "optimizer": optimizer,
                "average": average,
                "accumulate": accumulate,
                "seed": 5,
            },
            fit={"load_best": False},
        )

    check_resumed_training(make, tmp_path)


def test_prepare_when_it_uses_random_numbers_then_the_training_has_its_own(tmp_path: Path) -> None:
    used = []

    def prepare(_model: nn.Module) -> None:
        used.append(torch.rand(1).item())

    def train(average: Any) -> SyncFitLoop:
        model = mlp(dropout=0.5)
        trainer = SyncFitLoop(
            **valid_arguments(model, SGD(model.parameters(), lr=0.1), average=average),
            seed=3,
            save_path=tmp_path,
        )
        trainer.fit(2, load_best=False, **QUIET)
        return trainer

    trained = train(EMA(0.9, prepare=prepare))
    assert bits(trained.model) == bits(train(EMA(0.9)).model)
    assert len(used) == 2
    before = torch.get_rng_state()
    for _ in range(2):
        trained.save_model(average=True, overwrite=True)
    trained.load_average()
    assert torch.equal(torch.get_rng_state(), before)
    assert used[2] == used[3] == used[4] not in used[:2]


def test_load_average_when_prepare_fails_then_the_model_has_its_own_weights() -> None:
    async def awaited(_model: nn.Module) -> None: ...

    model = mlp()
    average = EMA(0.9, prepare=lambda model: awaited(model))
    trainer = SyncFitLoop(
        **valid_arguments(model, SGD(model.parameters(), lr=0.1), average=average, valid_dl=None)
    )
    trainer.fit(1, **QUIET)
    before = bits(model)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"prepare returned .* nothing awaits"):
            trainer.load_average()
        assert bits(model) == before
    with pytest.raises(ConfigurationError, match=r"prepare is .*, an async def function"):
        EMA(0.9, prepare=awaited)


def test_prepare_when_another_thread_ends_the_block_then_buffers_are_restored() -> None:
    model = batch_norm_model()
    average = AveragedWeights(EMA(0.9, prepare=partial(update_bn, batches())), model, steps := [0])
    average.begin()
    steps[0] = 1
    average.after_batch()
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index]
    before = bits(model)
    with average.applied():
        assert bits(model) != before
        average.end_block()
        assert bits(model) == before
        with torch.no_grad():
            model[0].weight.add_(1)  # type: ignore[index]
        later = bits(model)
    assert bits(model) == later


def test_average_when_saved_and_loaded_then_is_in_the_files(tmp_path: Path) -> None:
    model = mlp()
    trainer = SyncFitLoop(
        **valid_arguments(model, SGD(model.parameters(), lr=0.1), average=EMA(), save_path=tmp_path)
    )
    with pytest.raises(ConfigurationError, match="there is no average"):
        trainer.load_average()
    trainer.fit(2, load_best=False, **QUIET)
    raw, averages = bits(model), [item.clone() for item in averages_of(trainer)]

    path = trainer.save_model("average", average=True)
    trainer.save()

    assert bits(model) == raw
    assert all(map(torch.equal, read_weights(path).values(), averages))
    other = mlp()
    loaded = SyncFitLoop(
        **valid_arguments(other, SGD(other.parameters(), lr=0.1), average=EMA(), save_path=tmp_path)
    )
    loaded.load()
    assert all(map(torch.equal, averages_of(loaded), averages))
    loaded.load_average()
    assert all(map(torch.equal, other.parameters(), averages))
    assert averages_of(loaded) == []


async def test_callbacks_when_a_validation_ended_then_see_the_averages() -> None:
    model, seen = mlp(), []

    def look(event: Any) -> None:
        if isinstance(event, PhaseEnded):
            seen.append((event.phase, bits(model)))

    trainer = FitLoop(**valid_arguments(model, SGD(model.parameters(), lr=0.1), average=EMA(0.5)))
    await trainer.fit(1, load_best=False, callbacks=[look], **QUIET)

    (train, raw), (valid, averaged) = seen
    assert (train, valid) == ("train", "valid")
    assert raw == bits(model) != averaged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), "decay of EMA is 1.0"),
        (lambda: EMA(True), "decay of EMA is True"),
        (lambda: EMA(start=-1), "start of EMA is -1"),
        (lambda: EMA(every=0), "every of EMA is 0"),
        (lambda: SWA(0), "start_epoch of SWA is 0"),
        (lambda: SWA(1, prepare=3), "prepare is 3"),  # type: ignore[arg-type]
    ],
    ids=["decay", "flag", "start", "every", "epoch", "prepare"],
)
def test_policy_when_it_cannot_work_then_raises(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_trainer_when_average_cannot_be_right_then_raises() -> None:
    model = batch_norm_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="running statistics of '1', a BatchNorm1d"):
        FitLoop(**arguments(model=model, optimizer=optimizer, average=SWA(1)))
    with pytest.raises(ConfigurationError, match="expected an EMA or SWA"):
        FitLoop(**arguments(model=model, optimizer=optimizer, average=0.999))
