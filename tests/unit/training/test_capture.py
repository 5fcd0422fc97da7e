"""`Capture`: copies of values that are restored in place, and references to all other objects."""

from __future__ import annotations

import random
import threading
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR, StepLR

from fitloop import RestoreError, RestoreWarning
from fitloop._training.capture import Capture, copy_values


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        warnings.filterwarnings("ignore", "The PyTorch API of nested", UserWarning)
        yield


def holder(**attributes: Any) -> Any:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def sparse() -> Tensor:
    return torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse()


def unequal_rows() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def same(left: Tensor, right: Tensor) -> bool:
    if left.is_nested:
        return all(torch.equal(a, b) for a, b in zip(left.unbind(), right.unbind(), strict=True))
    return torch.equal(left.to_dense(), right.to_dense())


TENSORS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.arange(3.0),
    "empty": lambda: torch.empty(0),
    "number": lambda: torch.tensor(5),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "expanded": lambda: torch.ones(1, 2).expand(4, 2),
    "window": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "bool": lambda: torch.tensor([True, False]),
    "sparse": sparse,
    "nested": unequal_rows,
}
CHANGES: dict[str, Callable[[Any, str], object]] = {
    "in place": lambda owner, name: _of(owner, name).zero_(),
    "data replaced": lambda owner, name: setattr(
        _of(owner, name), "data", torch.zeros_like(_of(owner, name))
    ),
    "replaced": lambda owner, name: setattr(owner, name, torch.zeros(7)),
    "removed": delattr,
}


def _of(owner: Any, name: str) -> Tensor:
    tensor: Tensor = getattr(owner, name)
    storage = tensor.is_nested or tensor.is_sparse or tensor.numel() == 0
    overlaps = not storage and tensor.untyped_storage().nbytes() < tensor.nbytes
    return tensor[:1] if overlaps else tensor


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, change)
        for kind in TENSORS
        for change in CHANGES
        # Their first row, which is changed, is no tensor of the module.
        if change != "data replaced" or kind not in ("expanded", "window")
    ],
)
@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_restore_when_a_tensor_changed_then_it_is_the_same_object_as_before(
    kind: str, change: str, place: str
) -> None:
    tensor = TENSORS[kind]()
    module: Any = nn.Module()
    if place == "buffer":
        module.register_buffer("value", tensor)
    else:
        module.value = tensor
    before = tensor.clone()
    capture = Capture({"model": module})
    for _again in range(2):
        CHANGES[change](module, "value")
        capture.restore()
        assert module.value is tensor
        assert same(tensor, before)


def test_restore_when_a_buffer_was_resized_then_shape_and_memory_are_back() -> None:
    module = holder(grown=nn.Buffer(torch.empty(0)), shrunk=nn.Buffer(torch.arange(4.0)))
    grown, shrunk = module.grown, module.shrunk
    capture = Capture({"model": module})
    grown.resize_(3).fill_(1)
    shrunk.untyped_storage().resize_(0)
    capture.restore()
    assert module.grown is grown
    assert grown.shape == (0,)
    assert shrunk.tolist() == [0, 1, 2, 3]


def test_restore_when_dtype_changed_then_it_is_as_before() -> None:
    module = nn.Linear(2, 2)
    weight, before = module.weight, module.weight.detach().clone()
    capture = Capture({"model": module})
    module.to(torch.float64)
    module.weight.data.zero_()
    capture.restore()
    assert module.weight is weight
    assert torch.equal(weight, before)
    assert weight.dtype == torch.float32


def test_restore_when_tensors_share_memory_then_they_still_do() -> None:
    flat = torch.arange(6.0)
    module = holder(head=flat[:2], tail=flat[2:], tied=nn.Parameter(flat))
    capture = Capture({"model": module})
    flat.zero_()
    capture.restore()
    flat[0] = 9
    assert module.head.tolist() == [9, 1]
    assert module.tail.tolist() == [2, 3, 4, 5]
    assert module.tied.tolist() == [9, 1, 2, 3, 4, 5]


