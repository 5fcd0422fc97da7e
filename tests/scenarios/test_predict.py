"""`predict`: the outputs of the model, batch by batch, and what is left of an early exit."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import (
    Augmented,
    arguments,
    batches,
    blobs,
    loader,
    mlp,
    seed_process,
    sync_trainer,
    trainer,
)
from support.resumed_trainings import QUIET
from torch import Tensor, nn

from fitloop import (
    BusyError,
    ConfigurationError,
    FitLoop,
    LoopState,
    MissingLoaderError,
    Predictions,
    SyncInAsyncError,
)
from fitloop._concurrency.event_loops import loop_scheduler


def expected(model: nn.Module, data: Any) -> list[Tensor]:
    """Return the outputs of a loop written by hand."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        outputs = [model(inputs) for inputs, _targets in data]
    for module, training in modes:
        module.training = training
    return outputs


def are_equal(outputs: list[Tensor], others: list[Tensor]) -> bool:
    return len(outputs) == len(others) and all(map(torch.equal, outputs, others))


async def test_the_outputs_are_those_of_a_loop_written_by_hand() -> None:
    model = mlp(dropout=0.5)
    model[1].eval()
    training = trainer(model=model)
    modes = [module.training for module in training.model.modules()]
    outputs = [output async for output in training.predict(batches())]
    assert are_equal(outputs, expected(training.model, batches()))
    assert not any(output.requires_grad for output in outputs)
    assert [module.training for module in training.model.modules()] == modes
    assert training.M.test.runs == 0
    started = await training.predict()
    assert isinstance(started, Predictions)
    again = [output async for output in started]
    assert are_equal(again, expected(training.model, batches(14, seed=3)))
    assert [output async for output in started] == []
    assert (await training.fit(1, **QUIET)).epochs == 1


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(lambda x, y: x, id="inputs"),
        pytest.param(lambda x, y: [x], id="a list of one"),
        pytest.param(lambda x, y: (x, y), id="pair"),
        pytest.param(lambda x, y: {"inputs": x, "targets": y}, id="mapping"),
        pytest.param(lambda x, y: {"inputs": x}, id="mapping of inputs"),
        pytest.param(lambda x, y: {"input": x}, id="arguments of the model"),
    ],
)
def test_batches_of_many_shapes(shape: Callable[[Any, Any], Any]) -> None:
    training = sync_trainer()
    outputs = list(training.predict([shape(x, y) for x, y in batches()]))
    assert are_equal(outputs, expected(training.model, batches()))


async def test_a_step_of_the_user() -> None:
    async def step(state: LoopState) -> dict[str, Any]:
        await anyio.lowlevel.checkpoint()
        first, _second, targets = state.batch
        return {"output": state.model(first), "targets": targets}

    training = trainer()
    data = [(x, x, y) for x, y in batches()]
    outputs = [output["output"] async for output in training.predict(data, step=step)]
    assert are_equal(outputs, expected(training.model, batches()))
    mappings = [{"image": x, "mask": y} for x, y in batches()]
    for unfit in (data, mappings):
        with pytest.raises(ConfigurationError, match=r"the batch is .* give predict\(step=\)"):
            await training.predict(unfit)
    with pytest.raises(ConfigurationError, match="step is"):
        training.predict(data, step=lambda: None)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_loader_that_draws_is_read_as_by_test(seed: int | None) -> None:
    seen: list[list[Tensor]] = []
    for verb in ("test", "predict"):
        seed_process(1)
        training = sync_trainer(seed=seed)
        read: list[Tensor] = []
        training.model.register_forward_pre_hook(lambda _model, args, to=read: to.append(args[0]))
        data: Any = torch.utils.data.DataLoader(Augmented(blobs()), 8, shuffle=True)
        if verb == "test":
            training.test(data, verbose=False)
        else:
            assert len(list(training.predict(data))) == 4
        seen.append(read)
    assert are_equal(*seen)


class Counted:
    """A loader that counts what was read of it."""

    def __init__(self, length: int = 9) -> None:
        self.length = length
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.length):
            self.read += 1
            yield batches()[0]


async def test_one_output_at_a_time() -> None:
    data = Counted()
    training = trainer()
    count = 0
    async for _output in training.predict(data):
        count += 1
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert data.read == count
    assert count == 9


async def test_an_early_exit_leaves_nothing_behind() -> None:
    training = trainer()
    await training.test(verbose=False)  # trio keeps a thread for some seconds
    threads = threading.active_count()
    async for _output in training.predict(Counted()):
        break
    await training.test(verbose=False)  # waits for the end of the prediction
    assert threading.active_count() <= threads
    with suppress(ZeroDivisionError):
        async for _output in training.predict(Counted()):
            raise ZeroDivisionError
    assert (await training.fit(1, **QUIET)).epochs == 1
    assert all(module.training for module in training.model.modules())


