"""Bad input is refused with an error that names the value, the expected one and the remedy.

Nothing has been changed then: neither the model and the optimizer, nor the process.
"""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.event_loops import every_loop, one_event_loop
from support.models import arguments, batches, bits, mlp, process_generators, trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from fitloop import (
    ConfigurationError,
    FitLoop,
    LoopState,
    MetricError,
    MissingCriteriaError,
    MissingLoaderError,
    NonFiniteWarning,
    OptimizerWarning,
    Runner,
    StageSignatureError,
    SyncFitLoop,
    SyncInAsyncError,
    freeze,
)

anyio_backend = one_event_loop

QUIET: dict[str, Any] = {"verbose": False}

STAGE_FUNCTIONS = [
    f"{phase}_{stage}"
    for phase in ("train", "valid", "test")
    for stage in ("epoch_start", "step", "epoch_end")
]


def no_argument() -> None: ...
def two_arguments(state: object, more: object) -> None: ...
def keyword_only(*, state: object) -> None: ...


async def coroutine(*_arguments: object) -> Any: ...


def default_and_more(state: object, more: object = None, *, other: int = 1) -> None: ...


class Callable1:
    def __call__(self, state: LoopState) -> None: ...

    def method(self, state: LoopState) -> None: ...


def other_optimizer() -> SGD:
    return SGD(nn.Linear(2, 2).parameters(), lr=0.1)


