"""The three ways in which a run ends."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from support.checked_trainer import CheckedTrainer
from support.gates import Gate, GatedLoader
from support.models import Batch, batches


async def complete_run(checked: CheckedTrainer) -> None:
    await checked.fit(load_best=True)


async def fail_run(checked: CheckedTrainer) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        await checked.fit(train_dl=_FailingLoader())


async def cancel_run(checked: CheckedTrainer) -> None:
    with anyio.CancelScope() as scope, Gate() as gate:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: checked.fit(train_dl=GatedLoader(gate)))
            await gate.reached.wait()
            gate.open()
            scope.cancel()


class _FailingLoader:
    def __iter__(self) -> Iterator[Batch]:
        yield batches()[0]
        raise ValueError("on purpose")
