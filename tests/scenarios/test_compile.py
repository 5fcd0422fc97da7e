"""A compiled model computes the bits of the plain one, and leaves no trace in names and files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import batches, bits, blobs, loader, mlp, sync_trainer, trainer
from support.resumed_trainings import write_snapshots_at_once
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, Adam

from fitloop import (
    BusyError,
    Checkpoint,
    CompileWarning,
    ConfigurationError,
    FitLoop,
    LoopState,
    SyncFitLoop,
    get_layers,
)
from fitloop._checkpointing.snapshot import read_snapshot

QUIET: dict[str, Any] = {"verbose": False}
AOT = {"backend": "aot_eager"}

# By torch, when it compiles.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # event loops make no difference here


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Forget what other tests have compiled: torch counts it in its limit."""
    torch.compiler.reset()


def fitted(compiled: Any = False, model: Any = None, **changes: Any) -> FitLoop:
    """Return a seeded trainer with dropout, whose batches have one size."""
    return trainer(**arguments(compiled, model, **changes))


def sync_fitted(*args: Any, **changes: Any) -> SyncFitLoop:
    return sync_trainer(**arguments(*args, **changes))


def arguments(compiled: Any = False, model: Any = None, **changes: Any) -> dict[str, Any]:
    model = mlp(dropout=0.2) if model is None else model
    data = batches(24)
    loaders = {"train_dl": data, "valid_dl": data}
    optimizer = Adam(model.parameters(), lr=0.01)
    given = {"model": model, "optimizer": optimizer, "compile": compiled, "seed": 3}
    return {**given, **loaders, **changes}


async def test_compile_when_given_then_bits_are_of_the_plain_model_with_two_graphs() -> None:
    plain = fitted()
    expected = await plain.fit(2, **QUIET)
    counter = CompileCounterWithBackend("aot_eager")
    seen: list[nn.Module] = []
    compiled = fitted(
        {"backend": counter}, train_epoch_start=lambda state: seen.append(state.model)
    )
    result = await compiled.fit(2, **QUIET)
    assert bits(compiled.model) == bits(plain.model)
    assert result.metrics["valid"]["loss"].tolist() == expected.metrics["valid"]["loss"].tolist()
    assert len(counter.graphs) == 2  # to train, and to validate
    assert type(compiled.model) is nn.Sequential
    assert seen[0] is seen[1] is not compiled.model
    assert compiled.name == "Sequential"
    assert len(get_layers(compiled.model)) == 2


async def test_predictions_when_compiled_then_the_model_is_compiled_once() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = fitted({"backend": counter})
    for _ in range(2):
        assert [output async for output in compiled.predict(compiled.train_dl)]
    assert len(counter.graphs) == 1


async def test_model_when_given_compiled_then_the_plain_one_is_owned_and_it_is_called() -> None:
    plain = fitted()
    await plain.fit(1, **QUIET)
    inner = mlp(dropout=0.2)
    counter = CompileCounterWithBackend("eager")
    given = torch.compile(inner, backend=counter)
    seen: list[nn.Module] = []
    wrapped = fitted(model=given, train_epoch_start=lambda state: seen.append(state.model))
    await wrapped.fit(1, **QUIET)
    assert wrapped.model is inner
    assert seen == [given]
    assert len(counter.graphs) == 2
    assert bits(inner) == bits(plain.model)
    assert inner.training
    other = fitted(model=inner)

    def second(state: LoopState) -> None:
        with pytest.raises(BusyError):
            asyncio.run(other.fit(1, **QUIET))

    await fitted(model=given, train_epoch_start=second).fit(1, **QUIET)


