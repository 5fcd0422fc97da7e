"""The steps of learning-rate schedulers, compared with a written order of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
from support.event_loops import one_event_loop
from support.models import mlp, scores, trainer
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fitloop import (
    ConfigurationError,
    EpochEnded,
    Event,
    FitLoop,
    LoopState,
    NonFiniteWarning,
    PhaseEnded,
    ScheduleWarning,
    default_batch_step,
)

anyio_backend = one_event_loop

QUIET: dict[str, Any] = {"verbose": False, "load_best": False}

Trace = list[str]


def traced(scheduler: Any, trace: Trace, mark: str = "step") -> Any:
    """Record every step of ``scheduler`` with its arguments."""
    step = scheduler.step

    def noted(*options: Any) -> None:
        trace.append(" ".join([mark, *map(str, options)]))
        step(*options)

    scheduler.step = noted
    return scheduler


def noting(trace: Trace) -> Callable[[Event], None]:
    def note(event: Event) -> None:
        if isinstance(event, PhaseEnded):
            trace.append(str(event.phase))
        elif isinstance(event, EpochEnded):
            trace.append("epoch")

    return note


async def trace_of(
    build: Callable[[Optimizer], Any], epochs: int = 2, **changes: Any
) -> tuple[Trace, Any]:
    """Fit with the scheduler that ``build`` makes; return the order of things, and the scheduler.

    Observers of a run are called in order, callbacks last, so a scheduler that is stepped at the
    end of a phase or epoch comes before the mark of it.
    """
    trace: Trace = []
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = traced(build(optimizer), trace)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        callbacks=[noting(trace)],
        **changes,
    )
    await fitted.fit(epochs, steps=2, **QUIET)
    return trace, scheduler


PER_BATCH = ["step", "step", "train", "valid", "epoch"]
PER_EPOCH = ["train", "valid", "step", "epoch"]


@pytest.mark.parametrize(
    ("build", "one_epoch"),
    [
        pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=8), PER_BATCH, id="OneCycleLR"),
        pytest.param(lambda o: CyclicLR(o, 0.01, 0.1), PER_BATCH, id="CyclicLR"),
        pytest.param(lambda o: StepLR(o, 1), PER_EPOCH, id="StepLR"),
        pytest.param(lambda o: CosineAnnealingLR(o, 5), PER_EPOCH, id="CosineAnnealingLR"),
    ],
)
async def test_scheduler_when_interval_is_the_default_then_fits_its_kind(
    build: Callable[[Optimizer], Any], one_epoch: Trace
) -> None:
    trace, _scheduler = await trace_of(build)
    assert trace == one_epoch * 2


@pytest.mark.parametrize(
    ("interval", "one_epoch"),
    [
        ("step", PER_BATCH),
        ("batch", PER_BATCH),
        ("epoch", PER_EPOCH),
        ("valid", ["train", "step", "valid", "epoch"]),
    ],
)
@pytest.mark.parametrize("own_step", [False, True], ids=["default step", "own step"])
async def test_scheduler_when_interval_is_given_then_is_stepped_there(
    interval: str, one_epoch: Trace, own_step: bool
) -> None:
    changes: dict[str, Any] = {"train_step": default_batch_step} if own_step else {}
    trace, _scheduler = await trace_of(
        lambda o: StepLR(o, 1), scheduler_interval=interval, **changes
    )
    assert trace == one_epoch * 2


async def test_scheduler_when_train_step_is_ones_own_then_is_left_to_it() -> None:
    def step(state: LoopState) -> Any:
        metrics = default_batch_step(state)
        if state.batch_num == 2:
            state.lr_scheduler.step()
        return metrics

    trace, _scheduler = await trace_of(lambda o: StepLR(o, 1), train_step=step)
    assert trace == ["step", "train", "valid", "epoch"] * 2


async def test_plateau_when_interval_is_the_default_then_gets_each_validations_criteria() -> None:
    trace, scheduler = await trace_of(
        lambda o: ReduceLROnPlateau(o, mode="max", patience=0, factor=0.5),
        3,
        valid_epoch_end=scores([3, 1, 2]),
        criteria="score",
    )
    assert trace == [
        *("train", "step 3.0", "valid", "epoch"),
        *("train", "step 1.0", "valid", "epoch"),
        *("train", "step 2.0", "valid", "epoch"),
    ]
    assert scheduler.get_last_lr() == [0.025]


async def test_plateau_when_all_is_default_then_watches_accuracy_and_lets_test_run() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer, mode="max", patience=0)
    fitted = trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    await fitted.fit(1, verbose=False)
    assert scheduler.best == fitted.best_score
    assert set(await fitted.test(verbose=False)) == {"loss", "accuracy"}
    await fitted.run_sanity_check()
    assert scheduler.last_epoch == 1


async def test_plateau_when_at_epoch_then_gets_the_criteria_of_the_last_validation() -> None:
    trace, _scheduler = await trace_of(
        lambda o: ReduceLROnPlateau(o, mode="max"),
        1,
        valid_epoch_end=scores([3]),
        criteria="score",
        scheduler_interval="epoch",
    )
    assert trace == ["train", "valid", "step 3.0", "epoch"]


async def test_plateau_when_there_is_no_validation_then_says_so_and_trains_nothing() -> None:
    trace: Trace = []
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=ReduceLROnPlateau(optimizer, mode="max"),
        valid_dl=None,
        train_epoch_start=lambda _state: trace.append("trained"),
    )
    with pytest.raises(ConfigurationError, match=r"ReduceLROnPlateau .*no valid_dl; give valid_dl"):
        await fitted.fit(1, **QUIET)
    assert trace == []
    assert fitted.M.train_runs == 0


async def test_plateau_when_its_mode_contradicts_the_criteria_then_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"mode='min'.*'accuracy'.*mode='max'"):
        await trace_of(lambda o: ReduceLROnPlateau(o))


async def test_schedulers_when_there_are_several_then_each_has_its_own_interval() -> None:
    trace: Trace = []
    model = mlp()
    first, second = SGD(model[0].parameters(), lr=0.1), Adam(model[3].parameters())
    schedulers = [
        traced(OneCycleLR(first, 0.1, total_steps=8), trace, "cycle"),
        traced(StepLR(second, 1), trace, "decay"),
    ]
    options: dict[str, Any] = {"model": model, "optimizer": [first, second]}
    fitted = trainer(**options, lr_scheduler=schedulers, callbacks=[noting(trace)])
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["cycle", "cycle", "train", "valid", "decay", "epoch"]

    trace.clear()
    fitted = trainer(
        **options,
        lr_scheduler=schedulers,
        callbacks=[noting(trace)],
        scheduler_interval=["epoch", "batch"],
    )
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["decay", "decay", "train", "valid", "cycle", "epoch"]

    trace.clear()
    fitted = trainer(
        **options, lr_scheduler=schedulers, callbacks=[noting(trace)], scheduler_interval="valid"
    )
    await fitted.fit(1, steps=2, **QUIET)
    assert trace == ["train", "cycle", "decay", "valid", "epoch"]


async def test_scheduler_when_an_epoch_is_cut_short_then_is_not_stepped_for_it() -> None:
    def step(state: LoopState) -> Any:
        if state.epoch_num == 2:
            state.stop()
        return default_batch_step(state)

    trace, _scheduler = await trace_of(
        lambda o: StepLR(o, 1), 3, train_step=step, scheduler_interval="epoch"
    )
    assert trace == ["train", "valid", "step", "epoch", "train", "epoch"]


def plateau(optimizer: Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, "min", patience=0)


class OwnScheduler:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


KINDS = [
    pytest.param(plateau, id="plateau"),
    pytest.param(lambda o: StepLR(o, 1), id="StepLR"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=8), id="OneCycleLR"),
    pytest.param(OwnScheduler, id="own"),
]


@pytest.mark.parametrize("build", KINDS)
@pytest.mark.parametrize("epochs", [1, 3])
async def test_scheduler_when_nothing_steps_it_then_says_so_once(
    build: Callable[[Optimizer], Any], epochs: int
) -> None:
    with pytest.warns(ScheduleWarning, match="nothing has stepped") as told:
        await trace_of(
            build, epochs, train_step=default_batch_step, valid_epoch_end=scores([1] * 3)
        )
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("kind", ["epoch", "valid"])
@pytest.mark.parametrize("where", ["valid_epoch_end", "callback"])
async def test_scheduler_when_trainer_and_users_code_step_it_then_says_so(
    kind: str, where: str
) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    is_plateau = kind == "valid"
    scheduler: Any = plateau(optimizer) if is_plateau else StepLR(optimizer, 1)

    def step(*_: Any) -> dict[str, float]:
        scheduler.step(*[1.0] * is_plateau)
        return {"score": 1.0}

    async def fit(**changes: Any) -> None:
        await trainer(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            criteria="score",
            criteria_direction=-1 if getattr(scheduler, "mode", "") == "min" else 1,
            **changes,
        ).fit(3, **QUIET)

    await fit(valid_epoch_end=scores([1] * 6))
    stepping: dict[str, Any] = {"valid_epoch_end": step}
    if where == "callback":
        at_end = lambda event: event.kind == "epoch_ended" and step()  # noqa: E731
        stepping = {"valid_epoch_end": scores([1] * 6), "callbacks": [at_end]}
    with pytest.warns(ScheduleWarning, match=r"your code steps it too\. Leave your call of its"):
        await fit(**stepping)


@pytest.mark.parametrize("build", KINDS)
@pytest.mark.parametrize("where", ["train_step", "valid_epoch_end", "callback"])
async def test_scheduler_when_the_users_code_steps_it_then_says_nothing(
    build: Callable[[Optimizer], Any], where: str
) -> None:
    def step(state: Any) -> None:
        scheduler = state.lr_scheduler
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))

    schedulers: list[Any] = []

    def build_noted(optimizer: Optimizer) -> Any:
        schedulers.append(build(optimizer))
        return schedulers[0]

    def stage(state: LoopState) -> Any:
        if where == "train_step":
            result = default_batch_step(state)
            step(state)
            return result
        step(state)
        return {"score": 1.0} if where == "valid_epoch_end" else None

    def callback(event: Event) -> None:
        if isinstance(event, EpochEnded):
            schedulers[0].step(*[1.0] * isinstance(schedulers[0], ReduceLROnPlateau))

    changes: dict[str, Any] = {"train_step": default_batch_step}
    options: dict[str, Any] = {}
    if where == "callback":
        options["callbacks"] = [callback]
    else:
        changes[where] = stage
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    fitted = trainer(
        model=model, optimizer=optimizer, lr_scheduler=build_noted(optimizer), **changes
    )
    await fitted.fit(2, steps=2, **QUIET, **options)


async def test_scheduler_when_the_first_epoch_is_cut_short_then_says_nothing() -> None:
    def step(state: LoopState) -> Any:
        state.stop()
        return default_batch_step(state)

    await trace_of(lambda o: StepLR(o, 1), train_step=step)


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        ("sequential", "cyclic"),
        ("sequential", "one cycle"),
        ("chained", "cyclic"),
        ("chained", "one cycle"),
        ("chained", "nested"),
    ],
)
async def test_scheduler_when_a_kind_for_batches_is_inside_then_is_stepped_after_each(
    wrap: str, kind: str
) -> None:
    def build(optimizer: Optimizer) -> Any:
        inner: Any = ConstantLR(optimizer, 0.5, 2)
        outer: Any = (
            OneCycleLR(optimizer, 0.1, total_steps=4)
            if kind == "one cycle"
            else CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)
        )
        if kind == "nested":
            outer = ChainedScheduler([outer])
        if wrap == "chained":
            return ChainedScheduler([inner, outer])
        return SequentialLR(optimizer, [inner, outer], milestones=[2])

    trace, _scheduler = await trace_of(build)
    assert trace == PER_BATCH * 2


RATES = [
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=20), id="OneCycleLR"),
    pytest.param(lambda o: CyclicLR(o, 0.01, 0.1, 3), id="CyclicLR"),
    pytest.param(lambda o: CosineAnnealingLR(o, 4), id="CosineAnnealingLR"),
    pytest.param(lambda o: CosineAnnealingWarmRestarts(o, 3), id="CosineAnnealingWarmRestarts"),
    pytest.param(lambda o: StepLR(o, 2, 0.5), id="StepLR"),
    pytest.param(lambda o: ExponentialLR(o, 0.9), id="ExponentialLR"),
    pytest.param(lambda o: PolynomialLR(o, 8), id="PolynomialLR"),
    pytest.param(
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1, 2), ExponentialLR(o, 0.8)], [2]),
        id="SequentialLR",
    ),
    pytest.param(
        lambda o: ChainedScheduler([LinearLR(o, 0.1, 1, 2), ExponentialLR(o, 0.8)]),
        id="ChainedScheduler",
    ),
]


@pytest.mark.filterwarnings("ignore::fitloop.ScheduleWarning")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("build", RATES)
async def test_scheduler_when_stepped_after_steps_then_rates_are_those_of_the_loop(
    build: Callable[[Optimizer], Any], accumulate: int
) -> None:
    def noted(optimizer: Optimizer, rates: list[float]) -> Any:
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return build(optimizer)

    expected: list[float] = []
    optimizer = SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    scheduler = noted(optimizer, expected)
    steps = -(-4 // accumulate)  # 4 batches an epoch
    for _step in range(2 * steps):
        optimizer.step()
        scheduler.step()
    model = mlp()
    seen: list[float] = []
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=noted(optimizer, seen),
        scheduler_interval="step",
        accumulate=accumulate,
        valid_dl=None,
    )
    assert fitted.planned_steps(2) == 2 * steps
    await fitted.fit(2, **QUIET)
    assert seen == expected


async def test_schedulers_when_optimizers_step_differently_then_each_follows_its_own() -> None:
    model = mlp()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[3].parameters(), lr=0.1)

    def step(state: LoopState) -> None:
        inputs, targets = state.batch
        for optimizer in (first, first, second)[state.batch_num % 2 :]:
            optimizer.zero_grad()
            state.loss_function(state.model(inputs), targets).backward()
            optimizer.step()

    schedulers = [StepLR(first, 100), StepLR(second, 100)]
    fitted = trainer(
        model=model,
        optimizer=[first, second],
        lr_scheduler=schedulers,
        scheduler_interval="step",
        train_step=step,
        valid_dl=None,
    )
    await fitted.fit(1, **QUIET)
    assert [scheduler.last_epoch for scheduler in schedulers] == [6, 4]


async def test_scheduler_when_its_optimizer_makes_no_step_then_says_so() -> None:
    def step(state: LoopState) -> None:
        state.optimizers[0].step()

    model = mlp()
    optimizers = [SGD(model[0].parameters(), lr=0.1), SGD(model[3].parameters(), lr=0.1)]
    fitted = trainer(
        model=model,
        optimizer=optimizers,
        lr_scheduler=StepLR(optimizers[1], 100),
        scheduler_interval="step",
        train_step=step,
        valid_dl=None,
    )
    with pytest.warns(
        ScheduleWarning, match="follows the steps of its optimizer, and there was none$"
    ):
        await fitted.fit(1, **QUIET)


async def test_scheduler_when_all_steps_are_skipped_then_the_warning_says_so() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=StepLR(optimizer, 100),
        scheduler_interval="step",
        loss_function=lambda outputs, _targets: outputs.sum() * float("nan"),
        valid_dl=None,
        nonfinite="skip",
    )
    with (
        pytest.warns(ScheduleWarning, match="there was none: nonfinite='skip' has left them out"),
        pytest.warns(
            NonFiniteWarning, match="4 optimizer steps were left out, of batch 1, 2, 3, 4"
        ),
    ):
        await fitted.fit(1, **QUIET)


class NoOptimizer:
    """A scheduler that does not tell its optimizer."""

    def step(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda _o: NoOptimizer(), "for a NoOptimizer, which has no torch", id="none"),
        pytest.param(
            lambda o: ReduceLROnPlateau(o[0], "max"), "is 'step'; expected 'valid'", id="plateau"
        ),
    ],
)
async def test_scheduler_when_it_cannot_follow_steps_then_says_so(
    build: Callable[[list[Optimizer]], Any], message: str
) -> None:
    model = mlp()
    optimizers: list[Optimizer] = [SGD(each.parameters(), lr=0.1) for each in (model[0], model[3])]
    fitted = trainer(
        model=model,
        optimizer=optimizers,
        lr_scheduler=build(optimizers),
        scheduler_interval="step",
    )
    with pytest.raises(ConfigurationError, match=message):
        await fitted.fit(1, **QUIET)


def falling(num_training_steps: int) -> Callable[[int], float]:
    """Return a rate as libraries make it: a function with its settings."""

    def rate(step: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        return max(0.0, 1 - step / num_training_steps)

    return partial(rate, num_warmup_steps=1, num_training_steps=num_training_steps)


def in_closure(total_steps: int) -> Callable[[int], float]:
    return lambda step: max(0.0, 1 - step / total_steps)


LENGTHS: list[Any] = [
    # epochs 3, batches 4 in each; with "2 batches" one optimizer step for 2 of them
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=12), None, True, id="one cycle"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=24), None, True, id="for two fits"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=3), None, False, id="as epochs"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=11), None, False, id="too short"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=13), None, False, id="too long"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=12), "epoch", False, id="as batches"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=3), "epoch", True, id="by epochs"),
    pytest.param(lambda o: CosineAnnealingLR(o, 3), None, True, id="cosine"),
    pytest.param(lambda o: CosineAnnealingLR(o, 2), None, True, id="cosine, warm"),
    pytest.param(lambda o: CosineAnnealingLR(o, 12), None, False, id="cosine as batches"),
    pytest.param(lambda o: CosineAnnealingLR(o, 1000), None, False, id="cosine as steps"),
    pytest.param(lambda o: CosineAnnealingLR(o, 3), "batch", False, id="cosine as epochs"),
    pytest.param(lambda o: CosineAnnealingLR(o, 12), "batch", True, id="cosine by batches"),
    pytest.param(lambda o: CosineAnnealingLR(o, 10), None, True, id="cosine for more fits"),
    pytest.param(lambda o: LinearLR(o, total_iters=4), None, False, id="warm-up as batches"),
    pytest.param(lambda o: LinearLR(o, total_iters=2), None, True, id="warm-up"),
    pytest.param(lambda o: PolynomialLR(o, 12), None, False, id="polynomial as batches"),
    pytest.param(lambda o: PolynomialLR(o, 3), "batch", False, id="polynomial as epochs"),
    pytest.param(
        lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 7)], milestones=[3]),
        "batch",
        False,
        id="sequence as epochs",
    ),
    pytest.param(
        lambda o: SequentialLR(o, [LinearLR(o), ExponentialLR(o, 0.9)], milestones=[12]),
        None,
        False,
        id="sequence as batches",
    ),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=6), "2 batches", True, id="as steps"),
    pytest.param(lambda o: OneCycleLR(o, 0.1, total_steps=13), "2 batches", False, id="not steps"),
    pytest.param(lambda o: CosineAnnealingLR(o, 6), "2 batches", True, id="cosine as 6 steps"),
    pytest.param(lambda o: CosineAnnealingLR(o, 3), "2 batches", False, id="cosine, by epochs"),
    pytest.param(lambda o: LambdaLR(o, falling(12)), None, False, id="function of batches"),
    pytest.param(lambda o: LambdaLR(o, falling(12)), "step", True, id="function as batches"),
    pytest.param(lambda o: LambdaLR(o, falling(3)), None, True, id="function as epochs"),
    pytest.param(lambda o: LambdaLR(o, in_closure(12)), None, False, id="closure of batches"),
    pytest.param(lambda o: LambdaLR(o, in_closure(3)), None, True, id="closure as epochs"),
    pytest.param(lambda o: LambdaLR(o, lambda n: 0.9**n), None, True, id="function without end"),
]


@pytest.mark.parametrize(("build", "interval", "fits"), LENGTHS)
async def test_scheduler_when_its_length_is_of_something_else_then_says_so(
    build: Callable[[Optimizer], Any], interval: str | None, fits: bool
) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    fitted = trainer(
        model=model,
        optimizer=optimizer,
        lr_scheduler=build(optimizer),
        scheduler_interval="step" if interval == "2 batches" else interval,
        accumulate=2 if interval == "2 batches" else 1,
        valid_dl=None,
    )
    told = nullcontext() if fits else pytest.warns(ScheduleWarning, match="is stepped")
    with told, suppress(ValueError):  # torch's own, at the end of a schedule that is too short
        await fitted.fit(3, **QUIET)


def with_one_cycle(total_steps: int, **changes: Any) -> FitLoop:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = OneCycleLR(optimizer, 0.1, total_steps=total_steps)
    options = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "valid_dl": None}
    return trainer(**options, **changes)


async def test_second_fit_when_the_first_ended_in_an_epoch_then_gives_no_warning() -> None:
    fitted = with_one_cycle(24)
    stopping = fitted.model.register_forward_hook(lambda *_call: fitted.stop())
    await fitted.fit(2, verbose=False)
    stopping.remove()
    assert fitted.lr_scheduler.last_epoch == 1
    await fitted.fit(2, verbose=False)


async def test_second_fit_when_the_schedule_ends_before_it_then_says_so() -> None:
    fitted = with_one_cycle(8)
    await fitted.fit(1, verbose=False)
    message = r"total_steps=8, of which 4 steps are done, and is stepped 8 times"
    with pytest.warns(ScheduleWarning, match=message), pytest.raises(ValueError, match="step 9"):
        await fitted.fit(2, verbose=False)
