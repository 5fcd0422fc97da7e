"""The workers of a Ray cluster, with an object that stands for Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from fitloop.backends import RayBackend, WorkerOrder
from fitloop.backends.launched.ray_cluster import actor_class, death_of_actor

ORDERS = [WorkerOrder("a job", f"127.0.0.1:{n}", f"key{n}") for n in (1, 2)]


def test_ranks_when_ray_refuses_an_actor_then_keep_no_resources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[Any] = []

    def placement_group(bundles: list[Any]) -> Any:
        groups.append(bundles)
        return bundles

    def strategy(_group: Any, *, placement_group_bundle_index: int) -> int:
        return placement_group_bundle_index

    def refuse(_kind: type) -> Any:
        raise ValueError("an unknown option")

    strategies = SimpleNamespace(PlacementGroupSchedulingStrategy=strategy)
    util = SimpleNamespace(
        placement_group=placement_group,
        remove_placement_group=groups.remove,
        scheduling_strategies=strategies,
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(util=util, remote=refuse))
    launcher: Any = RayBackend(ranks=2)._launcher
    with pytest.raises(ValueError, match="an unknown option"):
        launcher.start_ranks(ORDERS)
    assert groups == []


ACTOR = """
import pickle, sys
actor = pickle.loads(bytes.fromhex(sys.argv[1]))()
_description, code, lines = actor.run(["-c", "import sys; print('end'); sys.exit(3)"], {})
assert (code, lines) == (3, ["end"])
assert "torch" not in sys.modules
"""


def test_actor_when_another_process_has_it_then_runs_a_worker_and_imports_no_torch() -> None:
    code = cloudpickle.dumps(actor_class()).hex()  # type: ignore[no-untyped-call]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ACTOR, code], env=environment, check=True)


DEATH = """The actor died because of an error raised in its creation task, \x1b[36mray::A()\x1b[39m
                      ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named '{module}'
"""


def test_actor_when_fitloop_is_not_installed_there_then_its_death_says_so() -> None:
    death = death_of_actor(RuntimeError(DEATH.format(module="fitloop")))
    missing = "ModuleNotFoundError: No module named 'fitloop'"
    assert death == f"ended by {missing} (install fitloop on all nodes)"
    assert death_of_actor(RuntimeError(DEATH.format(module="other"))).endswith("named 'other'")


def test_actor_when_it_was_killed_then_its_death_is_told_in_one_line() -> None:
    assert death_of_actor(RuntimeError("The actor died.\n  It was killed")) == (
        "ended: The actor died. It was killed"
    )
    assert death_of_actor(ValueError()) == "ended: ValueError"
