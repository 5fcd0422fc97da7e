"""``run_sanity_check`` and ``run_profiler`` change nothing, also if they fail."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from support.event_loops import HANG_TIMEOUT
from support.models import (
    Augmented,
    batches,
    bits,
    blobs,
    cnn,
    images,
    internals,
    mlp,
    process_generators,
    seed_process,
    trainer,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset

from fitloop import (
    ConfigurationError,
    FitLoop,
    LoopState,
    MissingCriteriaError,
    RestoreError,
    RestoreWarning,
    default_batch_step,
)

ONE_LOOP = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(("asyncio", {}), id="asyncio")], indirect=True
)
CALLS = pytest.mark.parametrize("call", ["run_sanity_check", "run_profiler"])
STAGES = [
    f"{phase}_{stage}"
    for phase in ("train", "valid", "test")
    for stage in ("epoch_start", "step", "epoch_end")
]


class World:
    """A trainer with everything that a dry run could change, and a view of all of it."""

    def __init__(self, path: Path, **changes: Any) -> None:
        self.path = path
        self.model: Any = cnn()
        self.model.register_buffer("steps", torch.zeros(()))
        self.model[0].weight.requires_grad_(False)
        self.optimizer = AdamW(
            [{"params": [p], "lr": 0.01 * (n + 1)} for n, p in enumerate(self.model.parameters())]
        )
        self.scheduler = OneCycleLR(self.optimizer, 0.1, total_steps=100)
        self.generator = torch.Generator().manual_seed(8)
        data = Augmented(images())
        self.loader = DataLoader(data, 8, shuffle=True, generator=self.generator)
        arguments: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.scheduler,
            "train_dl": self.loader,
            "valid_dl": DataLoader(data, 8),
            "test_dl": DataLoader(data, 8, shuffle=True),
            "save_to_disk": True,
            "save_path": path,
        }
        self.trainer = trainer(**{**arguments, **changes})
        self._one_parameter = next(self.model.parameters())

    async def lived(self) -> World:
        """Train a little, so that there is something to lose."""
        await self.trainer.fit(1, steps=2, verbose=False)
        self.model.eval()
        self.model[1].train()
        self._one_parameter.grad = torch.full_like(self._one_parameter, 3.0)
        return self

    def state(self) -> dict[str, object]:
        made, optimizer, model = self.trainer, self.optimizer, self.model
        rng = internals(made).rng
        return {
            "modules": [(name, id(part), part.training) for name, part in model.named_modules()],
            "parameters": [
                (name, id(p), p.requires_grad, raw(p), None if p.grad is None else raw(p.grad))
                for name, p in model.named_parameters()
            ],
            "buffers": [(name, id(b), raw(b)) for name, b in model.named_buffers()],
            "optimizer": plain(optimizer.state_dict()),
            "groups": (
                id(optimizer.param_groups),
                [(id(g), [id(p) for p in g["params"]]) for g in optimizer.param_groups],
            ),
            "state": [id(parameter) for parameter in optimizer.state],
            "scheduler": plain(self.scheduler.state_dict()),
            "process": process_generators(),
            "streams": repr(draws_of(rng.fork())) if rng.has_streams else None,
            "loader": self.generator.get_state().tolist(),
            "metrics": repr(made.M.to_dict()),
            "best": (made.best_score, made.best_epoch, made.epoch_num, made.M.train_runs),
            "files": {file.name: file.read_bytes() for file in sorted(self.path.glob("**/*"))},
            "threads": torch.get_num_threads(),
        }


def raw(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()


def plain(item: Any) -> Any:
    if isinstance(item, Tensor):
        return raw(item)
    if isinstance(item, dict):
        return {key: plain(part) for key, part in item.items()}
    return [plain(part) for part in item] if isinstance(item, (list, tuple)) else item


def draws_of(rng: Any) -> list[object]:
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn: list[object] = []
    for stream in rng._streams.values():
        torch.default_generator.set_state(stream._torch)
        drawn.append((torch.rand(2).tolist(), stream.python, stream._bits.state))
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(state)
    return drawn


async def dry(made: FitLoop, call: str, **more: Any) -> Any:
    if call == "run_profiler":
        more = {"steps": 3, "verbose": False, **more}
    with anyio.fail_after(HANG_TIMEOUT):
        return await getattr(made, call)(**more)


@CALLS
@pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
@ONE_LOOP
async def test_dry_run_when_it_ends_then_everything_is_as_before(
    call: str, seed: int | None, prefetch: int | None, tmp_path: Path
) -> None:
    np.random.randn()  # leaves the other of a pair behind
    world = await World(tmp_path, seed=seed, prefetch=prefetch).lived()
    before = world.state()
    await dry(world.trainer, call, epochs=2)
    assert world.state() == before


@CALLS
async def test_dry_run_when_on_any_event_loop_then_everything_is_as_before(
    call: str, tmp_path: Path
) -> None:
    world = await World(tmp_path, seed=3).lived()
    before = world.state()
    await dry(world.trainer, call)
    assert world.state() == before


@CALLS
@pytest.mark.parametrize("stage", [*STAGES, "preloop", "postloop"])
@ONE_LOOP
async def test_dry_run_when_a_stage_raises_then_same_error_and_everything_is_as_before(
    call: str, stage: str, tmp_path: Path
) -> None:
    error, armed = ValueError("broken"), False

    def fail(state: Any) -> dict[str, float]:
        if armed:
            raise error
        world.optimizer.step()
        return {"accuracy": 0.5}

    world = World(tmp_path, **{stage: fail}, scheduler_interval="batch")
    await world.lived()
    before, armed = world.state(), True
    with pytest.raises(ValueError, match="broken") as caught:
        await dry(world.trainer, call)
    assert caught.value is error
    assert world.state() == before


@CALLS
@pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("prefetch", [0, 2])
async def test_dry_run_when_cancelled_then_everything_is_as_before(
    call: str, seed: int | None, prefetch: int, tmp_path: Path
) -> None:
    reached, go_on, armed = threading.Event(), threading.Event(), False

    def step(state: LoopState) -> dict[str, float]:
        torch.rand(())
        world.model[7].weight.data.add_(1)
        state.optimizer.step()
        if armed and state.batch_num == 2:
            reached.set()
            assert go_on.wait(HANG_TIMEOUT)
        return {"loss": 1.0}

    changes = {"train_step": step, "scheduler_interval": "batch"}
    world = World(tmp_path, seed=seed, prefetch=prefetch, **changes)
    await world.lived()
    before, armed = world.state(), True
    async with anyio.create_task_group() as group:
        group.start_soon(dry, world.trainer, call)
        assert await anyio.to_thread.run_sync(reached.wait, HANG_TIMEOUT)
        group.cancel_scope.cancel()
        go_on.set()
    assert world.state() == before
    armed = False
    await world.trainer.fit(1, steps=1, verbose=False)


def meddle(state: LoopState) -> None:
    """Change what can be changed, in every way a stage function may."""
    model: Any = state.model
    optimizer = state.optimizer
    model.steps = model.steps + 1  # a buffer replaced
    model[1].running_mean.add_(5)
    model.register_buffer("extra", torch.ones(2))
    model.new = nn.Parameter(torch.ones(2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(True)
    model[7].weight.data = torch.zeros_like(model[7].weight)
    model[2].train(not model[2].training)
    optimizer.param_groups[0]["lr"] = 9.0
    optimizer.param_groups[0]["new"] = [1]
    del optimizer.param_groups[1]["betas"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.param_groups.pop(2)
    optimizer.state.clear()
    state.lr_scheduler.last_epoch = 77
    state.lr_scheduler.base_lrs[0] = 5.0
    random.random()
    np.random.seed(1)
    torch.manual_seed(4)


@CALLS
@pytest.mark.parametrize("stage", [name for name in STAGES if not name.endswith("step")])
@ONE_LOOP
async def test_dry_run_when_a_stage_meddles_then_everything_is_as_before(
    call: str, stage: str, tmp_path: Path
) -> None:
    armed = False

    def once(state: LoopState) -> dict[str, float]:
        if armed:
            meddle(state)
            raise KeyError("enough")
        return {"accuracy": 0.5}

    world = await World(tmp_path, **{stage: once}).lived()
    before, armed = world.state(), True
    with pytest.raises(KeyError, match="enough"):
        await dry(world.trainer, call)
    assert world.state() == before


@CALLS
@ONE_LOOP
async def test_dry_run_when_optimizer_loads_a_state_then_groups_are_the_old_objects(
    call: str,
) -> None:
    def load(state: LoopState) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    groups = list(optimizer.param_groups)
    await dry(trainer(model=model, optimizer=optimizer, train_epoch_start=load), call)
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in groups]


@CALLS
@ONE_LOOP
async def test_dry_run_when_a_module_is_swapped_then_the_old_one_is_back(call: str) -> None:
    old = (model := mlp())[3]

    def swap(state: LoopState) -> None:
        model[3] = nn.Linear(8, 3)

    await dry(trainer(model=model, train_epoch_start=swap), call)
    assert model[3] is old


@CALLS
@ONE_LOOP
async def test_dry_run_when_a_buffer_overlaps_itself_then_it_works(call: str) -> None:
    model = mlp()
    model.register_buffer("scale", torch.ones(1).expand(5))
    weights = copy.deepcopy(model.state_dict())
    await dry(trainer(model=model), call)
    assert plain(model.state_dict()) == plain(weights)


@CALLS
@ONE_LOOP
async def test_dry_run_when_lr_is_changed_afterwards_then_reset_goes_back_to_that(
    call: str,
) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    made = trainer(model=model, optimizer=optimizer, configure_optimizer=lambda trainer: None)
    await dry(made, call)
    optimizer.param_groups[0]["lr"] = 0.5
    await made.fit(1, verbose=False)
    await made.reset()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("seed", [None, 7], ids=["unseeded", "seeded"])
@pytest.mark.parametrize(
    "kind", ["augmented", pytest.param("workers", marks=pytest.mark.slow), "batches"]
)
@CALLS
@ONE_LOOP
async def test_fit_when_after_a_dry_run_then_gives_the_bits_it_would_have_given(
    call: str, seed: int | None, kind: str
) -> None:
    async def trained(first: bool) -> object:
        seed_process(11)
        data = Augmented(blobs())
        loaders: dict[str, Callable[[], Any]] = {
            "augmented": lambda: DataLoader(data, 8, shuffle=True),
            "workers": lambda: DataLoader(
                data, 8, shuffle=True, num_workers=1, persistent_workers=True
            ),
            "batches": batches,
        }
        model = mlp(dropout=0.5)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        made = trainer(
            model=model,
            optimizer=optimizer,
            train_dl=loaders[kind](),
            lr_scheduler=[StepLR(optimizer, 1, 0.5), ReduceLROnPlateau(optimizer, mode="max")],
            seed=seed,
        )
        if first:
            await dry(made, call)
        result = await made.fit(2, verbose=False)
        return plain(model.state_dict()), repr(result.metrics), plain(optimizer.state_dict())

    assert await trained(True) == await trained(False)


async def async_batches() -> AsyncIterator[Any]:
    for batch in batches():
        yield batch


@CALLS
@pytest.mark.parametrize("make", [lambda: iter(batches()), async_batches], ids=["plain", "async"])
@pytest.mark.parametrize("prefetch", [None, 0, 2], ids=str)
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
async def test_dry_run_when_loader_can_be_read_once_then_fit_gets_all_of_it(
    call: str, make: Callable[[], Any], prefetch: int | None, fails: bool
) -> None:
    seen, armed = [], fails

    def step(state: LoopState) -> dict[str, float]:
        if armed:
            raise KeyError("enough")
        seen.append(raw(state.batch[0]))
        state.batch[0].div_(2)  # as normalising, mixing or masking in place
        return {"loss": 1.0}

    made = trainer(train_dl=make(), prefetch=prefetch, train_step=step)
    if fails:
        with pytest.raises(KeyError):
            await dry(made, call)
    else:
        await dry(made, call)
    seen.clear()
    armed = False
    await made.fit(1, verbose=False)
    assert seen == [raw(inputs) for inputs, _targets in batches()]


@CALLS
@ONE_LOOP
async def test_dry_run_when_there_are_callbacks_then_they_are_told_nothing(
    call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[object] = []
    await dry(trainer(callbacks=[told.append]), call)
    assert told == []
    assert capsys.readouterr().out == ""


@ONE_LOOP
async def test_sanity_check_when_criteria_is_never_returned_then_error_lists_what_is() -> None:
    made = trainer(criteria="f1", criteria_direction=1)
    with pytest.raises(MissingCriteriaError, match="loss"):
        await made.run_sanity_check()


class Resumable(IterableDataset[Any]):
    """Begins its next pass at the position that was loaded last, as datasets of libraries do."""

    def __init__(self) -> None:
        self.position: int | None = None
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self.start = self.start, 0
        for inputs, targets in zip(*(item[self.position :] for item in blobs()), strict=True):
            self.position += 1
            yield inputs, targets

    def state_dict(self) -> int | None:
        return self.position

    def load_state_dict(self, state: int | None) -> None:
        self.start = state or 0


@ONE_LOOP
async def test_fit_when_a_dataset_keeps_its_position_then_dry_runs_do_not_shorten_it() -> None:
    made = trainer(train_dl=DataLoader(Resumable(), 8), valid_dl=None)
    await made.run_sanity_check()
    await made.run_profiler(steps=2)
    await made.fit(1, verbose=False)
    await made.run_sanity_check()
    await made.fit(1, verbose=False)
    runs = made.M.train.batch_step["running_loss"]
    assert [len(run) for run in runs] == [4, 4]


class Recurrent(nn.Module):
    """A model that keeps a hidden state, a counter, and a buffer that its first batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 4), nn.Linear(4, 3)
        self.hidden: Tensor | None = None
        self.mean: Tensor
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.hidden is None or len(self.hidden) != len(inputs):
            self.hidden = None
        else:
            self.hidden = self.hidden.detach()
        if not hasattr(self, "mean"):
            self.register_buffer("mean", inputs.mean(0))
        self.calls += 1
        self.hidden = self.cell(inputs - self.mean, self.hidden)
        outputs: Tensor = self.head(self.hidden) / self.calls
        return outputs