BAD_ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("model is a class", {"model": nn.Linear}, r"model is <class .*expected a torch\.nn\.Module"),
    ("model is a number", {"model": 3}, r"model is 3; expected a torch\.nn\.Module"),
    ("no optimizer", {"optimizer": []}, r"optimizer is empty; expected a torch optimizer or a"),
    ("optimizer is a class", {"optimizer": SGD}, r"optimizer is <class .*; expected a torch opt"),
    (
        "optimizer of another model",
        {"optimizer": other_optimizer()},
        r"optimizer holds none of the model's parameters.*Adam\(model\.parameters\(\)\)",
    ),
    ("no loss", {"loss_function": 0.5}, r"loss_function is 0.5; expected a callable .* or None"),
    (
        "loss is async",
        {"loss_function": coroutine},
        r"loss_function is .*expected a plain function",
    ),
    ("loader is a coroutine", {"train_dl": coroutine}, r"train_dl is .*coroutine.*async function"),
    ("loader is a string", {"train_dl": "data"}, r"train_dl is 'data'; expected a DataLoader, a"),
    ("loader is a class", {"train_dl": DataLoader}, r"train_dl is <class .*without arguments"),
    ("loader needs an argument", {"valid_dl": keyword_only}, r"valid_dl is .*; expected a loader"),
    ("loader is a number", {"test_dl": 7}, r"test_dl is 7; expected a DataLoader, a list"),
    ("scheduler is none", {"lr_scheduler": 3}, r"lr_scheduler is 3; expected an object with step"),
    ("scheduler is a class", {"lr_scheduler": StepLR}, r"lr_scheduler is .*StepLR.*; expected"),
    (
        "interval is unknown",
        {"scheduler_interval": "week"},
        r"scheduler_interval is 'week'; expected 'step', 'batch', 'epoch' or 'valid'",
    ),
    (
        "interval of no scheduler",
        {"scheduler_interval": "batch"},
        r"scheduler_interval is 'batch' and there is no lr_scheduler; give lr_scheduler=, or leave",
    ),
    ("device is unknown", {"device": "gpu"}, r"device is 'gpu'; expected a torch\.device or .*cpu"),
    ("device is not there", {"device": "xpu"}, r"device is 'xpu', and there is none here; give"),
    ("dtype is a name", {"dtype": "float32"}, r"dtype is 'float32'; expected .*torch\.float32"),
    ("dtype is of integers", {"dtype": torch.int64}, r"dtype is torch\.int64; expected .*float"),
    ("criteria is no name", {"criteria": 5}, r"criteria is 5; expected .*name"),
    (
        "direction of a loss is not given",
        {"criteria": "loss"},
        r"criteria is 'loss' and criteria_direction is not given; give criteria_direction=-1",
    ),
    *(
        (
            f"direction of {name} is not given",
            {"criteria": name},
            f"criteria is '{name}' and criteria_direction is not given; give criteria_direction=-1",
        )
        for name in ("rmse", "val_mae", "error", "mean squared error", "word-level WER", "FID")
    ),
    (
        "direction is a word",
        {"criteria_direction": "max"},
        r"criteria_direction is 'max'; expected 1 \(more is better\) or -1",
    ),
    ("seed is negative", {"seed": -1}, r"seed is -1; expected an integer of at least 0"),
    ("seed is a word", {"seed": "a"}, r"seed is 'a'; expected an integer of at least 0"),
    ("seed is too large", {"seed": 2**64}, r"seed is 18446744073709551616; expected less than"),
    ("threads are none", {"num_threads": 0}, r"num_threads is 0; expected an integer of at least"),
    ("prefetch is negative", {"prefetch": -1}, r"prefetch is -1; expected an integer of at least"),
    (
        "loader_randomness is unknown",
        {"loader_randomness": "mine"},
        r"loader_randomness is 'mine'; expected 'global' or 'own'",
    ),
    ("grace is negative", {"loader_grace": -1}, r"loader_grace is -1; expected seconds"),
    ("grace is a word", {"loader_grace": "5"}, r"loader_grace is '5'; expected seconds"),
    ("callbacks are no list", {"callbacks": print}, r"callbacks is .*print.*; expected .*list"),
    (
        "best model is called as the pretrained one",
        {"best_model_name": "pretrained_model"},
        r"best_model_name is 'pretrained_model', .*; expected another name",
    ),
    *(
        (
            f"best model is called {name}",
            {"best_model_name": name},
            "best_model_name is .* file of the tr",
        )
        for name in (
            *("./Pretrained_Model", "pretrained_model.msgpack", "metrics", "METRICS.msgpack"),
            *("snapshots/snapshot-000001", "best_models/a"),
        )
    ),
    (
        "best model is elsewhere",
        {"best_model_name": "../best"},
        r"best_model_name: '../best' cannot name a file",
    ),
    ("save_path is no path", {"save_path": 3}, r"save_path is 3; expected"),
    *(
        (f"{name} takes no argument", {name: no_argument}, rf"{name} is .no_argument\(\).*; expect")
        for name in [*STAGE_FUNCTIONS, "preloop", "postloop", "configure_optimizer"]
    ),
    ("step needs two", {"train_step": two_arguments}, r"train_step is .two_arguments\(state.*one"),
    ("step needs a keyword", {"train_step": keyword_only}, r"train_step is .keyword_only\(\*, s"),
    ("step is a word", {"train_step": "f"}, r"train_step is 'f'; expected a function that can be"),
    ("callback is a number", {"callbacks": [3]}, r"callbacks\[0\] is 3; expected a function that"),
    ("callback is a class", {"callbacks": [Callable1]}, r"callbacks\[0\] is .*give an instance"),
    ("step is a class", {"train_step": Callable1}, r"train_step is .*class, give an instance"),
    ("scaler is a class", {"scaler": torch.amp.GradScaler}, r"scaler is .*; expected an object"),
    ("stateful is a class", {"stateful": {"a": nn.Linear}}, r"a is .*; expected an object with"),
    ("flag is a word", {"save_to_disk": "no"}, r"save_to_disk is 'no'; expected True or False"),
    ("on_continue is a number", {"on_continue": 3}, r"on_continue is 3; expected a function that"),
]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [pytest.param(changes, pattern, id=name) for name, changes, pattern in BAD_ARGUMENTS],
)
def test_constructor_when_an_argument_cannot_work_then_says_so_and_changes_nothing(
    changes: dict[str, Any], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    given = arguments(model=model, optimizer=optimizer)
    before, generators = bits(model), process_generators()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    with pytest.raises(ConfigurationError, match=f"^{pattern}"):
        FitLoop(**{**given, **changes})
    assert bits(model) == before
    assert (model.training, optimizer.state_dict()["state"]) == (True, {})
    assert process_generators() == generators
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
    assert list(tmp_path.iterdir()) == []


def test_intervals_when_they_are_not_as_many_as_schedulers_then_says_so() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    pattern = r"^scheduler_interval has 2 entries for 1 schedulers; expected one for all, or one f"
    with pytest.raises(ConfigurationError, match=pattern):
        trainer(
            model=model,
            optimizer=optimizer,
            lr_scheduler=StepLR(optimizer, 1),
            scheduler_interval=["batch", "epoch"],
        )


def test_scheduler_when_of_another_optimizer_then_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"^lr_scheduler .*StepLR.* optimizer"):
        trainer(lr_scheduler=StepLR(other_optimizer(), 1))


