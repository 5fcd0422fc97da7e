"""The three ways in which a run ends."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from support.gates import Gate, Gated, Patient
from support.models import Batch, batches


async def completed(patient: Patient) -> None:
    await patient.fit(load_best=True)


async def failed(patient: Patient) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        await patient.fit(train_dl=_Failing())


async def cancelled(patient: Patient) -> None:
    with anyio.CancelScope() as scope, Gate() as gate:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: patient.fit(train_dl=Gated(gate)))
            await gate.reached.wait()
            gate.open()
            scope.cancel()


class _Failing:
    def __iter__(self) -> Iterator[Batch]:
        yield batches()[0]
        raise ValueError("on purpose")