class Head(nn.Module):
    """A loss function with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, targets)


class Rates:
    """A scheduler of no library with a generator, which cannot be copied."""

    def __init__(self, optimizer: SGD) -> None:
        self.optimizer, self.rates = optimizer, (0.1 / n for n in range(1, 99))

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] = next(self.rates)


def recurrent(**changes: Any) -> FitLoop:
    torch.manual_seed(0)
    model, loss = Recurrent(), Head()
    optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
    parts = {"model": model, "loss_function": loss, "optimizer": optimizer}
    return trainer(**{**parts, "seed": 1, **changes})


def weights_of(made: FitLoop) -> object:
    assert isinstance(made.loss_function, nn.Module)
    return plain(made.model.state_dict()), plain(made.loss_function.state_dict())


@pytest.mark.parametrize("call", ["run_sanity_check", "run_profiler", "reset"])
@ONE_LOOP
async def test_fit_when_after_a_dry_run_or_reset_then_hidden_states_are_those_of_a_new_trainer(
    call: str,
) -> None:
    def keep(trainer: object) -> None:
        pass

    fresh, used = recurrent(), recurrent(configure_optimizer=keep)
    if call == "reset":
        await used.fit(2, verbose=False)
        await used.reset()
    else:
        await dry(used, call)
    for made in (fresh, used):
        await made.fit(2, verbose=False, load_best=False)
    assert weights_of(used) == weights_of(fresh)


@pytest.mark.parametrize("call", ["run_sanity_check", "run_profiler", "reset"])
@ONE_LOOP
async def test_fit_when_scheduler_cannot_be_copied_then_only_dry_runs_and_reset_are_refused(
    call: str,
) -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.7)
    made = trainer(model=model, optimizer=optimizer, lr_scheduler=Rates(optimizer))
    await made.fit(2, verbose=False)
    assert optimizer.param_groups[0]["lr"] == 0.05
    before = plain(model.state_dict())
    with pytest.raises(RestoreError, match=rf"{call}\(\) was refused.*lr_scheduler\.rates"):
        await getattr(made, call)()
    assert plain(model.state_dict()) == before
    await made.fit(1, verbose=False)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 3


async def test_fit_when_it_may_go_back_and_cannot_then_it_is_refused_before_training() -> None:
    async def never(asked: object) -> bool:
        raise AssertionError

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.7)
    made = trainer(model=model, optimizer=optimizer, lr_scheduler=Rates(optimizer))
    options: dict[str, Any] = {"continue_loop": 1, "continue_while_asking": True}
    with pytest.raises(RestoreError, match="continue_while_asking"):
        await made.fit(3, on_continue=never, verbose=False, **options)
    assert made.epoch_num == 0


@CALLS
@ONE_LOOP
async def test_dry_run_when_an_object_of_the_model_changes_then_a_warning_names_it(
    call: str,
) -> None:
    class Bank:
        count = 0
        last: object = None

    def use(state: LoopState) -> None:
        bank.count += 1
        bank.last = object()

    model, bank = mlp(), Bank()
    model.bank = bank  # type: ignore[assignment]
    with pytest.warns(RestoreWarning, match=r"model\.bank changed"):
        await dry(trainer(model=model, train_epoch_start=use), call)
    assert bank.count == 0


class Counts(nn.Module):
    """A metric with its counts in an object, which only its ``state_dict`` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"seen": [0]}

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {"seen": self.counts["seen"][0]}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.counts["seen"][0] = state_dict["seen"]


