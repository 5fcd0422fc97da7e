"""Compares a snapshot with the trainer that is to take it, once for each resume or load.

A difference with which the training cannot go on raises an error. One warning names the differences
that the snapshot overrules, and the states that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fitloop._checkpointing.run_position import RunPosition
from fitloop._checkpointing.snapshot import (
    STATE_KEYS,
    Snapshot,
    has_same_criteria,
    step_arguments,
)
from fitloop._checkpointing.training_state import check_training, refusing
from fitloop._data.carried_state import missing_states
from fitloop._data.inspection import ORDER_FACTS, loader_facts, loader_label
from fitloop._errors import CheckpointError, ResumeWarning, warn_user
from fitloop._format import printable
from fitloop._training.trainer_state import TrainerState
from fitloop._training.user_settings import differences, differences_of_facts
from fitloop._types import Phase

_ORDER_GENERATORS = ("generator", "sampler", "batch_sampler")
"""parts of a DataLoader whose random numbers decide the order of its samples"""


def check_fits(
    trainer: TrainerState,
    snapshot: Snapshot,
    loaders: Mapping[Phase, Any],
    position: RunPosition | None = None,
) -> None:
    """Compare a snapshot with a trainer and the loaders of a run; change nothing.

    ``position`` is that of a run to be resumed.

    Raises:
        CheckpointError: model, optimizers or schedulers do not fit; or for a run, the seed or, in
            the middle of an epoch, the train loader is another one.
    """
    seed, action = snapshot.trainer["seed"], "loading" if position is None else "resuming"
    if position is not None and seed != trainer.config.seed:
        raise CheckpointError(
            f"{snapshot.path} is of a trainer with seed={seed}, this one has "
            f"seed={trainer.config.seed}; resume with the same seed"
        )
    check_training(trainer.config, snapshot.state["training"])
    with refusing(f"{snapshot.path} cannot be read: its header is not as fitloop writes it"):
        findings = [
            *_last_bits(trainer, snapshot, position),
            *_overruled(trainer, snapshot),
            *_other_steps(trainer, snapshot, position),
            *_not_held(trainer, snapshot),
            *_other_loaders(snapshot, loaders, position),
        ]
    if findings:
        warn_user(
            f"{action} {trainer.config.name!r} from {snapshot.path}: {'; '.join(findings)}",
            ResumeWarning,
        )


def make_schedulers(trainer: TrainerState, snapshot: Snapshot) -> Callable[[], None]:
    """Make the schedulers that functions make, as they were in a snapshot; return what undoes it.

    Raises CheckpointError for a number of steps that is none.
    """
    steps = snapshot.trainer.get("schedule_steps")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise CheckpointError(
            f"{snapshot.path} cannot be read: it has a schedule of {steps!r:.40} steps"
        )
    undo = trainer.planned_schedulers.make(steps)
    trainer.user_settings.begin_call()
    return undo


def _last_bits(
    trainer: TrainerState, snapshot: Snapshot, position: RunPosition | None
) -> list[str]:
    """Say what changes results in their last bits."""
    config, saved, findings = trainer.config, snapshot.trainer, []
    if position is not None:
        if config.num_threads not in (None, saved["num_threads"]):
            findings.append(f"num_threads was {saved['num_threads']} and is {config.num_threads}")
        torch_version = snapshot.versions.get("torch")
        if torch_version != str(torch.__version__):
            findings.append(f"torch was {torch_version!s:.40} and is {torch.__version__}")
        device = str(saved["device"]).partition(":")[0]
        if device != config.device.type:
            findings.append(f"device was {device:.40} and is {config.device.type}")
    return (
        [f"results may differ in their last bits, since {' and '.join(findings)}"]
        if findings
        else []
    )


def _overruled(trainer: TrainerState, snapshot: Snapshot) -> list[str]:
    """Say what was given, and is not used."""
    config, saved, findings = trainer.config, snapshot.trainer, []
    dtype = str(config.dtype).removeprefix("torch.")
    if saved["dtype"] != dtype:
        findings.append(
            f"dtype was {saved['dtype']!s:.40} and is {dtype}, to which weights and optimizer "
            "states are converted"
        )
    if not has_same_criteria(trainer, snapshot) and saved["best_score"] is not None:
        (name, direction), criteria = saved["criteria"], trainer.criteria
        assert criteria is not None
        findings.append(
            f"the best score is of the criteria {name!r} with the direction {direction}, and the "
            f"trainer has {criteria.name!r} with {criteria.direction}: best score and best weights "
            "begin anew"
        )
    saved_facts, facts = saved.get("given"), trainer.user_settings.facts
    if saved_facts is not None and facts is not None:
        differing = differences_of_facts(saved_facts, facts)
        if differing:
            findings.append(f"{'; '.join(differing)}: the settings of the snapshot are used")
    return findings


def _other_steps(
    trainer: TrainerState, snapshot: Snapshot, position: RunPosition | None
) -> list[str]:
    """Say which arguments make the optimizer steps of a resumed run differ from those before."""
    saved = snapshot.trainer.get("step_arguments", {})
    if position is None or position.finished:
        return []
    was, steps = snapshot.trainer.get("schedule_steps"), trainer.planned_schedulers.steps
    differing = [
        f"{name} was {printable(str(saved[name])):.60} and is {value!s:.60}"
        for name, value in step_arguments(trainer.config).items()
        if name in saved and saved[name] != value
    ]
    if isinstance(was, int) and was != steps:
        differing.append(f"the number of steps for lr_scheduler was {was} and is {steps}")
    return (
        [f"{', '.join(differing)}: the run goes on with the arguments given now"]
        if differing
        else []
    )


def _not_held(trainer: TrainerState, snapshot: Snapshot) -> list[str]:
    """Say what the snapshot, or this trainer, does not have."""
    findings = []
    lost = [printable(str(name)) for name in snapshot.trainer.get("lost", ())]
    if lost:
        findings.append(
            f"{', '.join(lost[:10])} had changed and could not be kept; give the trainer an object "
            "that holds it, with state_dict() and load_state_dict(), as stateful="
        )
    missing = trainer.objects.missing(snapshot.state.get("objects", {}))
    if missing:
        names = ", ".join(map(printable, missing[:10]))
        findings.append(f"the snapshot has a state of {names}, which this trainer does not have")
    unused = snapshot.state.keys() - STATE_KEYS - trainer.parts.keys()
    if unused:
        names = ", ".join(printable(repr(name)) for name in sorted(unused)[:10])
        findings.append(f"the snapshot holds {names}, which this trainer does not have")
    return findings


def _other_loaders(
    snapshot: Snapshot, loaders: Mapping[Phase, Any], position: RunPosition | None
) -> list[str]:
    """Say how loaders differ; raise `CheckpointError` if an epoch cannot go on with another one."""
    findings: list[str] = []
    if position is not None and position.finished:
        return findings
    for phase, loader in loaders.items():
        if loader is None or (position is not None and str(phase) not in position.loaders):
            continue
        name, in_pass = loader_label(phase, loader), False
        carried = snapshot.state["generators"][str(phase)]
        if position is not None:
            carried = position.loaders[str(phase)]["generators"]
            in_pass = phase is Phase.TRAIN and position.train_pass is not None
        saved = snapshot.trainer.get("loaders", {}).get(str(phase), {})
        facts, missing = loader_facts(loader), missing_states(loader, carried)
        if not saved and not carried:  # there was none, or it is not known
            missing = [] if position is None else missing
        differing = differences(name, saved, facts)
        if missing:
            differing.append(
                f"{name}: the state of {', '.join(map(printable, missing[:10]))} is only in "
                "one of loader and snapshot"
            )
        order = {key: value for key, value in facts.items() if key in ORDER_FACTS}
        is_other = any(path.partition(".")[0] in _ORDER_GENERATORS for path in missing)
        if in_pass and position is not None and (is_other or differences(name, saved, order)):
            raise CheckpointError(
                f"{snapshot.path} was taken after batch {position.batch} of an epoch, whose rest "
                f"is not in another loader: {'; '.join(differing)}. Give the loader as it was; or "
                f"take only the state: await trainer.load({snapshot.path.name!r}, "
                f"{str(snapshot.path.parent)!r}), then fit() with another save_path"
            )
        findings += differing
    return findings
