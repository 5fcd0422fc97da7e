"""Torch operations that may use random numbers are known before they are called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode, get_overridable_functions

from fitloop._rng.torch_ops import (
    CodeTraits,
    RngFunctionMode,
    can_intercept,
    may_use_rng,
    rng_ops,
)


def aten_ops() -> list[Any]:
    ops = []
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        packet = getattr(torch.ops.aten, name, None) if space == "aten" else None
        op = getattr(packet, schema.overload_name or "default", None)
        if op is not None:
            ops.append(op)
    return ops


def test_ops_when_torch_tags_them_as_random_then_all_are_known() -> None:
    ops = aten_ops()
    assert len(ops) > 1000
    tagged = [op for op in ops if torch.Tag.nondeterministic_seeded in op.tags]
    assert tagged
    with_generator = [
        op for op in ops if any("Generator" in str(a.type) for a in op._schema.arguments)
    ]
    for op in [*tagged, *with_generator]:
        assert {op.__name__, op.__name__.split(".")[0]} <= rng_ops()


def test_functions_in_python_when_they_use_random_numbers_then_are_known() -> None:
    functions = {f for group in get_overridable_functions().values() for f in group}
    python = [f for f in functions if isinstance(f, FunctionType)]
    using = {f.__name__ for f in python if may_use_rng(f, (), {})}
    assert {"dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu"} <= using
    assert {"gumbel_softmax", "multi_head_attention_forward", "fractional_max_pool2d"} <= using
    assert not {"cross_entropy", "batch_norm", "relu", "softmax", "einsum"} & using


def test_interception_when_torch_is_the_installed_one_then_works_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    can_intercept.cache_clear()
    assert can_intercept()
    assert torch.equal(torch.get_rng_state(), state)


def test_interception_when_torch_calls_modes_in_another_way_then_is_not_relied_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RngFunctionMode, "__torch_function__", TorchFunctionMode.__torch_function__)
    can_intercept.cache_clear()
    assert not can_intercept()
    can_intercept.cache_clear()


def test_attention_when_in_eval_mode_then_is_not_watched() -> None:
    """Its faster way gives other bits, and torch does not take it under a mode."""
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    traits = CodeTraits(model)
    assert not traits.is_opaque
    assert not traits.must_hold_lock(train=True)
    assert traits.must_hold_lock(train=False)
    teacher = nn.MultiheadAttention(4, 2).eval()
    assert CodeTraits(lambda state: teacher(state.batch)).must_hold_lock(train=True)
    assert not CodeTraits(nn.LSTM(4, 4), nn.Linear(4, 4)).must_hold_lock(train=False)


class UsersTensor(Tensor):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch
def test_code_when_it_reaches_what_cannot_be_intercepted_then_is_opaque() -> None:
    compiled = torch.compile(lambda x: x)

    def helper(x: Any) -> Any:
        return compiled(x)

    class Model(nn.Module):
        def forward(self, x: Any) -> Any:
            return helper(x)

    class Steps:
        def __init__(self, function: Any = None) -> None:
            self.function = function

        def call(self, state: Any) -> Any:
            return self.function(state)

        def step(self, state: Any) -> Any:
            return helper(state)

    subclassed = nn.Linear(2, 2)
    subclassed.weight = nn.Parameter(torch.ones(2, 2).as_subclass(UsersTensor))
    for code in (compiled, helper, lambda x: helper(x), partial(helper, 1), Model(), subclassed):
        assert CodeTraits(code).is_opaque
    assert CodeTraits(Steps().step).is_opaque
    assert CodeTraits(Steps(compiled).call).is_opaque
    assert not CodeTraits(Steps().call).is_opaque
    assert not CodeTraits(lambda x: F.relu(x), partial(F.dropout, p=0.5)).is_opaque


SQUARE = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
LSTM = nn.LSTM(4, 4, num_layers=2, dropout=0.5)
ATTENTION = nn.MultiheadAttention(4, 2, dropout=0.5)


def hooked_backward() -> None:
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_hook(torch.rand_like)  # type: ignore[no-untyped-call]
    torch.autograd.backward((leaf * 2).sum())


CALLS: dict[str, tuple[bool, Callable[[], object]]] = {
    "F.dropout": (True, lambda: F.dropout(SQUARE)),
    "F.dropout in eval": (False, lambda: F.dropout(SQUARE, training=False)),
    "F.dropout2d": (True, lambda: F.dropout2d(SQUARE[None, None])),
    "rand": (True, lambda: torch.rand(2)),
    "rand, own generator": (False, lambda: torch.rand(2, generator=torch.Generator())),
    "default generator": (True, lambda: torch.rand(2, generator=torch.default_generator)),
    "normal_": (True, lambda: torch.empty(2).normal_()),
    "random_": (True, lambda: torch.empty(2).random_()),
    "bernoulli": (True, lambda: torch.bernoulli(SQUARE)),
    "multinomial": (True, lambda: torch.multinomial(SQUARE, 1)),
    "randperm": (True, lambda: torch.randperm(5)),
    "poisson": (True, lambda: torch.poisson(SQUARE)),
    "ops": (True, lambda: torch.ops.aten.bernoulli(SQUARE)),
    "overload": (True, lambda: torch.ops.aten.rand.default([2])),
    "rrelu": (True, lambda: F.rrelu(SQUARE - 0.5, training=True)),
    "pooling": (True, lambda: F.fractional_max_pool2d(SQUARE[None], 2, output_size=2)),
    "gumbel": (True, lambda: F.gumbel_softmax(SQUARE)),
    "init": (True, lambda: nn.init.kaiming_uniform_(torch.empty(2, 2))),
    "trunc": (True, lambda: nn.init.trunc_normal_(torch.empty(2, 2))),
    "linear": (True, lambda: nn.Linear(2, 2)),
    "lstm": (True, lambda: LSTM(SQUARE)),
    "attention": (True, lambda: ATTENTION(SQUARE, SQUARE, SQUARE)),
    "sdpa": (
        True,
        lambda: F.scaled_dot_product_attention(SQUARE[None], SQUARE[None], SQUARE[None], None, 0.5),
    ),
    "sdpa, no dropout": (
        False,
        lambda: F.scaled_dot_product_attention(SQUARE[None], SQUARE[None], SQUARE[None]),
    ),
    "distribution": (True, lambda: torch.distributions.Gamma(1.0, 1.0).sample()),
    "hook": (True, lambda: hooked_backward()),
    "user's function": (
        True,
        lambda: F.triplet_margin_with_distance_loss(
            SQUARE, SQUARE, SQUARE, distance_function=lambda a, b: F.dropout(a - b).norm(dim=1)
        ),
    ),
    "matmul": (False, lambda: (SQUARE @ SQUARE).sum()),
    "cross entropy": (False, lambda: F.cross_entropy(SQUARE, torch.arange(4))),
}


class RngCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if may_use_rng(func, args, kwargs):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_call_when_it_uses_random_numbers_then_is_known_before(name: str) -> None:
    uses_rng, call = CALLS[name]
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        with RngCalls() as calls:
            call()
        moved = not torch.equal(before, torch.get_rng_state())
    assert moved == uses_rng
    assert bool(calls.names) == uses_rng


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch
def test_model_when_scripted_or_compiled_then_is_opaque() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert not CodeTraits(plain, nn.CrossEntropyLoss(), None).is_opaque
    compiled = nn.Linear(2, 2)
    compiled.compile()
    assert CodeTraits(nn.Sequential(compiled)).is_opaque
