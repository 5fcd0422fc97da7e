"""State that users' objects carry: resumed, saved and loaded, and not touched by dry runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import BATCH_SIZE, FEATURES, mlp, sync_trainer
from support.resumed_trainings import (
    QUIET,
    TrainingSetup,
    check_resumed_training,
    trainer_values,
    write_snapshots_at_once,
)
from support.stateful_loaders import Counting, Noisy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Sampler, default_collate

from fitloop import Checkpoint, LoopState, ResumeWarning, default_batch_step
from fitloop._training import object_state


@pytest.fixture(autouse=True)
def _snapshots_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshots_at_once(monkeypatch)


class Shuffled(Sampler[int]):
    """A sampler with a generator of numpy's."""

    def __init__(self, count: int) -> None:
        self._rng = np.random.default_rng(5)
        self._count = count

    def __iter__(self) -> Iterator[int]:
        return iter(self._rng.permutation(self._count).tolist())

    def __len__(self) -> int:
        return self._count


class Wrapper:
    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def collate_with_noise() -> Callable[[Any], Any]:
    rng = np.random.default_rng(3)

    def collate(samples: Any) -> Any:
        inputs, targets = default_collate(samples)
        return inputs + torch.from_numpy(rng.normal(size=inputs.shape)).float(), targets

    return collate


def shuffled(data: Any = None, **options: Any) -> DataLoader[Any]:
    own = torch.Generator().manual_seed(2)
    return DataLoader(data or Noisy("numpy"), BATCH_SIZE, shuffle=True, generator=own, **options)


LOADERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "torch": (lambda: shuffled(Noisy("torch")), False),
    "python": (lambda: shuffled(Noisy("python")), False),
    "numpy": (shuffled, False),
    "RandomState": (lambda: shuffled(Noisy("RandomState")), False),
    "state_dict": (lambda: shuffled(Counting()), False),
    "collate_fn": (lambda: shuffled(collate_fn=collate_with_noise()), False),
    "sampler": (lambda: DataLoader(Noisy("numpy"), BATCH_SIZE, sampler=Shuffled(26)), True),
    "wrapper": (lambda: Wrapper(shuffled()), True),
    "function": (lambda: returning(shuffled()), True),
}
"""a loader, and whether its batches are read again"""


def returning(loader: Any) -> Callable[[], Any]:
    return lambda: loader


class Net(nn.Module):
    """A model whose output depends on a number, a list, a tensor and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(dropout=0.2)
        self.calls = 0
        self.recent: list[float] = []
        self.average = torch.zeros(FEATURES)
        self.rng = np.random.default_rng(4)
        self.layers[1].register_forward_hook(self._count)

    def _count(self, *_arguments: Any) -> None:
        self.calls += 1
        self.recent = [*self.recent[-2:], float(self.calls)]

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.average = self.average.lerp(inputs.detach().mean(0), 0.1)
        noise = 0.1 * float(self.rng.normal()) + 0.01 * self.calls + 0.001 * sum(self.recent)
        outputs: Tensor = self.layers(inputs - self.average) * (1 + noise)
        return outputs


class Lookahead(SGD):
    """An optimizer that keeps more than torch's ``state_dict`` has."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = 0
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.calls += 1
        if self.calls % 2 == 0:
            for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)
        return result