@CALLS
@ONE_LOOP
async def test_dry_run_when_a_metric_is_stateful_then_it_has_counted_nothing(call: str) -> None:
    def count(state: LoopState) -> None:
        metric.counts["seen"][0] += state.batch_size

    metric = Counts()
    await dry(trainer(valid_step=count, valid_epoch_end=score, stateful={"n": metric}), call)
    assert metric.counts == {"seen": [0]}


def score(state: LoopState) -> dict[str, float]:
    return {"accuracy": 0.5}


@pytest.mark.parametrize(
    "module", [nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False)], ids=["parameters", "buffers"]
)
@pytest.mark.parametrize("place", ["model", "loss_function", "stateful"])
def test_trainer_when_a_module_is_lazy_then_error_says_where(module: nn.Module, place: str) -> None:
    model = mlp()
    changes: dict[str, dict[str, Any]] = {
        "model": {"model": nn.Sequential(model, module)},
        "loss_function": {"loss_function": module},
        "stateful": {"stateful": {"metric": module}},
    }
    with pytest.raises(ConfigurationError, match="lazy"):
        trainer(**{"optimizer": SGD(model.parameters(), lr=0.1), **changes[place]})


@CALLS
@ONE_LOOP
async def test_dry_run_when_a_module_of_a_stage_changes_then_a_warning_names_it(call: str) -> None:
    teacher = mlp()

    def step(state: LoopState) -> dict[str, Any]:
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(0.5)
        return default_batch_step(state)

    with pytest.warns(RestoreWarning, match=r"train_step\.teacher changed in run_\w+\(\)"):
        await dry(trainer(train_step=step), call)

    given = trainer(train_step=step, stateful={"teacher": teacher})
    before = bits(teacher)
    await dry(given, call)
    assert bits(teacher) == before
