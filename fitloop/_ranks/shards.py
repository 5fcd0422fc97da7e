"""Tensors that are split over the ranks of a training: torch's DTensors.

Modules of torch that only such trainings need are not imported here: that takes a second.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_shard(value: object) -> bool:
    """Return whether a tensor is split over the ranks; each has a part of its values."""
    if type(value) is Tensor:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the values of all ranks; a meeting of all ranks if it is split."""
    if not is_shard(tensor):
        return tensor
    shard: Any = tensor.detach()
    device = shard.device_mesh.device_type  # it may be a copy in CPU memory
    if shard.device.type != device:
        shard = shard.to(device)
    return shard.full_tensor()  # type: ignore[no-any-return]


def split_like(like: Any, value: Any) -> Any:
    """Return a tensor split as ``like`` is, without a message: each rank has all its values.

    Returns the value itself if ``like`` or the value is not to be split. One of another shape, with
    dimensions, has all its values on each rank, as a DTensor.
    """
    if not is_shard(like) or not isinstance(value, Tensor) or is_shard(value):
        return value
    if value.shape != like.shape and value.dim() == 0:  # torch computes with both kinds
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh, moved = like.device_mesh, value.detach().to(like.device)
    everywhere: Any = DTensor.from_local(moved, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if value.shape != like.shape:
        return everywhere
    with torch.no_grad():
        return everywhere.redistribute(mesh, like.placements)
