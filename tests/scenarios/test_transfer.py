"""Weights of another model, or of a snapshot, as the beginning of a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CLASSES, FEATURES, batches, bits, mlp, scores, sync_trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam

from fitloop import (
    Checkpoint,
    CheckpointError,
    ConfigurationError,
    LoadedWeights,
    SyncFitLoop,
    WeightsWarning,
)

QUIET: dict[str, Any] = {"verbose": False}


class Tower(nn.Module):
    """A body and a head, whose names and number of classes can be chosen."""

    def __init__(self, seed: int, body: str = "backbone", classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU())
            self.add_module(body, layers)
            self.head = nn.Linear(8, classes)
        self.body = [layers]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body[0](inputs))
        return outputs


BODY = [
    *("backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias"),
    *("backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"),
]
HEAD = ["head.weight", "head.bias"]


def source(path: Path, body: str = "backbone", suffix: str = ".msgpack") -> Tower:
    """Write ``model`` with the weights of a trained tower, and return that."""
    model = Tower(1, body)
    fitted = sync_trainer(model=model, save_path=path)
    fitted.fit(1, **QUIET)
    fitted.save_model(f"model{suffix}")
    return model


def target(path: Path, **changes: Any) -> SyncFitLoop:
    return sync_trainer(model=Tower(2, **changes), save_path=path)


@pytest.mark.parametrize("suffix", [".msgpack", ".pt", ".safetensors"])
def test_shapes_when_the_head_differs_then_the_rest_is_loaded_and_told(
    tmp_path: Path, suffix: str
) -> None:
    model = source(tmp_path, suffix=suffix)
    tuned = target(tmp_path, classes=5)
    before = bits(tuned.model)
    with pytest.raises(CheckpointError, match=r"differing: .*'head\.weight'"):
        tuned.load_model(f"model{suffix}", strict=False)
    assert bits(tuned.model) == before
    with pytest.warns(
        WeightsWarning, match=r"7 weights were loaded.*model \(5, 8\), file \(3, 8\)"
    ):
        report = tuned.load_model(f"model{suffix}", strict="shapes")
    assert (set(report.loaded), set(report.kept)) == (set(BODY), set(HEAD))
    assert report.unused["head.bias"] == "model (5,), file (3,)"
    now, trained = bits(tuned.model), bits(model)
    assert all(now[name] == trained[name] for name in BODY)
    assert all(now[name] == before[name] for name in HEAD)
    data = [(inputs, targets % 5) for inputs, targets in batches()]
    tuned.fit(1, train_dl=data, valid_dl=data, **QUIET)


def test_only_when_it_selects_the_body_then_the_head_stays(tmp_path: Path) -> None:
    model = source(tmp_path)
    for strict in (True, False, "shapes"):
        tuned = target(tmp_path)
        before = bits(tuned.model)
        report = tuned.load_model(only="backbone.*", strict=strict)
        assert bits(tuned.model) == {**bits(model), **{name: before[name] for name in HEAD}}
        assert report.unused == dict.fromkeys(HEAD, "not selected by only=")
        assert str(report).startswith("7 weights were loaded; of the model kept: 'head.weight'")
    tuned = target(tmp_path)
    assert tuned.load_model(only=["head.bias", "*.1.*"]).loaded == (*BODY[2:], "head.bias")


@pytest.mark.parametrize(
    ("body", "rename"),
    [
        pytest.param("encoder", {"encoder": "backbone"}, id="beginning"),
        pytest.param("encoder", ("encoder.", "backbone."), id="pair with dots"),
        pytest.param("encoder", lambda name: name.replace("encoder", "backbone"), id="function"),
    ],
)
def test_rename_when_modules_have_other_names_then_weights_and_versions_go_along(
    tmp_path: Path, body: str, rename: Any
) -> None:
    model = source(tmp_path, body)
    tuned = target(tmp_path)
    report = tuned.load_model(rename=rename)
    assert list(bits(tuned.model).values()) == list(bits(model).values())
    assert report == LoadedWeights((*BODY, *HEAD), (), {})


def test_rename_when_a_beginning_is_added_or_removed_then_whole_models_fit_into_others(
    tmp_path: Path,
) -> None:
    inner = sync_trainer(model=mlp(3), save_path=tmp_path)
    inner.save_model("inner")
    outer = sync_trainer(model=nn.Sequential(mlp(4)), save_path=tmp_path)
    outer.load_model("inner", rename=("", "0"))
    assert list(bits(outer.model).values()) == list(bits(inner.model).values())
    outer.save_model("outer")
    other = sync_trainer(model=mlp(5), save_path=tmp_path)
    other.load_model("outer", rename={"0": ""})
    assert bits(other.model) == bits(inner.model)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        ({"only": "body.*"}, CheckpointError, r"only='body\.\*' selects none of the weights: back"),
        ({"only": 3}, ConfigurationError, r"only is 3; expected a pattern of names such as"),
        ({"only": ["head.*", "body.*"]}, CheckpointError, r"only='body\.\*' selects none"),
        ({"rename": {"body": "b"}}, CheckpointError, r"rename= has 'body', with which none"),
        ({"rename": {}}, ConfigurationError, r"rename is {}; expected beginnings of names"),
        ({"rename": "body"}, ConfigurationError, r"rename is 'body'; expected beginnings"),
        ({"rename": lambda name: None}, ConfigurationError, r"rename gave None for 'backbone\.0"),
        ({"rename": lambda name: "x"}, CheckpointError, r"rename gives 'backbone\.0\.weight', "),
        ({"rename": {"head": "neck"}}, CheckpointError, r"missing: 'head\.weight', 'head\.bias'"),
        ({"rename": {"": "x"}, "strict": False}, CheckpointError, r"none of the weights fits"),
        ({"rename": {"head": "backbone"}, "only": "head.*"}, CheckpointError, "selects none"),
        ({"only": "head.*", "rename": {"head.bias": "head.x"}}, CheckpointError, r"head\.x"),
        ({"strict": "shape"}, ConfigurationError, r"strict is 'shape'; expected True, False or"),
        ({"best": True}, CheckpointError, r"is no snapshot, and only snapshots have best weights"),
    ],
)
def test_arguments_when_they_cannot_work_then_error_and_nothing_is_changed(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], expected: str
) -> None:
    source(tmp_path)
    tuned = target(tmp_path)
    before = bits(tuned.model)
    with pytest.raises(error, match=expected):
        tuned.load_model(**arguments)
    assert bits(tuned.model) == before


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.table.weight


def test_only_when_a_selected_weight_is_tied_then_the_other_name_is_no_kept_weight(
    tmp_path: Path,
) -> None:
    first, second = Tied(1), Tied(2)
    sync_trainer(model=first, save_path=tmp_path).save_model()
    report = sync_trainer(model=second, save_path=tmp_path).load_model(only="table.*")
    assert torch.equal(second.out.weight, first.table.weight)
    assert report.kept == ("out.bias",)


def test_snapshot_when_it_is_a_warm_start_then_only_the_weights_of_the_model_are_taken(
    tmp_path: Path,
) -> None:
    first = sync_trainer(
        save_path=tmp_path,
        valid_epoch_end=scores([0.9, 0.1]),
        criteria="score",
    )
    seen: list[dict[str, bytes]] = []
    first.fit(
        2,
        load_best=False,
        checkpoint=Checkpoint(keep=None),
        callbacks=[lambda e: seen.append(bits(first.model)) if e.kind == "epoch_ended" else None],
        **QUIET,
    )
    first.save()
    model = mlp(9)
    second = sync_trainer(model=model, optimizer=Adam(model.parameters()), save_path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_model("state")
        assert bits(model) == bits(first.model) == seen[1]
        second.load_model("state", best=True)
        assert bits(model) == seen[0]
        second.load_model(sorted(tmp_path.glob("snapshots/*"))[-1].name, tmp_path / "snapshots")
    assert bits(model) == seen[1]
    assert (second.epoch_num, second.best_score) == (0, None)
    third = sync_trainer(save_path=tmp_path, optimizer=SGD((m := mlp()).parameters(), 1), model=m)
    third.save("untrained")
    with pytest.raises(CheckpointError, match="holds no best weights: none were tracked"):
        second.load_model("untrained", best=True)
