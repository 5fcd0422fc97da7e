"""The methods that save and load, of both trainers, in memory and on disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from support.models import (
    batches,
    bits,
    blobs,
    cnn,
    images,
    loader,
    mlp,
    seed_process,
    sync_trainer,
    trainer,
)
from support.state_comparison import AnyTrainer, assert_same_state, trainer_state
from support.tensors import SUFFIXES
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from fitloop import BusyError, Checkpoint, CheckpointError, SyncFitLoop, SyncInAsyncError
from fitloop._checkpointing.snapshot import read_snapshot

QUIET: dict[str, Any] = {"verbose": False}

each_trainer = pytest.mark.parametrize("make", [trainer, sync_trainer], ids=["FitLoop", "Sync"])
each_store = pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])


def do(fitted: AnyTrainer, verb: str, *args: Any, **kwargs: Any) -> Any:
    """Call a verb of either trainer, and return what it returns."""
    call = partial(getattr(fitted, verb), *args, **kwargs)
    return call() if isinstance(fitted, SyncFitLoop) else anyio.run(call)


def model_bits(fitted: AnyTrainer) -> dict[str, bytes]:
    return bits(fitted.model)


def change(fitted: AnyTrainer, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in fitted.model.parameters():
            parameter.add_(by)


# -- save and load ---------------------------------------------------------------------------------


class Ema:
    """Something else with a state: an average of the weights, and containers of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.recent: deque[torch.Tensor] = deque(maxlen=2)
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        for name, parameter in self._model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)
        self.recent.append(next(self._model.parameters()).detach().sum().reshape(1))

    def state_dict(self) -> dict[Any, Any]:
        return {"average": self.average, "recent": self.recent, ("updates",): self.updates}

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.average, self.recent = dict(state["average"]), state["recent"]
        self.updates = state["updates",]


def rich(make: Callable[..., AnyTrainer], kind: str, **changes: Any) -> AnyTrainer:
    """Return a trainer that keeps all sorts of state."""
    model = changes.pop("model", None) or cnn()
    ema = Ema(model)
    optimizer = AdamW(model.parameters(), lr=0.01, amsgrad=True)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": OneCycleLR(optimizer, 0.05, total_steps=40),
        "train_dl": loader(images(), shuffle=True),
        "valid_dl": loader(images(14, seed=2)),
        "test_dl": loader(images(14, seed=3)),
        "stateful": {"ema": ema},
        "callbacks": [lambda event: ema.update() if event.kind == "epoch_ended" else None],
        "seed": 3,
    }
    if kind == "unseeded":
        options["seed"] = None
    elif kind == "plateau":
        options["lr_scheduler"] = ReduceLROnPlateau(optimizer, patience=0, mode="max")
    elif kind == "two optimizers":
        features, head = list(model.children())[:5], list(model.children())[5:]
        first = SGD(nn.ModuleList(features).parameters(), lr=0.05, momentum=0.9, nesterov=True)
        second = AdamW(nn.ModuleList(head).parameters(), lr=0.01)
        options["optimizer"] = [first, second]
        options["lr_scheduler"] = [StepLR(first, 1, 0.5), StepLR(second, 2, 0.5)]
    return make(**{**options, **changes})


KINDS = ["seeded", "unseeded", "plateau", "two optimizers"]


@pytest.mark.slow
@each_trainer
@each_store
@pytest.mark.parametrize("kind", KINDS)
def test_load_when_into_a_fresh_trainer_then_training_on_gives_the_same_bits(
    tmp_path: Path, make: Callable[..., AnyTrainer], disk: bool, kind: str
) -> None:
    seed_process(5)
    first = rich(make, kind, save_to_disk=disk, save_path=tmp_path / "first")
    do(first, "fit", 2, load_best=False, **QUIET)
    file = do(first, "save", "state", tmp_path)
    assert file == tmp_path / "state.msgpack"
    saved = trainer_state(first)
    do(first, "fit", 2, **QUIET)
    do(first, "test", **QUIET)
    expected = trainer_state(first)

    seed_process(99)
    second = rich(make, kind, model=cnn(seed=8), save_to_disk=disk, save_path=tmp_path / "second")
    if kind in ("seeded", "plateau"):  # not only fresh ones
        do(second, "fit", 1, **QUIET)
    held = [*second.model.parameters()], second.optimizers
    do(second, "load", "state", tmp_path)
    loaded = trainer_state(second)
    loaded.pop("process" if kind != "unseeded" else "streams")
    assert_same_state(loaded, {name: saved[name] for name in loaded})
    assert second.optimizers == held[1]
    for own, before in zip(second.model.parameters(), held[0], strict=True):
        assert own is before
    do(second, "fit", 2, **QUIET)
    do(second, "test", **QUIET)
    actual = trainer_state(second)
    if kind != "unseeded":
        actual.pop("process")
    assert_same_state(actual, {name: expected[name] for name in actual})


