"""Mixed precision: the dtype of the operations in batch steps, and the scaler of losses.

The weights stay float32. torch's autocast chooses the operations that compute in the lower
precision, and casts their inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable
from typing import Any, Literal

import torch

from fitloop._arguments import expect
from fitloop._errors import ConfigurationError
from fitloop._types import Phase

Precision = Literal["bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(
    precision: Precision | None, device: torch.device, dtype: torch.dtype
) -> Precision | None:
    """Check the argument ``precision`` of a trainer, and return it.

    Raises:
        ConfigurationError: it is unknown, the device does not support it, or it has no effect on
            weights of this dtype.
    """
    if precision is None:
        return None
    expect(precision in DTYPES, "precision", precision, "'bf16', 'fp16' or None")
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        raise ConfigurationError(
            f"precision is {precision!r} and the weights are {name}; expected float32. With "
            "precision= the weights stay float32, and the batch steps compute in "
            f"{str(DTYPES[precision]).removeprefix('torch.')} where torch's autocast does. With "
            "dtype= the weights themselves are of another dtype. Give one of the two"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        return precision  # the first run says that there is no such device
    try:
        torch.autocast(device.type, DTYPES[precision])
    except RuntimeError as error:
        raise ConfigurationError(
            f"precision is {precision!r}, which the device {str(device)!r} does not have: {error}"
        ) from error
    return precision


def in_precision(
    step: Any, config: Any, phase: Phase, await_step: Callable[[Any], Any] = lambda values: values
) -> Any:
    """Return a batch step that computes in the precision of a `TrainerConfig`.

    ``await_step`` gets what an ``async def`` step returns, and returns its values.

    The block of autocast is left after each step: inside one block torch goes on to use the casts
    of weights that a step has changed. Where an optimizer steps inside of a block, its hooks empty
    the cache.

    torch keeps these casts in one cache for the whole process, which the end of any block empties,
    also of another training. A weight that is used twice in a step is then cast twice, and its
    gradient is summed in another precision. So the training of a seeded trainer, which gives the
    same bits beside others, does without the cache.
    """
    if config.precision is None:
        return step
    is_cached = phase is not Phase.TRAIN or config.seed is None
    dtype = DTYPES[config.precision]
    block = torch.autocast(config.device.type, dtype, cache_enabled=is_cached)

    def step_in_precision(state: Any) -> Any:
        with block:
            values = step(state)
            if type(values) is not dict and isawaitable(values):
                # A coroutine takes the modes of this thread with it; see `LoopPortal.call`.
                values = await_step(values)
            return values

    return step_in_precision