class ScheduleFree(Optimizer):
    """Trains at an interpolation of two sequences of weights; in eval mode it shows the average."""

    def __init__(self, parameters: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "steps": 0, "train_mode": False})

    def _interpolate(self, weight: float, *, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not training:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.data.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = training

    def train(self) -> None:
        self._interpolate(1 - self.defaults["beta"], training=True)

    def eval(self) -> None:
        self._interpolate(1 - 1 / self.defaults["beta"], training=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            assert group["train_mode"]
            group["steps"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.detach().clone())
                share, beta = 1 / group["steps"], group["beta"]
                parameter.lerp_(z, share)
                parameter.add_(parameter.grad, alpha=group["lr"] * (beta * (1 - share) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])


def drawing_step() -> Callable[[LoopState], dict[str, Any]]:
    rng = np.random.default_rng(6)
    calls = itertools.count()

    def step(state: LoopState) -> dict[str, Any]:
        next(calls)
        inputs, targets = state.batch
        loss = state.loss_function(state.model(inputs * (1 + 0.1 * rng.normal())), targets)
        loss.backward()
        state.optimizer.step()
        return {"loss": loss.detach()}

    return step


def mean_loss(state: LoopState) -> dict[str, float]:
    losses: Any = state["loss"]
    return {"loss": float(losses.mean())}


def lookahead() -> dict[str, Any]:
    model = mlp()
    return {"model": model, "optimizer": Lookahead(model.parameters(), lr=0.1)}


def schedule_free() -> dict[str, Any]:
    model = mlp(dropout=0.2)
    return {"model": model, "optimizer": ScheduleFree(model.parameters(), lr=0.1)}


def spectral() -> nn.Module:
    """Return a model with an attribute that is computed from a parameter, and is its memory."""
    model = mlp(dropout=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        nn.utils.spectral_norm(model[0])
    return model


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "model": lambda: {"model": Net()},
    "spectral_norm": lambda: {"model": spectral()},
    "optimizer": lookahead,
    "schedule-free optimizer": schedule_free,
    "train_step": lambda: {"train_step": drawing_step(), "train_epoch_end": mean_loss},
}


def carrying(name: str, **options: Any) -> TrainingSetup:
    """Return a training in which something carries a state."""
    if name in PARTS:
        return TrainingSetup(trainer={"seed": 3, **PARTS[name](), **options})
    loader = LOADERS[name][0]
    return TrainingSetup(
        trainer={
            "model": mlp(dropout=0.3),
            "train_dl": loader(),
            "valid_dl": loader(),
            "seed": 3,
            **options,
        }
    )


EVERYTHING = [*LOADERS, *PARTS]


@pytest.mark.parametrize("name", EVERYTHING)
def test_resume_when_an_object_carries_a_state_then_equals_one_run(
    name: str, tmp_path: Path
) -> None:
    replays = name in LOADERS and LOADERS[name][1]
    check_resumed_training(lambda: carrying(name), tmp_path, replays=replays)


def test_resume_when_batches_are_read_ahead_then_reads_again_and_equals_one_run(
    tmp_path: Path,
) -> None:
    def make() -> TrainingSetup:
        return carrying("numpy", prefetch=2)

    check_resumed_training(make, tmp_path, stops=(3,), replays=True)


@pytest.mark.parametrize("name", EVERYTHING)
def test_load_when_an_object_carries_a_state_then_goes_on_as_one_run(
    name: str, tmp_path: Path
) -> None:
    whole, saved, loaded = (sync_trainer(**carrying(name).trainer) for _ in range(3))
    whole.fit(1, **QUIET)
    whole.fit(1, **QUIET)
    saved.fit(1, **QUIET)
    saved.save("state", tmp_path)
    loaded.load("state", tmp_path)
    loaded.fit(1, **QUIET)
    assert trainer_values(loaded) == trainer_values(whole)


@pytest.mark.parametrize("name", EVERYTHING)
def test_fit_when_after_a_dry_run_then_an_object_carries_what_it_did(name: str) -> None:
    plain, checked = (sync_trainer(**carrying(name).trainer) for _ in range(2))
    for trainer in (plain, checked):
        trainer.fit(1, **QUIET)
        if trainer is checked:
            trainer.run_sanity_check()
            trainer.run_profiler(steps=2, verbose=False)
        trainer.fit(1, **QUIET)
    assert trainer_values(checked) == trainer_values(plain)


def test_load_when_the_snapshot_is_of_the_beginning_then_attributes_go_back(
    tmp_path: Path,
) -> None:
    trainer = sync_trainer(**carrying("model").trainer)
    model: Any = trainer.model
    trainer.save("begin", tmp_path)
    trainer.fit(1, **QUIET)
    assert model.calls > 0
    trainer.load("begin", tmp_path)
    assert (model.calls, model.recent) == (0, [])


def test_load_when_an_object_of_an_installed_package_changed_then_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection or a logger keeps numbers that are of this process only."""
    monkeypatch.setattr(object_state, "_is_installed", lambda module: module == __name__)
    saved, loaded = (sync_trainer(**carrying("model").trainer) for _ in range(2))
    connections = []
    for trainer in (saved, loaded):
        connections.append(Connection())
        trainer.model.connection = connections[-1]  # type: ignore[assignment]
    saved.save("begin", tmp_path)
    connections[0].handle = 5
    saved.save("state", tmp_path)
    loaded.load("state", tmp_path)
    assert connections[1].handle == 0


class Connection:
    handle = 0


class Average:
    """A mean of the weights that can save itself."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


class Teaching:
    """A train_step with a teacher, an average, a recorder and objects that it was not given."""

    def __init__(self, model: nn.Module, kept: nn.Module) -> None:
        self.teacher, self.average, self.kept = mlp(), Average(model), kept
        self.same, self.frozen = nn.Sequential(model), mlp()  # nothing of these is lost
        self.calls = 0
        self.event: Any = None
        self.seen: list[Any] = []
        self.losses: list[float] = []

    def __call__(self, state: LoopState) -> dict[str, Any]:
        self.calls += 1
        self.event, self.seen = threading.Event(), [*self.seen, state]
        values = default_batch_step(state)
        with torch.no_grad():
            for module in (self.teacher, self.kept):
                for own, trained in zip(module.parameters(), state.model.parameters(), strict=True):
                    own.lerp_(trained, 0.1)
            for mean, trained in zip(self.average.weights, state.model.parameters(), strict=True):
                mean.lerp_(trained, 0.1)
        self.losses += [0.5] * 400
        return values


def test_resume_when_a_step_holds_what_no_snapshot_has_then_names_that_alone(
    tmp_path: Path,
) -> None:
    steps = []
    for epochs in (1, 2):
        model, kept = mlp(), mlp()
        step = Teaching(model, kept)
        fitted = sync_trainer(
            model=model, train_step=step, stateful={"kept": kept}, save_path=tmp_path, seed=1
        )
        steps.append(step)
        if epochs == 1:
            fitted.fit(1, resume=True, checkpoint=Checkpoint(), **QUIET)
    lost = ("train_step.losses", "train_step.teacher", "train_step.average")
    with pytest.warns(ResumeWarning, match=f"{', '.join(lost)} had changed and could not be kept"):
        fitted.fit(2, resume=True, **QUIET)
    assert steps[1].calls == 2 * steps[0].calls