def test_load_when_a_loader_has_a_generator_then_training_on_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    first = sync_trainer(train_dl=loader(blobs(), shuffle=True, own_seed=4), save_path=tmp_path)
    first.fit(1, **QUIET)
    first.save()
    first.fit(1, **QUIET)
    second = sync_trainer(train_dl=loader(blobs(), shuffle=True, own_seed=4), save_path=tmp_path)
    second.load()
    second.fit(1, **QUIET)
    assert model_bits(second) == model_bits(first)


def test_load_when_a_scaler_is_there_then_its_scale_comes_back(tmp_path: Path) -> None:
    def scaled(scale: float) -> SyncFitLoop:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        return sync_trainer(scaler=scaler, save_path=tmp_path)

    first = scaled(64.0)
    first.fit(1, **QUIET)
    first.save()
    second = scaled(2.0)
    second.load()
    assert_same_state(trainer_state(second), trainer_state(first))
    for fitted in (first, second):
        fitted.fit(1, **QUIET)
    assert model_bits(first) == model_bits(second)


def test_load_when_weights_were_frozen_then_they_are_again(tmp_path: Path) -> None:
    first = sync_trainer(save_path=tmp_path)
    first.model[0].requires_grad_(False)  # type: ignore[index]
    first.fit(1, **QUIET)
    first.save()
    second = sync_trainer(save_path=tmp_path)
    second.load()
    second.fit(1, **QUIET)
    first.fit(1, **QUIET)
    assert_same_state(trainer_state(second), trainer_state(first))


def test_load_when_only_the_seed_differs_then_all_but_the_randomness_comes(tmp_path: Path) -> None:
    first = sync_trainer(save_path=tmp_path, seed=1)
    first.fit(1, **QUIET)
    first.save()
    for seed in (2, None):
        second = sync_trainer(save_path=tmp_path, seed=seed, model=mlp(4))
        before = trainer_state(second)
        second.load()
        actual = trainer_state(second)
        assert (actual["streams"], actual["process"]) == (before["streams"], before["process"])
        expected = trainer_state(first)
        for name in ("streams", "process"):
            del actual[name], expected[name]
        assert_same_state(actual, expected)


def test_load_when_map_location_is_given_then_the_state_comes_to_where_the_trainers_is(
    tmp_path: Path,
) -> None:
    first = sync_trainer(save_path=tmp_path)
    first.fit(1, **QUIET)
    first.save()
    second = sync_trainer(save_path=tmp_path)
    second.load(map_location="cpu")
    assert_same_state(trainer_state(second), trainer_state(first))
    before = trainer_state(second)
    for place in ("nonsense", "meta"):
        with pytest.raises(CheckpointError):
            second.load(map_location=place)
    assert_same_state(trainer_state(second), before)


def test_load_when_the_file_is_overwritten_in_place_then_nothing_of_it_is_in_use(
    tmp_path: Path,
) -> None:
    first = rich(sync_trainer, "seeded", save_path=tmp_path)
    do(first, "fit", 2, **QUIET)
    file = do(first, "save")
    second = rich(sync_trainer, "seeded", save_path=tmp_path)
    do(second, "load")
    with file.open("r+b") as open_file:  # as cp does, and other programs than this one
        open_file.write(b"\xff" * file.stat().st_size)
    assert_same_state(trainer_state(second, rng=False), trainer_state(first, rng=False))


