"""Where in a run a test can hold it at a gate, to cancel it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fitloop import LoopState, default_batch_step, default_epoch_end
from support.gates import AsyncGated, Gate, Gated, Patient, Way, running, settled
from support.models import BATCHES, batches


@dataclass
class Place:
    """Where in a run the gate is."""

    name: str
    arguments: Callable[[Gate], dict[str, Any]]
    done: int | None
    """batches trained when it is cancelled there; None where it is up to the threads"""
    recorded: int = 0
    """train phases in the history then"""
    fit: dict[str, Any] = field(default_factory=dict)
    in_fit: str = ""
    """name of an argument that belongs to fit"""

    def patient(self, gate: Gate) -> Patient:
        changes = self.arguments(gate)
        fit = {"epochs": 3, **self.fit}
        if self.in_fit:
            fit[self.in_fit] = changes.pop(self.in_fit)
        return Patient(fit, **changes)


def at_batch(gate: Gate, number: int) -> Callable[[LoopState], Any]:
    def step(state: LoopState) -> Any:
        if state.batch_num == number:
            gate.hold()
        return default_batch_step(state)

    return step


def async_at_batch(gate: Gate, number: int) -> Callable[[LoopState], Any]:
    async def step(state: LoopState) -> Any:
        if state.batch_num == number:
            await gate.hold_task()
        return default_batch_step(state)

    return step


def at_end(gate: Gate) -> Callable[[LoopState], Any]:
    def epoch_end(state: LoopState) -> Any:
        gate.hold()
        return default_epoch_end(state)

    return epoch_end


def async_at_end(gate: Gate) -> Callable[[LoopState], Any]:
    async def epoch_end(state: LoopState) -> Any:
        await gate.hold_task()
        return default_epoch_end(state)

    return epoch_end


def _callback(gate: Gate, kind: str) -> Callable[[Any], None]:
    def callback(event: Any) -> None:
        if event.kind == kind:
            gate.hold()

    return callback


def _async_callback(gate: Gate, kind: str) -> Callable[[Any], Any]:
    async def callback(event: Any) -> None:
        if event.kind == kind:
            await gate.hold_task()

    return callback


def _async_ask(gate: Gate) -> Callable[[Any], Any]:
    async def ask(question: Any) -> bool:
        await gate.hold_task()
        return True

    return ask


PLACES = [
    Place("preloop", lambda gate: {"preloop": lambda trainer: gate.hold()}, done=0),
    Place("epoch_start", lambda gate: {"train_epoch_start": lambda state: gate.hold()}, done=0),
    Place("iter", lambda gate: {"train_dl": lambda: _held(gate)}, done=0),
    Place("first_load", lambda gate: {"train_dl": Gated(gate, 0), "prefetch": 0}, done=0),
    Place("load_inline", lambda gate: {"train_dl": Gated(gate), "prefetch": 0}, done=2),
    Place("load_ahead", lambda gate: {"train_dl": Gated(gate, 3), "prefetch": 2}, done=None),
    Place("load_found_out", lambda gate: {"train_dl": Gated(gate)}, done=2),
    Place("load_async", lambda gate: {"train_dl": AsyncGated(gate), "prefetch": 0}, done=2),
    Place("load_async_ahead", lambda gate: {"train_dl": AsyncGated(gate)}, done=None),
    Place("step", lambda gate: {"train_step": at_batch(gate, 2), "prefetch": 0}, done=2),
    Place("step_ahead", lambda gate: {"train_step": at_batch(gate, 3), "prefetch": 2}, done=3),
    Place("step_seeded", lambda gate: {"train_step": at_batch(gate, 2), "seed": 3}, done=2),
    Place("last_step", lambda gate: {"train_step": at_batch(gate, BATCHES)}, done=BATCHES),
    Place("async_step", lambda gate: {"train_step": async_at_batch(gate, 3)}, done=2),
    Place(
        "async_step_seeded",
        lambda gate: {"train_step": async_at_batch(gate, 3), "seed": 3, "prefetch": 2},
        done=2,
    ),
    Place("epoch_end", lambda gate: {"train_epoch_end": at_end(gate)}, done=BATCHES, recorded=1),
    Place("async_epoch_end", lambda gate: {"train_epoch_end": async_at_end(gate)}, done=BATCHES),
    Place("callback", lambda gate: {"callbacks": [_callback(gate, "phase_started")]}, done=0),
    Place(
        "callback_at_end",
        lambda gate: {"callbacks": [_callback(gate, "epoch_ended")]},
        done=BATCHES,
        recorded=1,
    ),
    Place(
        "async_callback",
        lambda gate: {
            "callbacks": [_async_callback(gate, "epoch_started")],
            "train_step": async_at_batch(gate, 2),
        },
        done=None,
    ),
    Place(
        "on_continue",
        lambda gate: {"on_continue": _async_ask(gate)},
        done=BATCHES,
        recorded=1,
        fit={"continue_loop": 1},
    ),
    Place(
        "on_continue_of_fit",
        lambda gate: {"on_continue": _async_ask(gate)},
        done=2 * BATCHES,
        recorded=2,
        fit={"continue_loop": 2},
        in_fit="on_continue",
    ),
    Place(
        "postloop",
        lambda gate: {"postloop": lambda trainer: gate.hold()},
        done=3 * BATCHES,
        recorded=3,
    ),
]


def _held(gate: Gate) -> Any:
    gate.hold()
    return batches()


async def cancel_at(gate: Gate, patient: Patient, way: Way, times: int = 1) -> None:
    """Cancel ``patient`` when it has come to the gate, and open the gate afterwards."""
    async with running(way, patient.fit) as job:
        await gate.reached.wait()
        for _ in range(times):
            job.cancel()
            await settled()
        gate.open()
