"""Modes of torch and context variables that hold around a run, and in its async stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch
from support.models import arguments, batches, bits, internals, mlp, sync_trainer, trainer
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fitloop import (
    Checkpoint,
    FitLoop,
    LoopState,
    ProcessBackend,
    Runner,
    ThreadModeWarning,
)

QUIET: dict[str, Any] = {"verbose": False, "progress": False}
BFLOAT16 = torch.bfloat16


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def modes() -> dict[str, Any]:
    """Return the modes of torch in this thread."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return {
        "autocast": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        "nesting": torch.autocast_increment_nesting() - torch.autocast_decrement_nesting() - 1,
        "default device": torch.get_default_device(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "hooks": None if top is None else top[0],
        "no hooks": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "multithreading": torch._C._is_multithreading_enabled(),
        "errstate": np.geterr()["divide"],
    }


MODES = [
    pytest.param(lambda: torch.autocast("cpu", BFLOAT16), id="autocast"),
    pytest.param(lambda: torch.autocast("cpu", enabled=False), id="autocast off"),
    pytest.param(lambda: torch.device("meta"), id="device"),
    pytest.param(lambda: default_device("meta"), id="set_default_device"),
    pytest.param(FunctionMode, id="function mode"),
    pytest.param(DispatchMode, id="dispatch mode"),
    pytest.param(lambda: saved_tensors_hooks(lambda x: x, lambda x: x), id="saved-tensor hooks"),
    pytest.param(save_on_cpu, id="save_on_cpu"),
    pytest.param(lambda: disable_saved_tensors_hooks("none here"), id="no hooks"),
    pytest.param(lambda: torch.autograd.set_multithreading_enabled(False), id="one thread"),
    pytest.param(lambda: np.errstate(divide="raise"), id="numpy errstate"),
]
STAGE_MODES = [
    *MODES,
    pytest.param(torch.no_grad, id="no_grad"),
    pytest.param(torch.inference_mode, id="inference_mode"),
]
Mode = Callable[[], AbstractContextManager[Any]]


