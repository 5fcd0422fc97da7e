"""The argument of stage functions: the batch, the values so far, the parts of the trainer."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.event_loops import one_event_loop
from support.models import (
    BATCHES,
    CLASSES,
    FEATURES,
    mlp,
    trainer,
)
from torch import Tensor, nn

from fitloop import LoopState, UnknownMetricError, default_batch_step

anyio_backend = one_event_loop

QUIET: dict[str, Any] = {"verbose": False}


class Named(NamedTuple):
    image: Tensor
    extra: dict[str, Any]


def nested_batch() -> Named:
    return Named(
        torch.ones(4, FEATURES, dtype=torch.float64),
        {
            "labels": torch.tensor([0, 1, 2, 0], dtype=torch.int16),
            "mask": torch.tensor([True, False, True, True]),
            "parts": [torch.ones(4, dtype=torch.uint8), (torch.ones(2, dtype=torch.float16), "a")],
            "note": "text",
            "number": 3,
        },
    )


@pytest.mark.parametrize("cast", [True, False])
async def test_batch_when_nested_then_keeps_its_form_and_casts_its_tensors(cast: bool) -> None:
    got: list[Any] = []
    options = nested_batch()
    fitted = trainer(
        train_dl=[options], train_step=lambda state: got.append(state.batch), valid_dl=None
    )
    await fitted.fit(1, cast=cast, **QUIET)
    [batch] = got
    assert type(batch) is Named
    assert list(batch.extra) == ["labels", "mask", "parts", "note", "number"]
    byte, (half, text) = batch.extra["parts"]
    tensors = [batch.image, batch.extra["labels"], batch.extra["mask"], byte, half]
    kinds = [tensor.dtype for tensor in tensors]
    if cast:
        assert kinds == [torch.float32, torch.long, torch.bool, torch.long, torch.float32]
    else:
        assert kinds == [torch.float64, torch.int16, torch.bool, torch.uint8, torch.float16]
    assert (text, batch.extra["note"], batch.extra["number"]) == ("a", "text", 3)
    assert options.image.dtype == torch.float64  # the loader's own is left alone


async def test_dict_batch_when_read_then_batch_size_is_of_its_tensors() -> None:
    sizes: list[int] = []
    data = [{"id": "x", "tokens": torch.zeros(5, 2), "labels": torch.zeros(5)}]
    fitted = trainer(
        train_dl=data, train_step=lambda state: sizes.append(state.batch_size), valid_dl=None
    )
    await fitted.fit(1, **QUIET)
    assert sizes == [5]


async def test_batch_values_when_asked_for_then_scalars_are_a_tensor_and_others_a_list() -> None:
    actual: dict[str, Any] = {}

    def step(state: LoopState) -> dict[str, Any]:
        outputs = state.model(state.batch[0])
        number = state.batch_num
        return {
            "int": number,
            "flag": number > 1,
            "numpy": np.float32(0.5),
            "tensor": outputs.sum(),
            "outputs": outputs,
        }

    def end(state: LoopState) -> None:
        actual.update({name: state[name] for name in state.names()})
        with pytest.raises(UnknownMetricError, match=r"no metric 'nope' in .*'int', 'flag'"):
            state["nope"]

    await trainer(train_step=step, train_epoch_end=end, valid_dl=None).fit(1, steps=2, **QUIET)
    assert set(actual) == {"int", "flag", "numpy", "tensor", "outputs"}
    assert actual["int"].tolist() == [1.0, 2.0]
    assert actual["flag"].tolist() == [0.0, 1.0]
    assert actual["numpy"].tolist() == [0.5, 0.5]
    assert actual["tensor"].is_floating_point()
    assert not actual["tensor"].requires_grad
    outputs = actual["outputs"]
    assert type(outputs) is list
    assert [tuple(value.shape) for value in outputs] == [(8, CLASSES), (8, CLASSES)]
    assert not any(value.requires_grad for value in outputs)


async def test_state_when_read_then_has_what_the_constructor_was_given() -> None:
    actual: list[bool] = []

    def step(state: LoopState) -> Any:
        actual.append(
            state.model is fitted.model
            and state.optimizer is fitted.optimizer
            and state.loss_function is fitted.loss_function
            and state.valid_dl is fitted.valid_dl
            and state.device == torch.device("cpu")
            and (state.name, state.criteria, state.lr_scheduler) == ("tiny", "accuracy", None)
            and (state.is_train, state.is_test) == (state.phase == "train", state.phase == "test")
        )
        return default_batch_step(state)

    fitted = trainer(train_step=step, criteria="accuracy", name="tiny")
    await fitted.fit(1, **QUIET)
    assert actual == [True] * BATCHES


async def test_dtype_when_given_then_model_and_batches_have_it() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    fitted = trainer(model=model, dtype=torch.float64)
    await fitted.fit(1, **QUIET)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


async def test_dtype_when_parameters_differ_then_batches_have_that_of_most_numbers() -> None:
    model: Any = mlp()
    model.scale = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    assert next(model.parameters()).dtype is torch.float64
    seen = set()

    def step(state: LoopState) -> dict[str, Any]:
        seen.add(state.batch[0].dtype)
        return default_batch_step(state)

    await trainer(model=model, train_step=step).fit(1, **QUIET)
    assert seen == {torch.float32}
    assert model.scale.dtype is torch.float64
