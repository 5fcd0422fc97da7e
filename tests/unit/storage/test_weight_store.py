"""Stores of weights, and weights put into a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from support.tensors import assert_same_tensors, small_state
from torch import Tensor, nn

from fitloop import CheckpointError
from fitloop._storage.weight_store import (
    DiskStore,
    MemoryStore,
    WeightsStore,
    apply_weights,
    weights_of,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WeightsStore:
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "kept")


def test_a_store_keeps_what_was_saved_last(store: WeightsStore) -> None:
    assert not store.exists("best")
    store.save("best", small_state())
    store.save("best", {"weight": torch.zeros(2, 3), "other": torch.ones(1)})
    assert store.exists("best")
    assert_same_tensors(store.load("best"), {"weight": torch.zeros(2, 3), "other": torch.ones(1)})
    store.delete("best")
    assert not store.exists("best")
    for call in (store.load, store.delete):
        with pytest.raises(CheckpointError, match="best"):
            call("best")


def test_a_store_aliases_neither_the_model_nor_what_it_gave(store: WeightsStore) -> None:
    model = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store.save("w", model.state_dict())
    loaded = store.load("w")
    with torch.no_grad():
        model.weight.zero_()
    loaded["bias"].zero_()
    assert_same_tensors(store.load("w"), before)
    again = store.load("w")
    store.save("w", model.state_dict())
    assert_same_tensors(again, before)


def test_borrowed_weights_when_others_are_saved_then_do_not_change() -> None:
    store = MemoryStore()
    store.save("w", small_state())
    borrowed = store.borrow("w")
    store.save("w", {"weight": torch.ones(2, 3), "bias": torch.ones(3)})
    assert_same_tensors(dict(borrowed), small_state())


def test_memory_of_tied_weights_is_not_shared_once_they_are_not_tied() -> None:
    store, shared = MemoryStore(), torch.ones(3)
    store.save("w", {"a": shared, "b": shared})
    assert store._weights["w"]["a"] is store._weights["w"]["b"]
    untied = {"a": torch.zeros(3), "b": torch.full((3,), 2.0)}
    store.save("w", untied)
    assert_same_tensors(store.load("w"), untied)


def test_memory_keeps_copies_of_what_is_no_tensor_and_of_versions() -> None:
    extra = {"scale": [1]}
    state: OrderedDict[str, Any] = OrderedDict(_extra_state=extra)
    vars(state)["_metadata"] = {"": {"version": 1}}
    store = MemoryStore()
    store.save("w", state)
    extra["scale"].append(2)
    loaded = store.load("w")
    assert loaded["_extra_state"] == {"scale": [1]}
    assert vars(loaded)["_metadata"] == {"": {"version": 1}}


def test_a_copy_that_fails_leaves_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncopyable:
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copies")

    store = MemoryStore()
    store.save("w", small_state())
    with pytest.raises(RuntimeError, match="no copies"):
        store.save("w", {"weight": torch.zeros(2, 3), "extra": Uncopyable()})
    assert not store.exists("w")


# Into a model


def test_weights_are_applied_in_place() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    parameters = list(target.parameters())
    apply_weights(target, source.state_dict())
    assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
    assert_same_tensors(target.state_dict(), source.state_dict())
    assert parameters[0].requires_grad


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state: dict[str, Any] = {name: tensor + 1 for name, tensor in before.items()}
    del state["0.bias"]
    state["1.weight"] = torch.ones(3, 1)
    state["1.bias"] = 3
    state.update({f"x{number}": torch.ones(1) for number in range(12)})
    with pytest.raises(CheckpointError) as caught:
        apply_weights(model, state)
    message = str(caught.value)
    assert "missing: '0.bias'; unexpected: 'x0', " in message
    assert "'x9', ... and 2 more; differing: " in message
    assert "'1.weight' (model (1, 3), weights (3, 1)), '1.bias' (a int for a tensor)" in message
    assert_same_tensors(model.state_dict(), before)
    with pytest.raises(CheckpointError, match="do not fit the model: differing:"):
        apply_weights(model, state, strict=False)
    assert_same_tensors(model.state_dict(), before)


def test_not_strict_leaves_out_what_only_one_has() -> None:
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    apply_weights(model, {"weight": torch.ones(2, 2), "other": torch.ones(1)}, strict=False)
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert torch.equal(model.bias, bias)


@pytest.mark.parametrize(
    "value", [torch.ones(2, 2, device="meta"), torch.ones(2, 2, dtype=torch.complex64)]
)
def test_values_that_cannot_be_copied_do_not_fit(value: Tensor) -> None:
    with pytest.raises(CheckpointError, match="differing: 'weight'"):
        apply_weights(nn.Linear(2, 2), {"weight": value}, strict=False)


def test_a_model_whose_own_loading_fails_is_put_back() -> None:
    class Picky(nn.Linear):
        scale = 1

        def get_extra_state(self) -> int:
            return self.scale

        def set_extra_state(self, state: int) -> None:
            if state > 1:
                raise ValueError("too large a scale")
            self.scale = state

    model = Picky(2, 2)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "_extra_state": 5}
    with pytest.raises(CheckpointError, match=r"did not take the weights:(.|\n)*too large"):
        apply_weights(model, state)
    assert_same_tensors(dict(model.named_parameters()), before)
    assert model.scale == 1


def test_weights_when_a_target_is_expanded_then_nothing_is_changed() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(1).expand(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {**{name: tensor + 1 for name, tensor in before.items()}, "mask": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"'mask' .*cannot be written to: it is expanded"):
        apply_weights(model, state)
    assert_same_tensors(model.state_dict(), before)
    apply_weights(model, {**state, "mask": torch.ones(5)})
    assert_same_tensors(dict(model.named_parameters()), {n: state[n] for n in ("weight", "bias")})


def nested(*, compiled: bool = False) -> nn.Sequential:
    inner: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    if compiled:
        inner = torch.compile(inner)
    return nn.Sequential(inner, nn.Linear(2, 1))


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "plain": nested,
    "compiled": lambda: cast(nn.Module, torch.compile(nested())),
    "compiled part": lambda: nested(compiled=True),
    "parallel": lambda: nn.DataParallel(nested()),
    "compiled, parallel": lambda: cast(nn.Module, torch.compile(nn.DataParallel(nested()))),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch.compile
@pytest.mark.parametrize("source", WRAPPERS)
@pytest.mark.parametrize("target", WRAPPERS)
def test_weights_of_wrapped_models_have_plain_names(source: str, target: str) -> None:
    one, other = WRAPPERS[source](), WRAPPERS[target]()
    weights = weights_of(one)
    assert list(weights) == list(nested().state_dict())
    assert vars(weights)["_metadata"].keys() == vars(nested().state_dict())["_metadata"].keys()
    for state in (weights, one.state_dict()):  # the other library may have written the prefixes
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        apply_weights(other, state)
        assert_same_tensors(dict(weights_of(other)), dict(weights))