def test_restore_when_a_tensor_is_of_inference_mode_then_it_is_restored() -> None:
    module = holder(value=inference_tensor())
    capture = Capture({"model": module})
    with torch.inference_mode():
        module.value.zero_()
    capture.restore()
    assert module.value.tolist() == [1, 1, 1]


def test_restore_when_a_tensor_has_a_graph_then_the_graph_can_be_used() -> None:
    weight = torch.ones(2, requires_grad=True)
    module = holder(hidden=(weight * 2).exp())
    Capture({"model": module}).restore()
    module.hidden.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("gradient", [None, torch.ones(2, 2), torch.eye(2).to_sparse()], ids=str)
def test_restore_when_gradient_and_flag_changed_then_they_are_as_before(
    gradient: Tensor | None,
) -> None:
    parameter = nn.Parameter(torch.ones(2, 2), requires_grad=gradient is not None)
    parameter.grad = gradient
    before = None if gradient is None else gradient.to_dense().clone()
    capture = Capture({"model": holder(weight=parameter)})
    if gradient is not None:
        gradient.zero_()
    parameter.grad = torch.zeros(2, 2)
    parameter.requires_grad_(gradient is None)
    capture.restore()
    assert parameter.grad is gradient
    assert parameter.requires_grad == (gradient is not None)
    assert before is None or torch.equal(gradient.to_dense(), before)


def test_restore_when_plain_attributes_changed_then_values_and_containers_are_as_before() -> None:
    shared = [1, 2]
    attributes = {
        "number": 1,
        "text": "a",
        "list": shared,
        "alias": shared,
        "set": {1},
        "dict": {"a": torch.ones(1)},
        "deque": deque([1], maxlen=2),
        "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, a=[1]),
        "tuple": ([1], 2),
        "array": np.arange(3),
        "nan": float("nan"),
    }
    module = holder(**attributes)
    capture = Capture({"model": module})
    module.number, module.text, module.new = 5, "b", 6
    shared.append(3)
    module.set.add(2)
    module.dict["a"].zero_()
    module.dict["b"] = 1
    module.deque.extend([2, 3])
    module.ordered.move_to_end("a")
    module.default["a"].append(2)
    module.tuple[0].append(2)
    module.array[:] = 7
    capture.restore()
    assert (module.number, module.text, hasattr(module, "new")) == (1, "a", False)
    assert module.list is module.alias is shared
    assert (shared, module.set, module.dict) == ([1, 2], {1}, {"a": torch.ones(1)})
    assert (list(module.deque), list(module.ordered)) == ([1], ["a", "b"])
    assert (module.default, module.tuple, module.array.tolist()) == (
        {"a": [1]},
        ([1], 2),
        [0, 1, 2],
    )


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(2, generator=g).tolist()),
        (lambda: random.Random(1), lambda g: g.random()),
        (lambda: np.random.default_rng(1), lambda g: g.random()),
        (lambda: np.random.RandomState(1), lambda g: g.randn()),
    ],
    ids=["torch", "python", "numpy", "old numpy"],
)
def test_restore_when_a_generator_of_the_model_drew_then_it_draws_the_same_again(
    make: Callable[[], Any], draw: Callable[[Any], object]
) -> None:
    module = holder(generator=make())
    capture = Capture({"model": module})
    first = draw(module.generator)
    capture.restore()
    assert draw(module.generator) == first


# -- schedulers and optimizers ---------------------------------------------------------------------


class Warmup:
    """A scheduler of no library that refers to the param groups."""

    def __init__(self, optimizer: Any) -> None:
        self.groups = optimizer.param_groups
        self.done = 0

    def step(self) -> None:
        self.done += 1
        self.groups[0]["lr"] = 0.1 / (1 + self.done)