@pytest.mark.parametrize("first", [False, AOT], ids=["plain first", "compiled first"])
def test_snapshot_when_resumed_with_or_without_compile_then_bits_are_the_same(
    first: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_snapshots_at_once(monkeypatch)
    whole = sync_fitted()
    whole.fit(3, **QUIET)

    def die(state: LoopState) -> None:
        if state.epoch_num == 2 and state.batch_num == 0 and dies:
            raise KeyError("the program dies here")

    dies = True
    begun = sync_fitted(first, save_path=tmp_path, valid_epoch_start=die)
    with pytest.raises(KeyError):
        begun.fit(3, checkpoint=Checkpoint(every_batches=1), **QUIET)
    file = max(tmp_path.glob("snapshots/*"))
    state = read_snapshot(file).state
    names = [*state["training"]["modules"][0]["weights"], *state["best"]]
    assert not any("_orig_mod" in name for name in names)
    assert b"_orig_mod" not in file.read_bytes()
    dies = False
    resumed = sync_fitted(
        AOT if first is False else False, save_path=tmp_path, valid_epoch_start=die
    )
    resumed.fit(3, resume=True, **QUIET)
    assert bits(resumed.model) == bits(whole.model)
    resumed.save_model("weights.pt")
    assert list(torch.load(tmp_path / "weights.pt")) == list(mlp().state_dict())


async def test_dry_runs_when_compiled_then_leave_no_trace() -> None:
    compiled, plain = fitted(AOT), fitted()
    before = bits(compiled.model)
    await compiled.run_sanity_check()
    await compiled.run_profiler(verbose=False)
    assert bits(compiled.model) == before
    await compiled.fit(1, **QUIET)
    await plain.fit(1, **QUIET)
    assert bits(compiled.model) == bits(plain.model)


async def test_two_trainers_when_both_compile_at_once_then_each_has_the_bits_of_its_own() -> None:
    def with_sgd(compiled: Any = False, seed: int | None = 3) -> FitLoop:
        # Adam rounds in another way while another thread compiles: docs/randomness.md.
        model = mlp(dropout=0.2)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return fitted(compiled, model, optimizer=optimizer, seed=seed)

    alone = with_sgd()
    await alone.fit(2, **QUIET)
    together = [with_sgd(AOT), with_sgd({"backend": "eager"}), with_sgd(), with_sgd(AOT, None)]
    await asyncio.gather(*(each.fit(2, **QUIET) for each in together))
    assert [bits(each.model) == bits(alone.model) for each in together[:3]] == [True] * 3


async def test_trainers_when_more_than_torch_recompiles_a_function_then_each_is_compiled() -> None:
    counter = CompileCounterWithBackend("eager")
    for number in range(torch._dynamo.config.recompile_limit + 1):
        compiled = fitted({"backend": counter}, valid_dl=None)
        await compiled.fit(1, **QUIET)
        assert len(counter.graphs) == number + 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, "compile is 1; expected True, False, or a dict of arguments of torch.compile"),
        ("max-autotune", "compile is 'max-autotune'; expected True, False, or a dict"),
        ({"fast": True}, "which torch.compile does not take: .*'fast'"),
        ({"model": None}, "which torch.compile does not take: .*'model'"),
    ],
)
def test_compile_when_it_cannot_work_then_constructor_says_so(value: Any, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        fitted(value)


@pytest.mark.parametrize("options", [{"backend": "none"}, {"mode": "slow"}])
async def test_compile_when_torch_refuses_an_option_then_error_before_training(
    options: dict[str, Any],
) -> None:
    compiled = fitted(options)
    before = bits(compiled.model)
    with pytest.raises(ConfigurationError, match=r"which torch\.compile refuses: "):
        await compiled.fit(1, **QUIET)
    assert bits(compiled.model) == before


def test_compile_when_the_model_is_compiled_already_then_constructor_says_so() -> None:
    for model in (torch.compile(mlp()), mlp()):
        if isinstance(model, nn.Sequential):
            model.compile(backend="eager")
        with pytest.raises(ConfigurationError, match="the model is compiled already"):
            fitted(True, model=model)


async def test_sequential_when_its_compile_was_called_then_a_warning_says_that_nothing_is() -> None:
    model = mlp()
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    with pytest.warns(CompileWarning, match=r"Sequential\.compile\(\) compiles nothing"):
        await fitted(model=model).fit(1, **QUIET)
    assert counter.graphs == []


async def test_uneven_batches_when_compiled_then_a_warning_says_how_to_avoid_them() -> None:
    uneven = loader(blobs(26))
    expected = "last train batch has 2 samples, the others 8, and a model is compiled anew"
    with pytest.warns(CompileWarning, match=expected):
        await fitted(AOT, train_dl=uneven).fit(1, **QUIET)
    await fitted({**AOT, "dynamic": True}, train_dl=uneven).fit(1, **QUIET)
    await fitted(AOT, train_dl=uneven, valid_dl=None).fit(1, steps=3, **QUIET)
    await fitted(train_dl=uneven).fit(1, **QUIET)
