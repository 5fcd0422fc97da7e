"""Points of a run at which a test can hold it with a gate, to cancel it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fitloop import LoopState, default_batch_step, default_epoch_end
from support.cancellation import CancelMethod, expect_cancelled, wait_until_idle
from support.checked_trainer import CheckedTrainer
from support.gates import AsyncGatedLoader, Gate, GatedLoader
from support.models import BATCHES, batches


@dataclass
class CancellationPoint:
    """A point of a run, and the expected state after a cancellation there."""

    name: str
    arguments: Callable[[Gate], dict[str, Any]]
    trained_batches: int | None
    """batches that are trained then; None if it depends on the threads"""
    recorded_phases: int = 0
    """train phases in the history"""
    fit: dict[str, Any] = field(default_factory=dict)
    in_fit: str = ""
    """name of an argument that is passed to fit, not to the trainer"""

    def checked_trainer(self, gate: Gate) -> CheckedTrainer:
        changes = self.arguments(gate)
        fit = {"epochs": 3, **self.fit}
        if self.in_fit:
            fit[self.in_fit] = changes.pop(self.in_fit)
        return CheckedTrainer(fit, **changes)


def step_with_gate(gate: Gate, number: int) -> Callable[[LoopState], Any]:
    def step(state: LoopState) -> Any:
        if state.batch_num == number:
            gate.wait_in_thread()
        return default_batch_step(state)

    return step


def async_step_with_gate(gate: Gate, number: int) -> Callable[[LoopState], Any]:
    async def step(state: LoopState) -> Any:
        if state.batch_num == number:
            await gate.wait_in_task()
        return default_batch_step(state)

    return step


def epoch_end_with_gate(gate: Gate) -> Callable[[LoopState], Any]:
    def epoch_end(state: LoopState) -> Any:
        gate.wait_in_thread()
        return default_epoch_end(state)

    return epoch_end


def async_epoch_end_with_gate(gate: Gate) -> Callable[[LoopState], Any]:
    async def epoch_end(state: LoopState) -> Any:
        await gate.wait_in_task()
        return default_epoch_end(state)

    return epoch_end


def _callback(gate: Gate, kind: str) -> Callable[[Any], None]:
    def callback(event: Any) -> None:
        if event.kind == kind:
            gate.wait_in_thread()

    return callback


def _async_callback(gate: Gate, kind: str) -> Callable[[Any], Any]:
    async def callback(event: Any) -> None:
        if event.kind == kind:
            await gate.wait_in_task()

    return callback


def _async_ask(gate: Gate) -> Callable[[Any], Any]:
    async def ask(question: Any) -> bool:
        await gate.wait_in_task()
        return True

    return ask


CANCELLATION_POINTS = [
    CancellationPoint(
        "preloop",
        lambda gate: {"preloop": lambda trainer: gate.wait_in_thread()},
        trained_batches=0,
    ),
    CancellationPoint(
        "epoch_start",
        lambda gate: {"train_epoch_start": lambda state: gate.wait_in_thread()},
        trained_batches=0,
    ),
    CancellationPoint(
        "iter", lambda gate: {"train_dl": lambda: _loader_after_gate(gate)}, trained_batches=0
    ),
    CancellationPoint(
        "first_load",
        lambda gate: {"train_dl": GatedLoader(gate, 0), "prefetch": 0},
        trained_batches=0,
    ),
    CancellationPoint(
        "load_inline",
        lambda gate: {"train_dl": GatedLoader(gate), "prefetch": 0},
        trained_batches=2,
    ),
    CancellationPoint(
        "load_ahead",
        lambda gate: {"train_dl": GatedLoader(gate, 3), "prefetch": 2},
        trained_batches=None,
    ),
    CancellationPoint(
        "load_tuned", lambda gate: {"train_dl": GatedLoader(gate)}, trained_batches=2
    ),
    CancellationPoint(
        "load_async",
        lambda gate: {"train_dl": AsyncGatedLoader(gate), "prefetch": 0},
        trained_batches=2,
    ),
    CancellationPoint(
        "load_async_ahead", lambda gate: {"train_dl": AsyncGatedLoader(gate)}, trained_batches=None
    ),
    CancellationPoint(
        "step",
        lambda gate: {"train_step": step_with_gate(gate, 2), "prefetch": 0},
        trained_batches=2,
    ),
    CancellationPoint(
        "step_ahead",
        lambda gate: {"train_step": step_with_gate(gate, 3), "prefetch": 2},
        trained_batches=3,
    ),
    CancellationPoint(
        "step_seeded",
        lambda gate: {"train_step": step_with_gate(gate, 2), "seed": 3},
        trained_batches=2,
    ),
    CancellationPoint(
        "last_step",
        lambda gate: {"train_step": step_with_gate(gate, BATCHES)},
        trained_batches=BATCHES,
    ),
    CancellationPoint(
        "async_step", lambda gate: {"train_step": async_step_with_gate(gate, 3)}, trained_batches=2
    ),
    CancellationPoint(
        "async_step_seeded",
        lambda gate: {"train_step": async_step_with_gate(gate, 3), "seed": 3, "prefetch": 2},
        trained_batches=2,
    ),
    CancellationPoint(
        "epoch_end",
        lambda gate: {"train_epoch_end": epoch_end_with_gate(gate)},
        trained_batches=BATCHES,
        recorded_phases=1,
    ),
    CancellationPoint(
        "async_epoch_end",
        lambda gate: {"train_epoch_end": async_epoch_end_with_gate(gate)},
        trained_batches=BATCHES,
    ),
    CancellationPoint(
        "callback",
        lambda gate: {"callbacks": [_callback(gate, "phase_started")]},
        trained_batches=0,
    ),
    CancellationPoint(
        "callback_at_end",
        lambda gate: {"callbacks": [_callback(gate, "epoch_ended")]},
        trained_batches=BATCHES,
        recorded_phases=1,
    ),
    CancellationPoint(
        "async_callback",
        lambda gate: {
            "callbacks": [_async_callback(gate, "epoch_started")],
            "train_step": async_step_with_gate(gate, 2),
        },
        trained_batches=None,
    ),
    CancellationPoint(
        "on_continue",
        lambda gate: {"on_continue": _async_ask(gate)},
        trained_batches=BATCHES,
        recorded_phases=1,
        fit={"continue_loop": 1},
    ),
    CancellationPoint(
        "on_continue_of_fit",
        lambda gate: {"on_continue": _async_ask(gate)},
        trained_batches=2 * BATCHES,
        recorded_phases=2,
        fit={"continue_loop": 2},
        in_fit="on_continue",
    ),
    CancellationPoint(
        "postloop",
        lambda gate: {"postloop": lambda trainer: gate.wait_in_thread()},
        trained_batches=3 * BATCHES,
        recorded_phases=3,
    ),
]


def _loader_after_gate(gate: Gate) -> Any:
    gate.wait_in_thread()
    return batches()


async def cancel_at(
    gate: Gate, checked: CheckedTrainer, method: CancelMethod, times: int = 1
) -> None:
    """Cancel the run of ``checked`` when it waits at the gate, then open the gate."""
    async with expect_cancelled(method, checked.fit) as handle:
        await gate.reached.wait()
        for _ in range(times):
            handle.cancel()
            await wait_until_idle()
        gate.open()
