"""The benchmark: what follows from times, and that measuring them leaves no trace."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.models import (
    Augmented,
    batches,
    bits,
    blobs,
    mlp,
    process_generators,
    seed_process,
    sync_trainer,
    trainer,
)
from support.state_comparison import assert_same_state, trainer_state
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import fitloop
from fitloop import (
    BenchReport,
    BusyError,
    ConfigurationError,
    FitLoop,
    FitLoopError,
    LoopState,
    MissingLoaderError,
)
from fitloop._bench.advice import advise
from fitloop._bench.budget import FEWEST, MOST, MOST_ROUNDS, Look, Wanted, size_of
from fitloop._bench.figures import Conditions, Measured, Pass, Round, Spread, Taken, Way, figures_of
from fitloop._bench.passes import SyncCounter
from fitloop._bench.run import BenchRun

GUARD = 30.0
ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
SHORT: dict[str, Any] = {"batches": 3, "rounds": 2}


# -- from times to figures -------------------------------------------------------------------------

CONDITIONS = Conditions(
    trainer="t",
    loader="DataLoader",
    kind="DataLoader",
    epoch=1000,
    batches=100,
    rounds=4,
    seconds=9.0,
    device="cpu",
    num_threads=1,
    cores=8,
    processor="one",
    loads="inline",
    prefetch=None,
    num_workers=0,
    python="3",
    torch="2",
)


def taken(seconds: float, *, waited: float = 0.0, start: float = 0.0, **more: float) -> Taken:
    """Return ten batches of ``seconds`` each, ``waited`` of them waiting."""
    first = waited + start
    whole = 10 * seconds + start
    return Taken((Pass(batches=10, seconds=whole, first=first, waited=9 * waited, **more),))


def measured(
    *, load: float, step: float, starved: float | None = None, **ways: float | Conditions
) -> Measured:
    """Return four equal rounds; ways by their names, in seconds a batch."""
    conditions = ways.pop("conditions", CONDITIONS)
    start, computed = ways.pop("start", 0.0), ways.pop("computed", None)
    whole = ways.pop("fitloop", load + step)
    assert isinstance(conditions, Conditions)
    assert isinstance(whole, float)
    waited = load if starved is None else starved * whole
    one: dict[Way, Taken] = {
        Way.LOAD: taken(load, waited=load, **({} if computed is None else {"computed": computed})),  # type: ignore[arg-type]
        Way.STEP: taken(step),
        Way.FITLOOP_IN_MEMORY: taken(ways.pop("fitloop_in_memory", step)),  # type: ignore[arg-type]
        Way.BARE: taken(load + step, waited=load),
        Way.FITLOOP: taken(whole, waited=waited, start=start),  # type: ignore[arg-type]
    }
    one |= {Way(name): taken(seconds) for name, seconds in ways.items()}  # type: ignore[arg-type]
    return Measured(conditions=conditions, rounds=[one] * 4)


def told(found: Measured) -> dict[str, str]:
    """Return the text of all advice, by what it is about."""
    return {advice.about: advice.text for advice in BenchReport.of(found).advice}


def changes(found: Measured) -> set[str]:
    return {advice.about for advice in BenchReport.of(found).advice if advice.change}


def test_pass_when_the_first_batch_takes_longer_then_that_is_its_start() -> None:
    one = Pass(batches=5, seconds=20.0, first=6.0, waited=4.0)
    assert one.startup == 5.0
    both = Taken((one, Pass(batches=5, seconds=15.0, first=1.0, waited=4.0)))
    assert (both.batches, both.seconds, both.per_batch) == (10, 30.0, 3.0)
    assert both.starved == 10 / 30
    assert both.startup == 2.5


def test_pass_when_it_has_one_batch_then_no_start_is_told_apart() -> None:
    assert Pass(batches=1, seconds=9.0, first=6.0, waited=0.0).startup == 0.0


def test_figures_when_times_are_given_then_follow_from_them() -> None:
    found = figures_of(
        measured(
            load=3.0,
            step=2.0,
            fitloop=4.0,
            starved=0.5,
            fitloop_in_memory=2.25,
            prefetch_0=5.0,
            prefetch_2=4.0,
        )
    )
    assert found.overhead.values == (0.25,) * 4
    assert found.overlap.median == 4 / 3
    assert found.against_both.median == 4 / 5
    assert found.starved.median == pytest.approx(0.5)
    assert found.hidden is not None
    assert found.hidden.median == 0.5  # of the two seconds of a step, one is saved
    assert found.lag is None


def test_figures_when_rounds_differ_then_are_compared_within_rounds() -> None:
    slow: Round = {way: taken(each.per_batch * 10) for way, each in two().rounds[0].items()}
    mixed = replace(two(), rounds=[*two().rounds, slow, slow])
    figures = figures_of(mixed)
    assert figures.overlap.low == pytest.approx(figures.overlap.high)
    assert figures.overhead.high == pytest.approx(10 * figures.overhead.low)


def two() -> Measured:
    return measured(load=3.0, step=2.0, fitloop_in_memory=2.5)


SECONDS = st.floats(1e-6, 1e3)


@st.composite
def rounds(draw: st.DrawFn) -> list[Round]:
    def way() -> Taken:
        waits = [draw(SECONDS) for _ in range(3)]
        steps = draw(SECONDS)
        whole = sum(waits) + steps
        return Taken((Pass(batches=3, seconds=whole, first=waits[0], waited=sum(waits[1:])),))

    return [{each: way() for each in Way} for _ in range(draw(st.integers(1, 5)))]


@given(rounds=rounds(), factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_figures_when_the_machine_is_slower_then_ratios_stay(
    rounds: list[Round], factor: float
) -> None:
    def slower(one: Pass) -> Pass:
        times = {name: getattr(one, name) * factor for name in ("seconds", "first", "waited")}
        return replace(one, **times)

    scaled = [
        {way: Taken(tuple(map(slower, each.passes))) for way, each in one.items()} for one in rounds
    ]
    was, now = (figures_of(Measured(conditions=CONDITIONS, rounds=r)) for r in (rounds, scaled))
    for name in ("overlap", "against_both", "starved", "hidden"):
        assert getattr(now, name) == getattr(was, name)
    for name in ("overhead", "startup"):
        assert getattr(now, name).median == getattr(was, name).median * factor
    assert all(0 <= share <= 1 for share in was.starved.values)
    assert all(taken[Way.FITLOOP].startup >= 0 for taken in rounds)


@given(rounds=rounds())
def test_report_when_times_are_any_then_it_can_be_shown(rounds: list[Round]) -> None:
    report = BenchReport.of(Measured(conditions=CONDITIONS, rounds=rounds, lags=[0.001] * 3))
    assert json.loads(json.dumps(report.to_dict()))["conditions"]["trainer"] == "t"
    assert report.advice
    for advice in report.advice:
        assert f" - {advice.text}" in " ".join(str(report).split())
        assert "nan" not in advice.text
    assert report._repr_html_().count("<table>") == 2


@pytest.mark.parametrize(
    ("values", "above", "below"),
    [
        ((2.0, 2.0, 2.0, 0.5), True, False),
        ((2.0, 2.0, 0.5, 0.5), False, False),
        ((0.5, 0.5, 0.5, 2.0), False, True),
        ((1.0,), False, False),
        ((2.0, 2.0, 2.0), True, False),
        ((2.0, 2.0, 0.5), False, False),  # of three rounds all must agree
        ((0.5, 0.5, 2.0), False, False),
    ],
)
def test_spread_when_rounds_disagree_then_it_is_neither_above_nor_below(
    values: tuple[float, ...], above: bool, below: bool
) -> None:
    assert Spread(values).is_above(1.0) is above
    assert Spread(tuple(-value for value in values)).is_below(-1.0) is above
    assert Spread(values).is_below(1.0) is below


def test_report_when_more_than_all_or_less_than_nothing_was_hidden_then_shows_all_or_nothing() -> (
    None
):
    """Where hardly anything can be hidden, the noise is many times of it."""
    ways: Any = {"load": 0.0001, "step": 0.01, "prefetch_0": 0.0101}
    more, less = (measured(**ways, prefetch_2=ahead).rounds[0] for ahead in (0.0096, 0.0114))
    found = BenchReport.of(Measured(conditions=CONDITIONS, rounds=[less, more, more]))
    (row,) = (line for line in str(found).splitlines() if line.startswith("loading ahead"))
    assert row.split()[-3:] == ["100%", "0%", "100%"]
    raw = found.to_dict()["hidden"]
    assert (raw["min"], raw["max"]) == pytest.approx((-13.0, 5.0))


# -- advice ----------------------------------------------------------------------------------------


def test_advice_when_the_loader_keeps_up_then_nothing_is_to_be_changed() -> None:
    found = measured(load=0.001, step=0.05, fitloop=0.051, fitloop_in_memory=0.0501)
    texts = told(found)
    assert changes(found) == set()
    assert texts["nothing"] == "Nothing to change."
    assert "keeps up: the step waits for it 2% of the time" in texts["loader"]
    assert texts["overhead"] == "fitloop adds 100 us a batch, 0.2% of a step."


def test_advice_when_rounds_disagree_on_waiting_then_it_cannot_be_told() -> None:
    one = measured(load=0.001, step=0.05, fitloop=0.051).rounds[0]
    given = [{**one, Way.FITLOOP: taken(0.051, waited=0.051 * s)} for s in (0.02, 0.01, 0.8)]
    found = Measured(conditions=CONDITIONS, rounds=given)
    assert told(found)["loader"] == (
        "Whether the loader keeps up cannot be told from these rounds: the step waits for it "
        "1% to 80% of the time. Measure again, for longer or on a quieter machine."
    )
    assert "nothing" not in told(found)
    agreed = replace(found, rounds=[given[0], given[1], given[0]])
    assert told(agreed)["loader"].startswith("The loader keeps up: the step waits for it 2% ")


def test_advice_when_the_loader_holds_the_interpreter_then_is_workers() -> None:
    found = measured(
        load=0.0074, step=0.0052, fitloop=0.0124, starved=0.6, prefetch_0=0.0126, prefetch_2=0.0124
    )
    text = told(found)["loader"]
    assert "bottleneck (load 7.4 ms, step 5.2 ms a batch; it waits 60% of the time)" in text
    assert "holds the interpreter" in text
    assert "hides only 4%" in text
    assert "num_workers=2: at the best 5.2 ms instead of 12.4 ms a batch." in text
    assert changes(found) == {"loader"}


def test_advice_when_the_loader_waits_then_there_may_be_more_workers_than_cores() -> None:
    few = replace(CONDITIONS, cores=2)
    given: Any = {"load": 0.03, "step": 0.005, "fitloop": 0.031, "conditions": few}
    assert "num_workers=2:" in told(measured(**given))["loader"]
    text = told(measured(**given, computed=0.003))["loader"]
    assert "It computes 1% of its time, and waits for the rest." in text
    assert "num_workers=6: at the best 5.0 ms" in text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"kind": "iterable"}, "give a DataLoader over a Dataset with num_workers"),
        ({"kind": "async"}, "Read several batches at once"),
        ({"num_workers": 2}, "Give the DataLoader num_workers=6 instead of 2"),
        ({"num_workers": 8}, "It has 8 workers on 8 cores already"),
        ({"cores": 1}, "There is one core"),
    ],
)
def test_advice_when_the_loader_is_the_bottleneck_then_suits_its_kind(
    changed: dict[str, Any], says: str
) -> None:
    found = measured(
        load=0.03, step=0.01, fitloop=0.031, starved=0.7, conditions=replace(CONDITIONS, **changed)
    )
    assert says in told(found)["loader"]
    assert changes(found) == {"loader"}


def test_advice_when_loading_ahead_was_faster_then_is_prefetch() -> None:
    given: Any = {"load": 0.004, "step": 0.005, "prefetch_0": 0.009, "prefetch_2": 0.0052}
    texts = told(measured(**given))
    assert texts["prefetch"].startswith("Give prefetch=2: a batch took 9.0 ms as it is set up, and")
    assert "loader" not in texts
    seeded = replace(CONDITIONS, takes_turns=True)
    assert 'loader_randomness="own"' in told(measured(**given, conditions=seeded))["prefetch"]


def test_advice_when_loading_ahead_costs_then_is_to_leave_it() -> None:
    ahead = replace(CONDITIONS, loads="ahead", prefetch=2)
    found = measured(
        load=0.001, step=0.002, fitloop=0.004, prefetch_0=0.003, starved=0.05, conditions=ahead
    )
    assert told(found)["prefetch"].startswith("Give prefetch=0: loading ahead costs more")


@pytest.mark.parametrize("persistent", [False, True])
def test_advice_when_each_epoch_starts_slowly_then_says_so(persistent: bool) -> None:
    given = replace(CONDITIONS, epoch=20, num_workers=4, persistent_workers=persistent)
    found = measured(load=0.001, step=0.01, starved=0.01, start=0.1, conditions=given)
    text = told(found)["start"]
    assert text.startswith("Each epoch begins with 100.0 ms of waiting, 31% of it")
    assert ("persistent_workers=True" in text) is not persistent
    longer = replace(given, epoch=10_000)
    assert "start" not in told(replace(found, conditions=longer))


def test_advice_when_one_thread_is_faster_then_is_one_thread() -> None:
    many = replace(CONDITIONS, num_threads=4)
    found = measured(load=0.0, step=0.01, step_1_thread=0.008, conditions=many)
    assert (
        "num_threads=1: a step takes 8.0 ms with one intra-op thread, 10.0 ms with 4"
        in (told(found)["threads"])
    )
    assert "Then measure the loader again" in told(found)["threads"]
    slower = measured(load=0.0, step=0.01, step_1_thread=0.02, conditions=many)
    assert "threads" not in told(slower)


def test_advice_when_steps_do_little_then_is_larger_batches_and_processes() -> None:
    texts = told(measured(load=0.0, step=0.0002, fitloop_in_memory=0.00025))
    assert "fitloop's own 50 us a batch are 25% of it: larger batches" in texts["overhead"]
    assert 'Runner(backend="process")' in texts["many"]


def test_advice_when_an_async_step_costs_then_is_a_plain_one() -> None:
    given = replace(CONDITIONS, async_step=True)
    found = measured(load=0.0, step=0.001, fitloop_in_memory=0.0013, conditions=given)
    assert "make it a plain function" in told(found)["overhead"]


def test_advice_when_the_overhead_drowns_then_is_not_told_as_a_figure() -> None:
    found = measured(load=0.0, step=0.01, fitloop_in_memory=0.009)
    assert "cannot be told from the noise: -1.0 ms at the median" in told(found)["overhead"]


def test_advice_when_the_machine_was_busy_then_says_so_first() -> None:
    quick, slow = measured(load=0.0, step=0.01), measured(load=0.0, step=0.02)
    mixed = replace(quick, rounds=[*quick.rounds[:2], *slow.rounds[:2]])
    first = BenchReport.of(mixed).advice[0]
    assert first.about == "noise"
    assert "took between 10.0 ms and 20.0 ms" in first.text


def test_advice_when_the_steps_hardly_had_the_processor_then_differences_are_not_believed() -> None:
    found = measured(load=0.02, step=0.01, fitloop_in_memory=0.03, computed=0.01)
    starved = {**found.rounds[0], Way.STEP: taken(0.01, computed=0.02)}
    texts = told(replace(found, rounds=[starved] * 3))
    assert "they had the processor for 20% of their time" in texts["noise"]
    assert "cannot be told from the noise: 20.0 ms at the median" in texts["overhead"]
    # It had the processor for 5% of its time, a quarter of what the steps had: too near to call.
    assert "waits for the rest" not in texts["loader"]


def test_advice_when_steps_wait_for_the_device_then_is_to_return_tensors() -> None:
    given = replace(CONDITIONS, device="cuda:0", syncs=2.0)
    assert (
        "waits for the device 2.0 times"
        in (told(measured(load=0.0, step=0.01, conditions=given))["device"])
    )


def test_advice_when_the_event_loop_is_held_up_then_says_how_long() -> None:
    late = replace(measured(load=0.0, step=0.01), lags=[0.001] * 90 + [0.2] * 10)
    assert "200.0 ms late at the 99th percentile" in told(late)["event loop"]
    found = figures_of(late)
    assert found.lag is not None
    assert (found.lag.p50, found.lag.max, found.lag.beats) == (0.001, 0.2, 100)


@given(rounds=rounds())
def test_advice_when_times_are_any_then_changes_come_first(rounds: list[Round]) -> None:
    found = advise(CONDITIONS, figures_of(Measured(conditions=CONDITIONS, rounds=rounds)))
    flags = [advice.change for advice in found if advice.about != "nothing"]
    assert flags == sorted(flags, reverse=True)
    assert any(flags) == all(advice.about != "nothing" for advice in found)


# -- how much is measured --------------------------------------------------------------------------


@given(
    load=st.floats(0, 10),
    step=st.floats(0, 10),
    seconds=st.floats(1, 100),
    epoch=st.none() | st.integers(1, 10_000),
)
def test_size_when_found_out_then_keeps_to_the_time_or_is_the_least(
    load: float, step: float, seconds: float, epoch: int | None
) -> None:
    size = size_of(Look(load=load, step=step), Wanted(seconds=seconds), list(Way), epoch)
    assert 3 <= size.rounds <= MOST_ROUNDS
    assert epoch is None or size.batches <= epoch
    whole = size.batches * size.repeats
    assert whole >= FEWEST
    assert size.batches <= MOST
    cost = (5 * load + 7 * step) * whole * size.rounds
    least = size.rounds == 3 and whole < 2 * FEWEST
    assert cost <= 2 * seconds or least  # passes are rounded up to whole epochs


@given(batches=st.integers(2, 500), rounds=st.integers(1, 50), epoch=st.integers(1, 100))
def test_size_when_given_then_is_that(batches: int, rounds: int, epoch: int) -> None:
    wanted = Wanted(batches=batches, rounds=rounds)
    size = size_of(Look(load=1.0, step=1.0), wanted, list(Way), epoch)
    assert size.rounds == rounds
    assert batches <= size.batches * size.repeats < batches + epoch


def test_size_when_workers_have_batches_ready_then_passes_are_longer() -> None:
    look = Look(load=0.001, step=0.001, start=0.1, buffered=16)
    size = size_of(look, Wanted(seconds=1.0), [Way.LOAD, Way.FITLOOP], 1000)
    assert size.batches >= 128


# -- measuring -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(BenchRun, "clock", staticmethod(made))
    return made


def small(**changes: Any) -> FitLoop:
    """Return a trainer that does not fight for the cores."""
    return trainer(**{"num_threads": 1, **changes})


async def bench(made: Any, **changes: Any) -> BenchReport:
    with anyio.fail_after(GUARD):
        return await fitloop.benchmark(made, **{**SHORT, **changes})


def medians(report: BenchReport) -> dict[str, float]:
    return {str(way): spread.median for way, spread in report.figures.per_batch.items()}


def spending(clock: Clock, seconds: float) -> Callable[[LoopState], dict[str, float]]:
    def step(state: LoopState) -> dict[str, float]:
        clock.spend(seconds)
        return {"loss": 1.0}

    return step


@ONE_LOOP
async def test_benchmark_when_time_passes_in_loader_and_step_then_each_way_has_its_own(
    clock: Clock,
) -> None:
    def slow() -> Iterator[Any]:
        for batch in batches():
            clock.spend(3.0)
            yield batch

    made = small(train_dl=slow, train_step=spending(clock, 2.0), prefetch=0)
    report = await bench(made)
    found = medians(report)
    assert found.pop("prefetch_2") <= 5.0
    assert found == {
        "load": 3.0,
        "step": 2.0,
        "bare": 5.0,
        "fitloop": 5.0,
        "fitloop_in_memory": 2.0,
        "prefetch_0": 5.0,
    }
    assert report.figures.starved.median == 0.6
    assert report.figures.overhead.values == (0.0, 0.0)
    assert report.figures.overlap.median == 5 / 3
    assert (report.conditions.batches, report.conditions.rounds) == (3, 2)
    assert (report.conditions.kind, report.conditions.loads) == ("iterable", "inline")


@ONE_LOOP
async def test_benchmark_when_the_loader_takes_long_to_begin_then_that_is_told_apart(
    clock: Clock,
) -> None:
    class Slow(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            clock.spend(50.0)
            return super().__iter__()

    made = small(train_dl=Slow(batches()), train_step=spending(clock, 2.0))
    report = await bench(made)
    assert report.figures.startup.values == (50.0, 50.0)
    assert medians(report)["fitloop"] == medians(report)["bare"] == 2.0


@ONE_LOOP
async def test_benchmark_when_epoch_stages_take_long_then_they_are_not_counted(
    clock: Clock,
) -> None:
    def stage(state: LoopState) -> None:
        clock.spend(70.0)

    made = small(train_epoch_start=stage, train_epoch_end=stage, train_step=spending(clock, 2.0))
    assert medians(await bench(made))["fitloop"] == medians(await bench(made))["step"] == 2.0


@ONE_LOOP
async def test_benchmark_when_the_epoch_is_short_then_passes_are_repeated(clock: Clock) -> None:
    seen = 0

    def step(state: LoopState) -> None:
        nonlocal seen
        seen += 1
        assert state.batch_num <= 4
        clock.spend(1.0)

    report = await bench(small(train_step=step), batches=10)
    assert report.conditions.batches == 12
    assert medians(report)["step"] == 1.0
    assert seen > 2 * 4 * 12


@ONE_LOOP
async def test_benchmark_when_time_is_up_then_the_rounds_there_are_must_do(clock: Clock) -> None:
    steps = 0

    def step(state: LoopState) -> None:
        nonlocal steps
        steps += 1
        clock.spend(0.01 if steps < 10 else 1.0)  # slower than it looked at first

    report = await bench(small(train_step=step), batches=None, rounds=None, seconds=5.0)
    assert report.conditions.rounds == 3


WORLDS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "augmented": lambda: DataLoader(
        Augmented(blobs()), 8, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "generator": lambda: functools.partial(iter, batches()),
    "async": lambda: async_batches,
}


async def async_batches() -> AsyncIterator[Any]:
    for batch in batches():
        yield batch


async def lived(kind: str, seed: int | None, **changes: Any) -> FitLoop:
    """Return a trainer that has been trained a little, so that there is something to lose."""
    seed_process(4)
    model = mlp(dropout=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    made = small(
        model=model,
        optimizer=optimizer,
        lr_scheduler=OneCycleLR(optimizer, 0.1, total_steps=8),
        train_dl=WORLDS[kind](),
        seed=seed,
        **changes,
    )
    await made.fit(1, verbose=False)
    model.eval()
    model[0].train()
    return made


def everything(made: FitLoop) -> dict[str, Any]:
    state = trainer_state(made)
    state["modes"] = [module.training for module in made.model.modules()]
    grads = [p.grad for p in made.model.parameters()]
    state["grads"] = [None if grad is None else grad.tolist() for grad in grads]
    generator = getattr(made.train_dl, "generator", None)
    state["generator"] = None if generator is None else generator.get_state().tolist()
    state["threads"] = torch.get_num_threads()
    state["grad mode"] = torch.is_grad_enabled()
    return state


@pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
@ONE_LOOP
async def test_benchmark_when_it_ends_then_everything_is_as_before(
    kind: str, seed: int | None, prefetch: int | None
) -> None:
    made = await lived(kind, seed, prefetch=prefetch)
    before = everything(made)
    await bench(made)
    assert_same_state(everything(made), before)


async def test_benchmark_when_on_any_event_loop_then_everything_is_as_before() -> None:
    made = await lived("augmented", None)
    before = everything(made)
    report = await bench(made)
    assert_same_state(everything(made), before)
    assert report.figures.lag is None or report.figures.lag.beats > 0


@ONE_LOOP
async def test_fit_when_after_a_benchmark_then_gives_the_bits_it_would_have_given() -> None:
    async def trained(*, first: bool) -> object:
        made = await lived("augmented", None)
        if first:
            await bench(made)
        result = await made.fit(1, verbose=False)
        return bits(made.model), repr(result.metrics), process_generators()

    assert await trained(first=True) == await trained(first=False)


@pytest.mark.parametrize("way", ["first look", "step only", "fitloop"])
@ONE_LOOP
async def test_benchmark_when_cancelled_then_everything_is_as_before(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    armed = False

    def step(state: LoopState) -> dict[str, float]:
        torch.rand(())
        state.optimizer.step()
        if armed and doing == way and state.batch_num == 2:
            reached.set()
            assert go_on.wait(GUARD)
        return {"loss": 1.0}

    doing = ""
    begun = BenchRun._restore

    def restore(run: BenchRun) -> None:
        nonlocal doing
        doing = run._doing or ""
        begun(run)

    monkeypatch.setattr(BenchRun, "_restore", restore)
    made = await lived("augmented", None, train_step=step, scheduler_interval="batch")
    before, armed = everything(made), True
    async with anyio.create_task_group() as group:
        group.start_soon(bench, made)
        assert await anyio.to_thread.run_sync(reached.wait, GUARD)
        group.cancel_scope.cancel()
        go_on.set()
    assert_same_state(everything(made), before)
    armed = False
    await made.fit(1, steps=1, verbose=False)


@pytest.mark.parametrize("where", ["train_step", "train_epoch_start", "loader", "preloop"])
@ONE_LOOP
async def test_benchmark_when_something_raises_then_same_error_and_everything_is_as_before(
    where: str,
) -> None:
    error, calls, armed = ValueError("broken"), 0, False

    def fail(*given: Any) -> Any:
        nonlocal calls
        if where == "train_step":
            given[0].optimizer.step()
        calls += armed
        if armed and (calls == 9 or where == "preloop"):
            raise error
        return {"loss": 1.0}

    def failing() -> Iterator[Any]:
        for batch in batches():
            fail()
            yield batch

    changes: dict[str, Any] = {} if where == "loader" else {where: fail}
    made = await lived("list", None, scheduler_interval="batch", **changes)
    before, armed = everything(made), True
    with pytest.raises(ValueError, match="broken") as caught:
        await bench(made, **({"train_dl": failing} if where == "loader" else {}))
    assert caught.value is error
    assert any("in trainer 'Sequential': " in note for note in error.__notes__)
    assert_same_state(everything(made), before)


@ONE_LOOP
async def test_benchmark_when_a_pass_by_hand_raises_then_the_note_names_it() -> None:
    def step(state: LoopState) -> None:
        if type(state._values).__name__ == "KeptValues":
            raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        await bench(small(train_step=step))
    assert "benchmark, step only" in caught.value.__notes__[0]


@ONE_LOOP
async def test_benchmark_when_stopped_then_reports_the_rounds_that_ended(clock: Clock) -> None:
    steps = 0

    def step(state: LoopState) -> None:
        nonlocal steps
        steps += 1
        clock.spend(1.0)
        if steps == 150:
            made.stop()

    made = small(train_step=step)
    report = await bench(made, rounds=100)
    assert 1 <= report.conditions.rounds < 100
    assert medians(report)["step"] == 1.0


@ONE_LOOP
async def test_benchmark_when_stopped_at_once_then_says_that_there_is_nothing_to_tell() -> None:
    with pytest.raises(FitLoopError, match="before its first round had ended"):
        await bench(small(train_step=lambda state: state.stop()))


@pytest.mark.parametrize("kind", ["plain", "async"])
@ONE_LOOP
async def test_benchmark_when_the_loader_can_be_read_once_then_says_how_to_mend_it(
    kind: str,
) -> None:
    once: Any = iter(batches()) if kind == "plain" else async_batches()
    with pytest.raises(ConfigurationError, match="a function that makes a new iterator"):
        await bench(small(train_dl=once))
    if kind == "async":
        await once.aclose()
    else:
        assert len(list(once)) == 4  # nothing was read


@ONE_LOOP
async def test_benchmark_when_a_function_gives_one_iterator_again_then_says_so() -> None:
    one = iter(batches())
    with pytest.raises(ConfigurationError, match="no batches"):
        await bench(small(train_dl=lambda: one))


@ONE_LOOP
async def test_benchmark_when_the_step_is_async_then_both_loops_await_it(clock: Clock) -> None:
    threads = set()

    async def step(state: LoopState) -> dict[str, float]:
        threads.add(threading.current_thread())
        clock.spend(2.0)
        await anyio.lowlevel.checkpoint()
        assert torch.is_grad_enabled()
        return {"loss": float(state.batch_num)}

    report = await bench(small(train_step=step))
    assert threads == {threading.main_thread()}
    assert report.conditions.async_step
    found = medians(report)
    assert found["step"] == found["fitloop_in_memory"] == found["fitloop"] == 2.0
    assert "bare" not in found


async def test_benchmark_when_the_loader_is_async_then_is_read_on_the_event_loop() -> None:
    report = await bench(small(train_dl=async_batches))
    assert report.conditions.loads == "on the event loop"
    assert {"load", "step", "fitloop"} <= set(medians(report))
    assert "bare" not in medians(report)


@ONE_LOOP
async def test_benchmark_when_the_step_asks_for_what_it_returned_then_gets_it_in_both_loops() -> (
    None
):
    def step(state: LoopState) -> dict[str, Any]:
        if state.batch_num > 1:
            assert "seen" in state
            seen: Any = state["seen"]
            assert seen.tolist() == list(range(1, state.batch_num))
            assert [part.tolist() for part in state["parts"]] == [[1.0]] * (state.batch_num - 1)
            assert state.names() == ["seen", "parts"]
        assert state.size > 0
        return {"seen": torch.tensor(float(state.batch_num)), "parts": torch.ones(1)}

    await bench(small(train_step=step, train_epoch_end=lambda state: None))


@ONE_LOOP
async def test_benchmark_when_workers_persist_then_the_users_own_are_left_alone() -> None:
    loader = DataLoader(
        Augmented(blobs()), 8, num_workers=1, persistent_workers=True, prefetch_factor=2
    )
    report = await bench(small(train_dl=loader), rounds=1, batches=2)
    assert loader._iterator is None
    assert (report.conditions.num_workers, report.conditions.persistent_workers) == (1, True)


@ONE_LOOP
async def test_benchmark_when_schedulers_go_by_epochs_or_scores_then_they_are_not_stepped() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, mode="max")
    made = small(model=model, optimizer=optimizer, lr_scheduler=plateau)
    before = everything(made)
    await bench(made)
    assert_same_state(everything(made), before)


@ONE_LOOP
async def test_benchmark_when_there_are_threads_then_one_is_tried_and_they_are_put_back() -> None:
    seen = set()

    def step(state: LoopState) -> None:
        seen.add(torch.get_num_threads())

    before = torch.get_num_threads()
    report = await bench(small(train_step=step, num_threads=before + 1))
    assert seen == {1, before + 1}
    assert torch.get_num_threads() == before
    assert "step_1_thread" in medians(report)
    assert report.conditions.num_threads == before + 1


@ONE_LOOP
async def test_benchmark_when_hooks_are_given_then_they_are_called_once() -> None:
    called = []
    made = small(
        preloop=lambda _trainer: called.append("preloop"),
        postloop=lambda _trainer: called.append("postloop"),
        callbacks=[lambda event: called.append(event)],
        valid_step=lambda state: called.append("valid"),
        criteria="loss",
        criteria_direction=-1,
    )
    await bench(made)
    assert called == ["preloop", "postloop"]


async def made_async() -> FitLoop:
    return small()


@pytest.mark.parametrize(
    "factory", [small, made_async, sync_trainer, lambda: made_async()], ids=range(4)
)
@ONE_LOOP
async def test_benchmark_when_given_a_function_then_measures_what_it_makes(
    factory: Callable[[], Any],
) -> None:
    assert (await bench(factory)).conditions.trainer == "Sequential"


@ONE_LOOP
async def test_benchmark_when_arguments_are_wrong_then_says_what_is_expected() -> None:
    for wrong, says in (
        ({"batches": 1}, "batches is 1; expected an integer of at least 2"),
        ({"rounds": 0}, "rounds is 0; expected"),
        ({"seconds": -1}, "seconds is -1; expected seconds above 0"),
        ({"train_dl": 3}, "expected a DataLoader, a list"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            await bench(small(), **wrong)
    with pytest.raises(ConfigurationError, match="given 3; expected a FitLoop, or a function"):
        await bench(3)
    with pytest.raises(ConfigurationError, match="the factory returned 3; expected a FitLoop"):
        await bench(lambda: 3)
    with pytest.raises(MissingLoaderError):
        await bench(small(train_dl=None))


@ONE_LOOP
async def test_benchmark_when_the_trainer_is_busy_then_says_so() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def step(state: LoopState) -> None:
        reached.set()
        assert go_on.wait(GUARD)

    made = small(train_step=step)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(bench, made, rounds=1))
        assert await anyio.to_thread.run_sync(reached.wait, GUARD)
        with pytest.raises(BusyError, match=r"benchmark\(\)"):
            await made.fit(1)
        go_on.set()


@ONE_LOOP
async def test_benchmark_when_there_is_no_terminal_then_shows_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    await bench(small())
    assert capsys.readouterr() == ("", "")


def test_sync_counter_when_values_are_read_then_counts_those_of_its_device() -> None:
    x = torch.ones(3)
    with SyncCounter("cpu") as counter:
        x.sum().item()
        float(x[0])
        assert x[0] > 0
        x + x
    assert counter.count == 3
    with SyncCounter("cuda") as other:
        x.tolist()
    assert other.count == 0