def test_optimizer_when_a_layer_is_replaced_after_it_was_built_then_warns() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer(model=model, optimizer=SGD(model[0].parameters(), lr=0.1))  # it trains one layer only
    model[1] = nn.Linear(4, 3)
    with pytest.warns(OptimizerWarning, match=r"holds the parameters '1\.weight', '1\.bias' of"):
        trainer(model=model, optimizer=optimizer)
    freeze(model[1])
    trainer(model=model, optimizer=optimizer)


async def test_model_when_a_layer_is_replaced_after_the_trainer_was_made_then_fit_warns() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 7))
    fitted = trainer(model=model, optimizer=SGD(model.parameters(), lr=0.1))
    model[1] = nn.Linear(4, 7)
    with pytest.warns(OptimizerWarning, match=r"holds the parameters '1\.weight', '1\.bias' of"):
        await fitted.fit(1, **QUIET)
    await fitted.fit(1, **QUIET)  # and says it once
    model[0] = nn.Linear(6, 4)
    with pytest.raises(ConfigurationError, match="holds none of the model's parameters"):
        await fitted.fit(1, **QUIET)


async def test_predict_when_all_layers_were_replaced_then_needs_no_optimizer_of_them() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 7))
    fitted = trainer(model=model, optimizer=SGD(model.parameters(), lr=0.1))
    model[0], model[1] = nn.Linear(6, 5), nn.Linear(5, 7)
    assert [output async for output in fitted.predict(fitted.train_dl)]


@pytest.mark.parametrize("trains", [False, True])
async def test_step_when_it_trains_nothing_in_the_first_epoch_then_warns_once(trains: bool) -> None:
    def step(state: LoopState) -> dict[str, Any]:
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs), targets)
        if trains:
            loss.backward()
            state.optimizer.step()
        return {"loss": loss.detach()}

    def by_hand(state: LoopState) -> None:
        with torch.no_grad():
            next(state.model.parameters()).mul_(0.9)

    for train_step in (step, by_hand):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", OptimizerWarning)
            await trainer(train_step=train_step, train_epoch_end=lambda _: {}).fit(2, **QUIET)
        told = [str(warning.message) for warning in warned]
        assert len(told) == (train_step is step and not trains), told
        assert all(text.startswith("train_step changed no weight of the model") for text in told)


@pytest.mark.parametrize("define_all", [False, True])
async def test_step_when_it_sums_gradients_of_batches_itself_then_warns_unless_it_defines_all(
    define_all: bool,
) -> None:
    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        state.loss_function(state.model(inputs), targets).backward()
        if state.batch_num % 2 == 0:
            state.optimizer.step()
            state.optimizer.zero_grad()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", OptimizerWarning)
        await trainer(train_step=step).fit(2, define_all=define_all, valid_dl=None, **QUIET)
    told = [str(warning.message) for warning in warned]
    assert len(told) == (not define_all)
    assert all("sets them to zero before the next batch" in text for text in told)