@each_trainer
def test_save_when_the_file_exists_then_only_overwrite_replaces_it(
    tmp_path: Path, make: Callable[..., AnyTrainer]
) -> None:
    fitted = make(save_path=tmp_path)
    assert do(fitted, "save") == tmp_path / "state.msgpack"
    before = (tmp_path / "state.msgpack").read_bytes()
    change(fitted)
    with pytest.raises(CheckpointError, match="exists already; pass overwrite=True"):
        do(fitted, "save")
    assert (tmp_path / "state.msgpack").read_bytes() == before
    assert do(fitted, "save", overwrite=True) == tmp_path / "state.msgpack"
    after = model_bits(fitted)
    change(fitted)
    do(fitted, "load")
    assert model_bits(fitted) == after
    do(fitted, "save", "runs/lr=0.1", tmp_path / "new")
    assert (tmp_path / "new" / "runs" / "lr=0.1.msgpack").is_file()
    assert sorted(os.listdir(tmp_path)) == ["new", "state.msgpack"]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "../a", "", "/a", "a.pth"])
def test_save_when_the_name_cannot_be_used_then_it_is_named(tmp_path: Path, name: str) -> None:
    fitted = sync_trainer(save_path=tmp_path / "s")
    for verb in ("save", "load"):
        with pytest.raises(CheckpointError, match=r"expected the suffix|give a name within"):
            do(fitted, verb, name)
    assert os.listdir(tmp_path) == []


