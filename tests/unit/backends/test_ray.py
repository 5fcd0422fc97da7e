"""The workers of a Ray cluster, with an object that stands for Ray."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fitloop.backends import RayBackend, WorkerOrder

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