def train(state: LoopState) -> None:
    inputs, targets = state.batch
    loss = functional.cross_entropy(state.model(inputs).float(), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_mode_when_it_is_around_a_run_then_holds_in_stages_callbacks_and_loader(
    mode: Mode, kind: str
) -> None:
    seen: list[Any] = []
    outer, ready = modes(), batches()

    def see(*_: Any) -> None:
        seen.append(modes())

    def step(state: LoopState) -> None:
        see()
        train(state)

    async def async_step(state: LoopState) -> None:
        step(state)
        await anyio.lowlevel.checkpoint()
        see()

    async def async_hook(_: Any) -> None:
        see()

    def data() -> Iterator[Any]:
        for batch in ready:
            see()
            yield batch

    is_async = kind == "async"
    hook = async_hook if is_async else see
    fitted = trainer(
        train_dl=data,
        valid_dl=None,
        train_step=async_step if is_async else step,
        train_epoch_start=hook,
        preloop=hook,
        postloop=hook,
        prefetch=0,
    )
    with mode():
        expected = modes()
        await fitted.fit(1, callbacks=[hook], **QUIET)
        assert modes() == expected
    assert modes() == outer
    assert len(seen) > 10
    for each in seen:
        assert {**each, "nesting": 0} == {**expected, "nesting": 0}


@pytest.mark.parametrize("mode", STAGE_MODES)
async def test_mode_when_an_async_stage_awaits_in_it_then_holds_there_and_nowhere_else(
    mode: Mode,
) -> None:
    seen: list[Any] = []
    others: list[Any] = []
    expected: list[Any] = []

    async def step(state: LoopState) -> None:
        with mode():
            expected.append(modes())
            await anyio.lowlevel.checkpoint()
            seen.append(modes())
            await anyio.lowlevel.checkpoint()
            seen.append(modes())
        train(state)

    async def look() -> None:
        while True:
            others.append(modes())
            await anyio.lowlevel.checkpoint()

    outer = modes()
    async with anyio.create_task_group() as group:
        group.start_soon(look)
        await trainer(train_dl=batches(), valid_dl=None, train_step=step).fit(1, **QUIET)
        group.cancel_scope.cancel()
    assert seen == [each for each in expected for _ in range(2)]
    assert seen
    assert others
    assert all(each == outer for each in others)


async def test_autocast_when_it_is_around_a_fit_then_is_as_around_each_step() -> None:
    """A block around a whole loop would compute each step with the first weights."""
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _epoch in range(2):
        for inputs, targets in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", BFLOAT16):
                loss = functional.cross_entropy(model(inputs), targets)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    fitted_model = mlp()
    fitted = trainer(
        model=fitted_model,
        optimizer=SGD(fitted_model.parameters(), lr=0.1),
        train_dl=batches(),
        valid_dl=None,
    )
    with torch.autocast("cpu", BFLOAT16):
        await fitted.fit(2, **QUIET)
    assert bits(fitted_model) == bits(model)


PHASE: ContextVar[str] = ContextVar("phase", default="none")
STAGES = ("preloop", "train_epoch_start", "train_step", "train_epoch_end", "postloop")


@pytest.mark.parametrize("kinds", ["ppppp", "aaaaa", "apapa", "papap", "aappa"])
async def test_context_variable_when_a_stage_sets_it_then_later_stages_see_it(kinds: str) -> None:
    seen: list[str] = []
    tokens: list[Any] = []

    def stage(name: str, kind: str) -> Callable[[Any], Any]:
        def plain(_: Any) -> None:
            seen.append(PHASE.get())
            if name == "postloop":
                PHASE.reset(tokens[0])
                assert PHASE.get() == "caller"
            else:
                tokens.append(PHASE.set(name))

        async def awaits(argument: Any) -> None:
            await anyio.lowlevel.checkpoint()
            plain(argument)
            await anyio.lowlevel.checkpoint()

        return awaits if kind == "a" else plain

    PHASE.set("caller")
    functions = {name: stage(name, kind) for name, kind in zip(STAGES, kinds, strict=True)}
    await trainer(train_dl=batches()[:2], valid_dl=None, **functions).fit(1, **QUIET)
    assert seen == [
        "caller",
        "preloop",
        "train_epoch_start",
        "train_step",
        "train_step",
        "train_epoch_end",
    ]
    assert PHASE.get() == "caller"


async def test_async_loader_and_callback_when_a_variable_is_set_around_fit_then_see_it() -> None:
    seen: set[str] = set()

    async def data() -> Any:
        for batch in batches():
            seen.add(f"loader {PHASE.get()}")
            yield batch

    async def callback(_: Any) -> None:
        seen.add(f"callback {PHASE.get()}")

    PHASE.set("caller")
    fitted = trainer(
        train_dl=data,
        valid_dl=None,
        train_epoch_start=lambda _: PHASE.set("epoch") and None,
    )
    await fitted.fit(1, callbacks=[callback], **QUIET)
    assert seen == {"loader epoch", "callback caller"}


async def test_jobs_when_submitted_under_modes_and_variables_then_each_has_its_own() -> None:
    seen: dict[str, set[Any]] = {}

    def make(name: str, mark: str) -> Any:
        names = seen.setdefault(name, {("factory", modes()["autocast"], PHASE.get())})

        def step(state: LoopState) -> None:
            names.add((mark, modes()["autocast"], PHASE.get()))
            train(state)

        async def async_step(state: LoopState) -> None:
            await anyio.lowlevel.checkpoint()
            step(state)

        steps = async_step if mark == "async" else step
        return trainer(train_dl=batches(), valid_dl=None, train_step=steps)

    async with Runner(max_concurrent=1) as runner:
        for index, mark in enumerate(["plain", "async", "plain"]):
            PHASE.set(f"submit {index}")
            mode = torch.autocast("cpu", BFLOAT16) if index < 2 else nullcontext()
            with mode:
                runner.submit(make, f"job {index}", mark, **QUIET)
        PHASE.set("later")
        outcomes = await runner.results()
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    for index, mark in enumerate(["plain", "async", "plain"]):
        dtype = BFLOAT16 if index < 2 else None
        variable = f"submit {index}"
        assert seen[f"job {index}"] == {("factory", dtype, variable), (mark, dtype, variable)}


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        pytest.param(torch.no_grad, "no_grad", id="no_grad"),
        pytest.param(torch.inference_mode, "inference_mode", id="inference_mode"),
        pytest.param(lambda: torch.set_grad_enabled(False), "no_grad", id="set_grad_enabled"),
        pytest.param(lambda: torch.profiler.profile(), "profiler", id="profiler"),
    ],
)
def test_mode_when_it_cannot_hold_in_a_fit_then_says_so_at_the_users_line(
    mode: Mode, words: str
) -> None:
    fitted = sync_trainer(train_dl=batches(), valid_dl=None)
    with pytest.warns(ThreadModeWarning, match=words) as told, mode():
        fitted.fit(1, **QUIET)
    [warning] = told
    assert warning.filename == __file__