class Slotted:
    __slots__ = ("done", "optimizer")

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.done = optimizer, 0

    def step(self) -> None:
        self.done += 1
        self.optimizer.param_groups[0]["lr"] *= 0.5


class OfModel(LRScheduler):
    """A scheduler of torch's class that refers to the model and to a lock."""

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.model, self.lock = model, threading.Lock()
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [base / (1 + self.last_epoch) for base in self.base_lrs]


class Rate:
    """The rate of a LambdaLR, with a state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1 / self.calls


SCHEDULERS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "duck": lambda optimizer, _model: Warmup(optimizer),
    "slots": lambda optimizer, _model: Slotted(optimizer),
    "with a model": OfModel,
    "lambda": lambda optimizer, _model: LambdaLR(optimizer, Rate()),
    "sequence": lambda optimizer, _model: SequentialLR(
        optimizer, [StepLR(optimizer, 1), LambdaLR(optimizer, Rate())], [1]
    ),
}


def references(item: Any) -> list[int]:
    names = ("optimizer", "groups", "model", "lock", "_schedulers", "lr_lambdas")
    return [id(getattr(item, name)) for name in names if hasattr(item, name)]


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, set, deque])
def test_restore_when_an_empty_container_was_filled_then_is_the_same_and_empty(kind: Any) -> None:
    container = kind()
    module = holder(own=container, inside={"deep": [container]})
    capture = Capture({"model": module})
    module.register_forward_hook(lambda *_: None)
    for _repeated in range(2):
        container.update({1: 2}) if hasattr(container, "update") else container.append(1)
        assert container
        capture.restore()
        assert module.own is module.inside["deep"][0] is container
        assert not container
        assert not module._forward_hooks


@pytest.mark.parametrize("name", SCHEDULERS)
def test_restore_when_a_scheduler_stepped_then_its_rates_are_those_without(name: str) -> None:
    def rates(check: bool) -> list[float]:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[name](optimizer, model)
        if check:
            before = references(scheduler)
            capture = Capture({"model": model, "optimizer": optimizer, "lr_scheduler": scheduler})
            for _step in range(3):
                optimizer.step()
                scheduler.step()
            capture.restore()
            assert references(scheduler) == before
            assert capture.problems == []
        seen = []
        for _step in range(4):
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    assert rates(check=True) == rates(check=False)


class Lookahead:
    """An optimizer that wraps another, with slow weights; it is of no class of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.counter = optimizer, 0
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        self.counter += 1
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(parameter.detach(), 0.5)
            parameter.data.copy_(slow)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.optimizer.state_dict(), "slow": self.slow, "count": self.counter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["fast"])
        self.slow, self.counter = state["slow"], state["count"]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: Lookahead(Adam(parameters)),
        lambda parameters: LBFGS(parameters, lr=0.1),
        lambda parameters: Adam(parameters, amsgrad=True),
    ],
    ids=["Lookahead", "LBFGS", "Adam"],
)
def test_restore_when_an_optimizer_stepped_then_it_steps_as_without(make: Any) -> None:
    def trained(check: bool) -> list[float]:
        model = holder(weight=nn.Parameter(torch.arange(3.0)))
        optimizer = make([model.weight])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model.weight - 5).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        closure()
        if check:
            capture = Capture({"model": model, "optimizer": optimizer})
            for _step in range(3):
                optimizer.step(closure)
            capture.restore()
        for _step in range(3):
            optimizer.step(closure)
        values: list[float] = model.weight.tolist()
        return values

    assert trained(check=True) == trained(check=False)