async def test_step_when_all_steps_of_the_first_epoch_are_left_out_then_only_that_is_told() -> None:
    """Its advice, to call ``state.optimize``, would be wrong."""

    def step(state: LoopState) -> None:
        state.optimize(state.model(state.batch[0]).mean() * float("nan"))

    changes = {"train_step": step, "train_epoch_end": lambda _: {}, "nonfinite": "skip"}
    with pytest.warns(NonFiniteWarning, match="left out"):  # and no other warning
        await trainer(**changes).fit(1, **QUIET)


def test_plateau_when_its_mode_contradicts_the_given_criteria_then_constructor_says_so() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"mode='min'.*'accuracy'.*mode='max'"):
        trainer(
            model=model,
            optimizer=optimizer,
            lr_scheduler=ReduceLROnPlateau(optimizer),
            criteria="accuracy",
        )


def test_stage_signature_error_when_raised_then_is_a_type_error_with_fields() -> None:
    with pytest.raises(TypeError) as caught:
        trainer(valid_step=two_arguments)
    assert isinstance(caught.value, StageSignatureError)
    assert caught.value.name == "valid_step"
    assert caught.value.given == "two_arguments(state: 'object', more: 'object') -> 'None'"


@pytest.mark.parametrize(
    "function",
    [default_and_more, lambda *states: None, Callable1(), Callable1().method],
    ids=["defaults", "star", "object", "method"],
)
def test_constructor_when_a_stage_can_take_one_argument_then_accepts_it(function: Any) -> None:
    trainer(train_step=function, valid_epoch_end=function)


def test_constructor_when_one_of_several_optimizers_holds_no_parameters_then_accepts_it() -> None:
    """The optimizer may have other parameters too, for example those of a loss."""
    model = mlp()
    trainer(model=model, optimizer=[SGD(model.parameters(), lr=0.1), other_optimizer()])


# -- calls -----------------------------------------------------------------------------------------


async def refused(
    fitted: FitLoop, call: Callable[..., Any], kind: type[Exception], pattern: str, **given: Any
) -> None:
    before = bits(fitted.model)
    with pytest.raises(kind, match=f"^{pattern}"):
        await call(**given)
    assert bits(fitted.model) == before
    assert (fitted.epoch_num, fitted.M.train_runs, fitted.M.test_runs) == (0, 0, 0)
    assert not fitted.running


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"epochs": -1}, r"epochs is -1; expected an integer of at least 0"),
        ({"epochs": 1.5}, r"epochs is 1\.5; expected an integer"),
        ({"epochs": "2"}, r"epochs is '2'; expected an integer"),
        ({"steps": 0}, r"steps is 0; expected an integer of at least 1 or None: batches of each"),
        ({"continue_loop": -1}, r"continue_loop is -1; expected an integer of at least 0"),
        ({"print_every": -1}, r"print_every is -1; expected an integer of at least 0: 0 prints"),
        ({"print_every": True, "verbose": False}, r"print_every is True; expected an integer"),
        ({"load_best": "no"}, r"load_best is 'no'; expected True or False"),
        ({"verbose": 2}, r"verbose is 2; expected True or False"),
        ({"resume": None}, r"resume is None; expected True or False"),
        ({"train_dl": 5}, r"train_dl is 5; expected a DataLoader"),
        ({"valid_dl": "x"}, r"valid_dl is 'x'; expected a DataLoader"),
        ({"display_metrics": 5}, r"display_metrics is 5; expected"),
        ({"callbacks": [print, 5]}, r"callbacks\[1\] is 5; expected a function"),
        ({"callbacks": print}, r"callbacks is .*print.*; expected .*list"),
        ({"on_continue": no_argument}, r"on_continue is .no_argument\(\).*; expected a function"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0] if isinstance(value, dict) else "",
)
async def test_fit_when_an_argument_cannot_work_then_says_so_and_runs_nothing(
    given: dict[str, Any], pattern: str
) -> None:
    fitted = trainer()
    await refused(fitted, fitted.fit, ConfigurationError, pattern, **given)
    assert (await fitted.fit(1, **QUIET)).epochs == 1