def test_mode_when_it_is_around_a_test_then_says_nothing() -> None:
    with torch.inference_mode():
        sync_trainer().test(**QUIET)


async def test_mode_when_it_may_be_another_tasks_then_says_so() -> None:
    is_training, may_end = anyio.Event(), anyio.Event()

    async def wait(_: Any) -> None:
        is_training.set()
        await may_end.wait()

    async def train_in_autocast() -> None:
        with torch.autocast("cpu", BFLOAT16):
            await trainer(valid_dl=None, train_epoch_start=wait).fit(1, **QUIET)

    async with anyio.create_task_group() as group:
        group.start_soon(train_in_autocast)
        await is_training.wait()
        with pytest.warns(ThreadModeWarning, match="all tasks"):
            await trainer(valid_dl=None).fit(1, **QUIET)
        with torch.autocast("cpu", enabled=False):
            await trainer(valid_dl=None).fit(1, **QUIET)
        may_end.set()


async def test_cache_of_autocast_when_another_coroutine_is_in_a_block_then_is_emptied() -> None:
    """torch empties the cache at the end of the outermost block of a thread."""
    is_inside, may_end = anyio.Event(), anyio.Event()
    model = nn.Linear(1, 1, bias=False)
    outputs: list[float] = []

    async def stay_inside(_: Any) -> None:
        with torch.autocast("cpu", BFLOAT16):
            is_inside.set()
            await may_end.wait()

    async def look(_: Any) -> None:
        for value in (1.0, 2.0):
            with torch.no_grad():
                model.weight.fill_(value)
            with torch.autocast("cpu", BFLOAT16):
                outputs.append(model(torch.ones(1, 1)).item())

    async with anyio.create_task_group() as group:
        group.start_soon(
            partial(trainer(valid_dl=None, train_epoch_start=stay_inside).fit, 1, **QUIET)
        )
        await is_inside.wait()
        await trainer(valid_dl=None, train_epoch_start=look).fit(1, **QUIET)
        may_end.set()
    assert outputs == [1.0, 2.0]


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FunctionMode])
async def test_mode_when_it_is_around_everything_then_files_and_weights_are_the_same(
    mode: Mode, tmp_path: Path
) -> None:
    """fitloop's own tensors are not on the default device."""
    model, data = mlp(dropout=0.2), batches()

    async def trained(directory: Path) -> list[Any]:
        def make() -> FitLoop:
            own = copy.deepcopy(model)
            optimizer = Adam(own.parameters(), lr=0.01)
            return FitLoop(
                own,
                optimizer,
                nn.CrossEntropyLoss(),
                train_dl=data,
                valid_dl=data,
                seed=3,
                device="cpu",
                save_path=directory,
                save_to_disk=True,
            )

        first = make()
        await first.run_sanity_check(steps=1)
        await first.fit(2, checkpoint=Checkpoint(), **QUIET)
        await first.save()
        await first.load()
        second = make()
        await second.fit(3, checkpoint=Checkpoint(), resume=True, **QUIET)
        after = [bits(first.model), bits(second.model)]
        await first.load_best()
        await second.reset()
        return [*after, bits(first.model), bits(second.model)]

    expected = await trained(tmp_path / "plain")
    with mode():
        assert await trained(tmp_path / "mode") == expected


async def test_submit_when_modes_cannot_reach_a_worker_process_then_says_so() -> None:
    async with Runner(backend=ProcessBackend()) as runner:
        with torch.autocast("cpu", BFLOAT16), pytest.warns(ThreadModeWarning, match="process"):
            runner.submit(trainer, **QUIET)
        runner.cancel_all()


def test_cuda_when_there_are_several_devices_then_means_the_callers_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    made = FitLoop(**given)
    assert made.device == torch.device("cuda:2")
    assert internals(made).rng.devices == ("cuda:2",)