async def test_the_trainer_is_in_use_until_the_end() -> None:
    training = trainer()
    async with training.predict(Counted()) as outputs:
        assert (await anext(outputs)).shape == (8, 3)
        with pytest.raises(BusyError, match="predict"):
            await training.fit(1)
        with pytest.raises(BusyError):
            await training.predict()
        with pytest.raises(BusyError):
            await training.reset()
        assert (await anext(outputs)).shape == (8, 3)
    await training.reset()
    kept = await training.predict(Counted())
    await anext(kept)
    with pytest.raises(BusyError):
        await training.test()
    await kept.aclose()
    await kept.aclose()
    assert [output async for output in kept] == []
    await training.test(verbose=False)
    never = training.predict()
    await never.aclose()
    assert [output async for output in never] == []


async def test_stop_ends_the_iteration() -> None:
    training = trainer()
    count = 0
    async for _output in training.predict(Counted()):
        count += 1
        if count == 3:
            training.stop()
    assert count == 3


async def test_a_type_error_in_a_model_that_takes_the_mapping_is_raised() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(20))

        def forward(self, x: Tensor, scale: Any) -> Tensor:
            return x @ self.weight * len(scale)

    training = trainer(model=Model())
    with pytest.raises(TypeError, match="has no len"):
        await training.predict([{"x": torch.zeros(1, 20), "scale": 2}], cast=False)


async def test_errors_are_the_same_objects_with_their_place() -> None:
    error = KeyError("mine")

    def broken() -> Iterator[Any]:
        yield batches()[0]
        raise error

    training = trainer()
    outputs = training.predict(broken)
    await anext(outputs)
    with pytest.raises(KeyError) as caught:
        await anext(outputs)
    assert caught.value is error
    assert any("loading batch 2" in note for note in error.__notes__)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        await training.predict([torch.zeros(1, 2)])
    with pytest.raises(ConfigurationError, match="gave no batches"):
        await training.predict([])
    with pytest.raises(MissingLoaderError):
        trainer(test_dl=None).predict()
    with pytest.raises(ConfigurationError, match="test_dl is 5"):
        training.predict(5)  # type: ignore[arg-type]
    await training.test(verbose=False)


async def test_a_cancellation_while_an_output_is_awaited() -> None:
    training = trainer()
    entered, leave = threading.Event(), threading.Event()

    with anyio.CancelScope() as scope:
        schedule = loop_scheduler()

        def step(state: LoopState) -> Any:
            if state.batch_num == 2:
                entered.set()
                schedule(scope.cancel)
                leave.wait(HANG_TIMEOUT)
            return state.model(state.batch[0])

        async with anyio.create_task_group() as group:
            group.start_soon(release, scope, leave)
            async for _output in training.predict(Counted(), step=step):
                pass
    assert scope.cancelled_caught
    assert entered.is_set()
    assert (await training.fit(1, **QUIET)).epochs == 1


async def release(scope: anyio.CancelScope, leave: threading.Event) -> None:
    """Let the step go on when the scope is cancelled."""
    try:
        await anyio.sleep_forever()
    finally:
        leave.set()


async def test_an_async_loader_is_closed() -> None:
    closed: list[bool] = []

    async def stream() -> AsyncIterator[Any]:
        try:
            for batch in batches():
                await anyio.lowlevel.checkpoint()
                yield batch
        finally:
            closed.append(True)

    training = trainer()
    outputs = [output async for output in training.predict(stream)]
    assert are_equal(outputs, expected(training.model, batches()))
    async for _output in training.predict(stream):
        break
    await training.test(verbose=False)
    assert closed == [True, True]


async def test_two_tasks_cannot_share_an_iterator() -> None:
    gate = threading.Event()

    def step(state: LoopState) -> Any:
        gate.wait(HANG_TIMEOUT)
        return state.batch_num

    training = trainer()
    outputs = training.predict(batches(), step=step)
    taken: list[Any] = []

    async def take() -> None:
        try:
            taken.append(await anext(outputs))
        except RuntimeError as error:
            taken.append(str(error))
            gate.set()

    async with anyio.create_task_group() as group:
        group.start_soon(take)
        group.start_soon(take)
    assert taken == ["two tasks wait for an output of one prediction; expected one", 1]
    await outputs.aclose()


class TestSync:
    def test_the_iterator_is_plain(self) -> None:
        training = sync_trainer()
        outputs = training.predict(loader(blobs()))
        assert iter(outputs) is outputs
        assert are_equal(list(outputs), expected(training.model, loader(blobs())))

    def test_an_early_exit(self) -> None:
        training = sync_trainer()
        data = Counted()
        for _output in training.predict(data):
            with pytest.raises(BusyError):
                training.test()
            break
        assert data.read == 1
        training.fit(1, **QUIET)

    def test_an_error(self) -> None:
        training = sync_trainer()
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            list(training.predict([torch.zeros(1, 2)]))
        training.fit(1, **QUIET)


async def test_the_sync_trainer_is_refused_in_an_event_loop() -> None:
    with pytest.raises(SyncInAsyncError):
        sync_trainer().predict()


async def test_half_precision_holds_in_predictions() -> None:
    training = FitLoop(**arguments(precision="bf16"))
    outputs = [output async for output in training.predict(batches())]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