async def test_phase_when_asked_for_without_loader_then_says_how_to_give_one() -> None:
    fitted = trainer(train_dl=None, valid_dl=None, test_dl=None)
    for call in (fitted.fit, fitted.run_sanity_check, fitted.run_profiler):
        name = call.__name__
        pattern = rf"{name}\(\) needs train_dl, which is None; give train_dl= to the constructor"
        await refused(fitted, call, MissingLoaderError, pattern)
    pattern = r"test\(\) needs test_dl, which is None; give test_dl= to the constructor or to test"
    await refused(fitted, fitted.test, MissingLoaderError, pattern)
    await fitted.fit(1, train_dl=batches(), **QUIET)
    await fitted.test(batches(), **QUIET)


async def test_fit_when_epochs_is_a_numpy_integer_then_is_accepted() -> None:
    given: dict[str, Any] = {"epochs": np.int64(2), "steps": np.int32(1)}
    assert (await trainer(seed=np.int64(3)).fit(**given, **QUIET)).epochs == 2


@pytest.mark.parametrize("data", [[], iter(())], ids=["list", "iterator"])
async def test_loader_when_it_gives_no_batches_then_says_what_may_be_wrong(data: Any) -> None:
    fitted = trainer(train_dl=data)
    pattern = r"train_dl \(.*\) gave no batches in epoch 1; expected at least one.*read only once"
    await refused(fitted, fitted.run_sanity_check, ConfigurationError, pattern)
    with pytest.raises(ConfigurationError, match=pattern):
        await fitted.fit(1, **QUIET)


@pytest.mark.parametrize(
    ("call", "name", "said"),
    [
        ("FitLoop", "valid_dataloader", "FitLoop() has no argument 'valid_dataloader'; did you"),
        ("FitLoop", "optimiser", "did you mean 'optimizer'?"),
        ("FitLoop", "max_epochs", "'epochs' is an argument of fit()"),
        ("FitLoop", "zzz", "expected one of model, optimizer, loss_function, train_dl"),
        ("fit", "epoch", "fit() has no argument 'epoch'; did you mean 'epochs'?"),
        ("fit", "num_epochs", "did you mean 'epochs'?"),
        ("fit", "criterion", "'loss_function' is an argument of FitLoop()"),
        ("test", "epochs", "test() has no argument 'epochs'; 'epochs' is an argument of fit()"),
        ("Runner", "max_concurent", "Runner() has no argument 'max_concurent'; did you mean"),
    ],
)
async def test_keyword_when_unknown_then_the_error_names_the_one_that_is_meant(
    call: str, name: str, said: str
) -> None:
    calls: dict[str, Callable[..., Any]] = {"FitLoop": trainer, "Runner": Runner}

    async def make() -> None:
        await (calls.get(call) or getattr(trainer(), call))(**{name: 1})

    with pytest.raises(TypeError, match=re.escape(said)):
        await make()


async def test_loaders_when_two_phases_share_an_iterator_then_says_so_unless_steps_are_given() -> (
    None
):
    def endless() -> Iterator[Any]:
        while True:
            yield from batches()

    data = endless()
    fitted = trainer(train_dl=data, valid_dl=data)
    pattern = r"train_dl and valid_dl are the same generator, .*; expected loaders of their own"
    await refused(fitted, fitted.fit, ConfigurationError, pattern)
    assert (await fitted.fit(2, steps=3, **QUIET)).epochs == 2


async def test_history_when_a_phase_or_stage_is_misspelt_then_says_what_there_is() -> None:
    fitted = trainer()
    await fitted.fit(1, **QUIET)
    with pytest.raises(AttributeError, match=r"^M has no attribute 'vaild'; .* train, valid, test"):
        _ = fitted.M.vaild  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^M\.valid has no attribute 'loss'; .*epoch_start, "):
        _ = fitted.M.valid.loss  # type: ignore[attr-defined]


# -- metrics ---------------------------------------------------------------------------------------