class Keeps:
    """Something with a state that cannot be kept."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def state_dict(self) -> dict[str, Any]:
        return {"a": [self._value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._value = state["a"][0]


@pytest.mark.parametrize(
    "value",
    [print, object(), {1, print}, {"b": {"c": iter(())}}],
    ids=["function", "object", "set", "iterator"],
)
def test_save_when_a_value_cannot_be_kept_then_its_path_is_named(
    tmp_path: Path, value: Any
) -> None:
    fitted = sync_trainer(save_path=tmp_path, stateful={"mine": Keeps(value)})
    with pytest.raises(CheckpointError, match=r"state/training/stateful/mine/a/0") as raised:
        fitted.save()
    assert "cannot be kept" in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_save_when_the_state_is_too_large_for_a_header_then_an_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitloop._storage.layout.HEADER_LIMIT", 1000)
    fitted = sync_trainer(save_path=tmp_path)
    with pytest.raises(CheckpointError, match="header takes more than 1000 bytes"):
        fitted.save()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        pytest.param("save", "a\0b", id="save nul"),
        pytest.param("load", "a\0b", id="load nul"),
        pytest.param("save", "\udcff", id="save no utf-8"),
        pytest.param("load", "\udcff", id="load no utf-8"),
    ],
)
def test_save_and_load_when_the_path_is_odd_then_it_works_or_is_refused(
    tmp_path: Path, verb: str, path: str
) -> None:
    fitted = sync_trainer(save_path=tmp_path)
    if path == "\udcff" and verb == "load":
        fitted.save("state", f"{tmp_path}/{path}")
    before = trainer_state(fitted)
    try:
        do(fitted, verb, "state", f"{tmp_path}/{path}")
    except CheckpointError:
        assert_same_state(trainer_state(fitted), before)


# -- files of other trainers -----------------------------------------------------------------------


def with_scheduler(kind: Any, **arguments: Any) -> dict[str, Any]:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": kind(optimizer, **arguments),
    }


def with_optimizer(kind: Any, **arguments: Any) -> dict[str, Any]:
    model = mlp()
    return {"model": model, "optimizer": kind(model.parameters(), **arguments)}


class Learnt(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(count))

    def forward(self, actual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(actual / self.temperature.sum(), target)


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "outputs": (
        {},
        {"model": mlp(outputs=4)},
        r"differing: '3.weight' \(model \(4, 8\), weights \(3, 8\)\), '3.bias'",
    ),
    "fewer layers": ({}, {"model": nn.Sequential(nn.Linear(6, 3))}, r"did not|does not|do not fit"),
    "more layers": ({}, {"model": mlp().append(nn.Linear(3, 3))}, r"'4\.|0\.4\."),
    "optimizer": (
        {},
        with_optimizer(AdamW),
        "the optimizers differ: saved were 'SGD', the trainer has 'AdamW'",
    ),
    "scheduler": (
        with_scheduler(StepLR, step_size=1),
        with_scheduler(OneCycleLR, max_lr=1, total_steps=99),
        "the schedulers differ: saved were 'StepLR', the trainer has 'OneCycleLR'",
    ),
    "no scheduler": (with_scheduler(StepLR, step_size=1), {}, "'StepLR', the trainer has none"),
    "a scheduler": ({}, with_scheduler(StepLR, step_size=1), "saved were none, the trainer has"),
    "stateful": (
        {"stateful": {"a": Keeps(1), "b": Keeps(2)}},
        {"stateful": {"b": Keeps(2)}},
        "saved were 'a', 'b', the trainer has 'b'; give scaler= and stateful= as before",
    ),
    "other stateful": ({"stateful": {"a": Keeps(1)}}, {"stateful": {"b": Keeps(1)}}, "'a', the"),
    "loss": ({"loss_function": Learnt()}, {"loss_function": Learnt(2)}, "temperature"),
    "loss function": (
        {"loss_function": nn.functional.cross_entropy},
        {},
        "the modules differ: saved were 1, the trainer has 2",
    ),
}


@pytest.mark.filterwarnings("ignore::fitloop.ScheduleWarning")
@pytest.mark.parametrize("name", MISFITS)
def test_load_when_the_state_does_not_fit_then_nothing_is_changed(
    tmp_path: Path, name: str
) -> None:
    saved, own, message = MISFITS[name]
    first = sync_trainer(**{**saved, "save_path": tmp_path, "seed": 1})
    first.fit(2, **QUIET)
    first.save()
    second = sync_trainer(**{**own, "save_path": tmp_path / "second", "seed": 1})
    second.fit(1, train_dl=batches(seed=5), **QUIET)
    before = trainer_state(second)
    with pytest.raises(CheckpointError, match=message):
        second.load(path=tmp_path)
    assert_same_state(trainer_state(second), before)
    second.fit(1, **QUIET)
    second.load_best()
    first.load()


def test_load_when_stateful_refuses_its_state_then_nothing_is_changed(tmp_path: Path) -> None:
    class Refuses(Keeps):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            if state["a"][0] == 7:
                raise LookupError("not seven")

    first = sync_trainer(save_path=tmp_path, stateful={"x": Keeps(7)}, seed=1)
    first.fit(1, **QUIET)
    first.save()
    second = sync_trainer(save_path=tmp_path, stateful={"x": Refuses(1)}, seed=1, model=mlp(3))
    second.fit(1, **QUIET)
    before = trainer_state(second)
    with pytest.raises(CheckpointError, match="LookupError: not seven"):
        second.load()
    assert_same_state(trainer_state(second), before)


@each_store
def test_load_when_it_fails_for_a_fresh_trainer_then_it_is_as_fresh_as_before(
    tmp_path: Path, disk: bool
) -> None:
    first = sync_trainer(save_path=tmp_path, model=mlp(outputs=4))
    first.save()
    second = sync_trainer(save_path=tmp_path / "second", save_to_disk=disk)
    with pytest.raises(CheckpointError):
        second.load(path=tmp_path)
    assert not (tmp_path / "second").exists()
    change(second)  # what reset goes back to is what the first run begins with
    begun = model_bits(second)
    second.fit(1, **QUIET)
    second.reset()
    assert model_bits(second) == begun


def test_load_when_the_snapshot_has_no_best_then_there_is_none(tmp_path: Path) -> None:
    first = sync_trainer(save_path=tmp_path)
    first.save()
    second = sync_trainer(save_path=tmp_path)
    second.fit(1, **QUIET)
    second.load()
    assert second.best_score is None
    with pytest.raises(CheckpointError):
        second.load_best()


def test_load_when_an_older_best_file_is_damaged_then_that_does_not_matter(tmp_path: Path) -> None:
    first = sync_trainer(save_path=tmp_path / "first")
    first.fit(1, **QUIET)
    file = first.save()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "best_model.msgpack").write_bytes(b"torn")
    second = sync_trainer(save_path=tmp_path / "second", save_to_disk=True)
    second.load(path=file.parent)
    second.load_best()
    first.load_best()
    assert model_bits(first) == model_bits(second)


def test_save_when_named_as_the_log_then_it_is_refused_or_not_replaced(tmp_path: Path) -> None:
    fitted = sync_trainer(save_path=tmp_path, save_to_disk=True)
    try:
        file = fitted.save("metrics")
    except CheckpointError:
        return
    fitted.fit(1, **QUIET)
    read_snapshot(file)


@each_trainer
async def test_verbs_when_the_trainer_is_busy_then_are_refused(
    tmp_path: Path, make: Callable[..., AnyTrainer]
) -> None:
    fitted = make(save_path=tmp_path)
    if isinstance(fitted, SyncFitLoop):
        for verb in ("save", "load", "save_model", "load_model", "reset", "load_best"):
            with pytest.raises(SyncInAsyncError):
                getattr(fitted, verb)()
        return
    refused: list[str] = []

    async def step(state: Any) -> dict[str, Any]:
        for verb in ("save", "load", "save_model", "load_model", "reset", "load_best"):
            try:
                await getattr(fitted, verb)()
            except BusyError:
                refused.append(verb)
        loss = state.loss_function(state.model(state.batch[0]), state.batch[1])
        loss.backward()
        return {"loss": loss}

    busy = trainer(save_path=tmp_path, model=fitted.model, train_step=step, valid_dl=None)
    await busy.fit(1, steps=1, **QUIET)
    assert len(refused) == 6


# -- weights ---------------------------------------------------------------------------------------


@each_trainer
@each_store
@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_save_model_when_loaded_again_then_the_weights_are_the_same(
    tmp_path: Path, make: Callable[..., AnyTrainer], disk: bool, suffix: str
) -> None:
    configured: list[object] = []
    first = make(save_path=tmp_path, save_to_disk=disk, model=cnn(1))
    file = do(first, "save_model", f"weights{suffix}")
    assert file == tmp_path / f"weights{suffix or '.msgpack'}"
    with pytest.raises(CheckpointError, match="exists already"):
        do(first, "save_model", f"weights{suffix}")
    change(first)
    do(first, "save_model", f"weights{suffix}", overwrite=True)
    second = make(
        save_path=tmp_path / "s",
        save_to_disk=disk,
        model=cnn(2),
        configure_optimizer=configured.append,
    )
    do(second, "load_model", f"weights{suffix}", tmp_path)
    assert model_bits(second) == model_bits(first)
    assert len(configured) == 1
    before = model_bits(second)
    with pytest.raises(CheckpointError, match="No such file"):
        do(second, "load_model", f"nothing{suffix}")
    assert model_bits(second) == before
    assert len(configured) == 1
    do(second, "delete", f"weights{suffix}", tmp_path)
    assert not file.exists()
    with pytest.raises(CheckpointError, match="cannot be deleted: No such file"):
        do(second, "delete", f"weights{suffix}", tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_model_when_weights_do_not_fit_then_they_are_listed_and_strict_off_takes_the_rest(
    tmp_path: Path, suffix: str
) -> None:
    first = sync_trainer(save_path=tmp_path)
    first.save_model(f"w{suffix}")
    more = mlp(5).append(nn.Linear(3, 3))
    second = sync_trainer(save_path=tmp_path, model=more)
    before = model_bits(second)
    with pytest.raises(CheckpointError, match=r"missing: '4\.weight', '4\.bias'$"):
        second.load_model(f"w{suffix}")
    assert model_bits(second) == before
    second.load_model(f"w{suffix}", strict=False)
    expected = {**before, **model_bits(first)}
    assert model_bits(second) == expected
    fewer = sync_trainer(save_path=tmp_path, model=mlp(6)[:3])
    with pytest.raises(
        CheckpointError, match=r"unexpected: '3\.(weight', '3\.bias|bias', '3\.weight)'$"
    ):
        fewer.load_model(f"w{suffix}")
    fewer.load_model(f"w{suffix}", strict=False)
    other = sync_trainer(save_path=tmp_path, model=mlp(7, outputs=2))
    before = model_bits(other)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"differing: .*'3\.weight'"):
            other.load_model(f"w{suffix}", strict=strict)
    assert model_bits(other) == before


def test_load_when_the_file_has_weights_only_then_it_is_named(tmp_path: Path) -> None:
    fitted = sync_trainer(save_path=tmp_path)
    fitted.save_model()
    with pytest.raises(CheckpointError, match="it holds 'weights'; expected 'snapshot'"):
        fitted.load("model")


# -- best, pretrained, reset -----------------------------------------------------------------------


@each_trainer
@pytest.mark.parametrize("name", ["best_model", "./BEST_model.msgpack", "pretrained_model"])
def test_save_when_the_name_is_of_weights_that_the_trainer_keeps_then_is_refused(
    tmp_path: Path, make: Callable[..., AnyTrainer], name: str
) -> None:
    fitted = make(save_path=tmp_path, save_to_disk=True)
    do(fitted, "fit", 2, **QUIET)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for verb in ("save", "save_model"):
        with pytest.raises(CheckpointError, match="weights that the trainer itself keeps"):
            do(fitted, verb, name, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    do(fitted, "load_model", "best_model")
    do(fitted, "save_model", "best_model", tmp_path / "elsewhere")
    in_memory = make(save_path=tmp_path / "memory")
    do(in_memory, "save_model", "best_model")


@each_trainer
@each_store
def test_del_best_model_when_there_is_one_then_it_is_gone_and_forgotten(
    tmp_path: Path, make: Callable[..., AnyTrainer], disk: bool
) -> None:
    fitted = make(save_path=tmp_path, save_to_disk=disk, best_model_name="champion")
    with pytest.raises(CheckpointError):
        do(fitted, "del_best_model")
    with pytest.raises(CheckpointError):
        do(fitted, "load_best")
    do(fitted, "fit", 2, **QUIET)
    assert (tmp_path / "champion.msgpack").exists() == disk
    do(fitted, "load_best")
    do(fitted, "del_best_model")
    assert (fitted.best_score, fitted.best_epoch) == (None, None)
    assert not (tmp_path / "champion.msgpack").exists()
    with pytest.raises(CheckpointError):
        do(fitted, "load_best")
    do(fitted, "save")
    do(fitted, "load")
    do(fitted, "fit", 1, **QUIET)
    assert fitted.best_epoch == 3


@each_trainer
@each_store
def test_reset_when_it_was_trained_then_it_trains_again_to_the_same_bits(
    tmp_path: Path, make: Callable[..., AnyTrainer], disk: bool
) -> None:
    fitted = make(
        save_path=tmp_path, save_to_disk=disk, seed=4, train_dl=loader(blobs(), shuffle=True)
    )
    begun = model_bits(fitted)
    do(fitted, "reset")
    do(fitted, "fit", 2, **QUIET)
    trained = trainer_state(fitted, rng=False)
    do(fitted, "save")
    do(fitted, "reset")
    assert model_bits(fitted) == begun
    assert (fitted.best_score, fitted.M.train_runs, fitted.epoch_num) == (None, 0, 0)
    assert (tmp_path / "state.msgpack").exists()
    do(fitted, "fit", 2, **QUIET)
    again = trainer_state(fitted, rng=False)
    again.pop("numbers")
    assert_same_state(again, {name: trained[name] for name in again})
    do(fitted, "load")
    do(fitted, "reset")
    assert model_bits(fitted) == begun


@each_trainer
@each_store
def test_del_pretrained_model_when_there_is_one_then_reset_is_refused(
    tmp_path: Path, make: Callable[..., AnyTrainer], disk: bool
) -> None:
    fitted = make(save_path=tmp_path, save_to_disk=disk)
    with pytest.raises(CheckpointError):
        do(fitted, "del_pretrained_model")
    do(fitted, "fit", 1, **QUIET)
    do(fitted, "del_pretrained_model")
    before = trainer_state(fitted)
    with pytest.raises(CheckpointError):
        do(fitted, "reset")
    assert_same_state(trainer_state(fitted), before)
    with pytest.raises(CheckpointError):
        do(fitted, "del_pretrained_model")
    do(fitted, "fit", 1, **QUIET)
    do(fitted, "save")
    do(fitted, "load")


@each_trainer
def test_relative_save_path_when_the_working_directory_changes_in_a_run_then_files_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., AnyTrainer]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.chdir(first)

    def change(state: Any) -> None:
        os.chdir(second)

    fitted = make(save_path="run", save_to_disk=True, train_epoch_start=change)
    do(fitted, "fit", 2, checkpoint=Checkpoint(), **QUIET)
    do(fitted, "save")
    assert fitted.save_path == first / "run"
    assert list((first / "run" / "snapshots").iterdir())
    assert (first / "run" / "state.msgpack").exists()
    assert not list(second.iterdir())