def test_restore_when_state_is_in_an_object_below_then_state_dict_is_used() -> None:
    class Inner:
        def __init__(self) -> None:
            self.count = 0

    class Outer:
        def __init__(self) -> None:
            self.inner = Inner()

        def state_dict(self) -> dict[str, int]:
            return {"count": self.inner.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.inner.count = state["count"]

    outer = Outer()
    capture = Capture({"stateful.outer": outer})
    outer.inner.count = 3
    capture.restore()
    assert outer.inner.count == 0


# -- modules of TorchScript ------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(2))
        self.hidden = torch.zeros(2)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.mean = self.mean + 1
        self.hidden += 1
        outputs: Tensor = self.layer(inputs)
        return outputs


@pytest.mark.parametrize("place", ["model", "layer"])
def test_restore_when_a_module_is_scripted_then_everything_is_as_before(place: str) -> None:
    scripted = torch.jit.script(Counting())
    before = scripted.layer.weight.detach().clone()
    model = scripted if place == "model" else nn.Sequential(scripted)
    capture = Capture({"model": model})
    model(torch.zeros(1, 2))
    with torch.no_grad():
        scripted.layer.weight.zero_()
    model.eval()
    capture.restore()
    assert (scripted.calls, scripted.hidden.tolist(), scripted.mean.tolist()) == (
        *(0, [0, 0], [0, 0]),
    )
    assert torch.equal(scripted.layer.weight, before)
    assert (model.training, scripted.layer.training) == (True, True)


# -- what cannot be copied -------------------------------------------------------------------------


def test_check_when_an_attribute_is_a_generator_function_then_error_names_it() -> None:
    scheduler = SimpleNamespace(rates=(0.1 / n for n in range(1, 9)))
    capture = Capture({"lr_scheduler": scheduler})
    with pytest.raises(RestoreError, match=r"lr_scheduler\.rates, a generator"):
        capture.check("run_sanity_check()")


def test_check_when_a_state_dict_fails_then_error_names_its_owner() -> None:
    class Broken:
        def state_dict(self) -> object:
            raise KeyError("no shards")

        def load_state_dict(self, state: object) -> None:
            pass

    capture = Capture({"optimizer[1]": Broken()})
    with pytest.raises(RestoreError, match=r"optimizer\[1\], a .*Broken .*no shards"):
        capture.check("reset()")


def test_restore_when_an_object_that_was_not_copied_changed_then_warning_names_it() -> None:
    class Bank:
        def __init__(self) -> None:
            self.items = [torch.zeros(2)]

    module = holder(lock=threading.Lock(), log=print, bank=Bank(), other=Bank())
    capture = Capture({"model": module})
    capture.restore()
    module.bank.items[0].add_(1)
    with pytest.warns(RestoreWarning, match=r"^model\.bank changed"):
        capture.restore()


def test_restore_when_a_part_fails_then_the_others_are_restored_and_the_error_names_it() -> None:
    class Fussy:
        count = 0

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: object) -> None:
            raise ValueError("not now")

    first, last = holder(n=1), holder(n=1)
    capture = Capture({"a": first, "stateful.fussy": Fussy(), "z": last})
    first.n = last.n = 2
    with pytest.raises(RestoreError, match=r"stateful\.fussy\.load_state_dict\(\).*not now"):
        capture.restore()
    assert (first.n, last.n) == (1, 1)


def test_copy_values_when_objects_are_not_values_then_they_are_the_same_ones() -> None:
    lock, model, tensor = threading.Lock(), nn.Linear(1, 1), torch.ones(1)
    value = {"a": [tensor, lock], "b": (tensor, model), "c": defaultdict(list, x=[1])}
    copied = copy_values(value)
    assert copied["a"][1] is lock
    assert copied["b"][1] is model
    assert copied["a"][0] is copied["b"][0] is not tensor
    assert copied["c"] == value["c"]
    assert copied["c"] is not value["c"]


def test_copy_when_a_mapping_makes_its_values_then_each_has_its_own_copy() -> None:
    class Lazy(dict[str, float]):
        def items(self) -> Any:
            return [(key, [torch.full((2,), value)]) for key, value in super().items()]

    copied = copy_values([Lazy(a=float(number)) for number in range(50)])
    assert [each["a"][0].tolist() for each in copied] == [[number] * 2 for number in range(50)]