OF_STEPS = [
    ({"a": None}, r"returned 'a': NoneType None; expected a number or a tensor: leave out what is"),
    ({"a": "1.5"}, r"returned 'a': str '1\.5'; expected a number or a tensor"),
    ({"a": b"1"}, r"returned 'a': bytes b'1'; expected a number or a tensor"),
    ({"a": [1.0]}, r"returned 'a': list \[1\.0\]; expected a number or a tensor"),
    ({"a": 1j}, r"returned 'a': complex 1j; expected a number or a tensor"),
    ({"a": torch.tensor(1j)}, r"returned 'a': .*; expected a number or a tensor"),
    ({"a": object}, r"returned 'a': type .*; expected a number or a tensor"),
    ({1: 2.0}, r"returned a metric named 1, a int; expected names to be strings"),
    ([1.0], r"returned list \[1\.0\]; expected a dict of metric names to numbers or tensors, or"),
    (3.0, r"returned float 3\.0; expected a dict of metric names"),
    (torch.tensor(3.0), r"returned Tensor tensor\(3\.\); expected a dict of metric names"),
]
OF_EPOCHS = [
    *OF_STEPS,
    (
        {"a": torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)},
        "returned 'a' with a nested shape",
    ),
    ({"a": torch.ones(2)}, r"returned 'a' with shape \(2,\); expected one number: reduce it"),
]


@pytest.mark.parametrize(
    ("function", "stage", "returned", "pattern"),
    [
        *(("train_step", "train batch_step", *case) for case in OF_STEPS),
        *(("valid_step", "valid batch_step", *case) for case in OF_STEPS[:2]),
        *(("train_epoch_end", "train epoch_end", *case) for case in OF_EPOCHS),
        *(("valid_epoch_start", "valid epoch_start", *case) for case in OF_EPOCHS[:3]),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_metric_when_it_is_no_number_then_names_phase_stage_and_metric(
    function: str, stage: str, returned: Any, pattern: str
) -> None:
    fitted = trainer(**{function: lambda _state: returned})
    with pytest.raises(MetricError, match=f"^{stage} {pattern}"):
        await fitted.fit(1, **QUIET)
    with pytest.raises(MetricError, match=f"^{stage} {pattern}"):
        await fitted.run_sanity_check()


async def test_metric_when_it_changes_its_kind_then_says_so() -> None:
    def step(state: LoopState) -> dict[str, Any]:
        return {"a": 1.0 if state.batch_num == 1 else torch.ones(2)}

    pattern = r"train batch_step returned 'a' as a number in one batch and as a tensor"
    with pytest.raises(MetricError, match=pattern) as caught:
        await trainer(train_step=step, name="tiny").fit(1, **QUIET)
    assert "trainer 'tiny': train, epoch 1, batch_step of batch 2" in caught.value.__notes__[0]


async def test_criteria_when_no_stage_returns_it_then_sanity_check_lists_the_names() -> None:
    fitted = trainer(criteria="f1")
    pattern = r"criteria is 'f1', which valid_epoch_end did not return; it returned 'loss', 'acc"
    await refused(fitted, fitted.run_sanity_check, MissingCriteriaError, pattern)


@every_loop
async def test_sync_trainer_when_an_event_loop_runs_then_says_what_to_await() -> None:
    fitted = SyncFitLoop(**arguments())
    for verb in ("fit", "test", "reset", "run_sanity_check", "load_best"):
        pattern = rf"SyncFitLoop\.{verb}\(\) blocks, and an event loop is running.*await FitLoop"
        with pytest.raises(SyncInAsyncError, match=pattern):
            getattr(fitted, verb)()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_async_loader_when_it_raises_cancelled_itself_then_no_data_are_dropped() -> None:
    """An inner task of the loader may have been cancelled; that does not end the data."""
    error = asyncio.CancelledError("of the loader")

    async def broken() -> AsyncIterator[Any]:
        for batch in batches()[:2]:
            yield batch
        raise error

    fitted = trainer(train_dl=broken, valid_dl=None)
    with pytest.raises(asyncio.CancelledError) as caught:
        await fitted.fit(1, **QUIET)
    assert caught.value is error
    assert "train, epoch 1, loading batch 3" in caught.value.__notes__[0]
