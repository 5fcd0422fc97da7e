"""Random generators that objects of users hold, and their states as trees for a snapshot.

A state is a tensor for torch, ``{"python": [...]}`` for ``random.Random``, and ``{"numpy": {...}}``
for numpy's. The global generators are not among them: they have the streams of a trainer.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fitloop._rng.device_generators import is_default_generator
from fitloop._rng.native_state import GLOBAL_PYTHON, from_tuple
from fitloop._rng.states import check_generator_state, check_numpy_state

_KINDS = (
    *(torch.Generator, random.Random, np.random.Generator, np.random.RandomState),
    np.random.BitGenerator,
)


def is_generator(value: object) -> bool:
    """Return whether a value is a random generator with a state, and no global one."""
    if not isinstance(value, _KINDS) or isinstance(value, random.SystemRandom):
        return False
    numpy_global: Any = np.random.mtrand._rand
    if value is GLOBAL_PYTHON or value is numpy_global:
        return False
    if isinstance(value, random.Random):
        return type(value).getstate is random.Random.getstate
    if isinstance(value, torch.Generator):
        return not is_default_generator(value)
    return True


def generator_state(generator: Any) -> Any:
    """Return the state of a generator as a tree for a snapshot."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"python": [version, np.array(words, np.uint32), gauss]}
    if isinstance(generator, np.random.RandomState):
        return {"numpy": generator.get_state(legacy=False)}
    return {"numpy": _bits(generator).state}


def set_generator_state(generator: Any, state: Any) -> None:
    """Restore a state of `generator_state`.

    Raises:
        TypeError, ValueError, RuntimeError: the state is of a generator of another kind.
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state["python"]
        generator.setstate((version, tuple(map(int, words)), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state["numpy"])
    else:
        _bits(generator).state = state["numpy"]


def check_tree(state: Any) -> Any:
    """Return the state of a generator in a snapshot, which may be forged.

    Raises:
        TypeError, ValueError, KeyError, RuntimeError and others: it is no such state.
    """
    if isinstance(state, Tensor):
        return check_generator_state(state)
    ((kind, content),) = state.items()
    if kind == "python":
        version, words, gauss = content
        from_tuple((version, tuple(map(int, words)), gauss))
    elif kind == "numpy":
        check_numpy_state(content)
    else:
        raise ValueError(f"{kind!r:.60} is no kind of a generator")
    return state


def _bits(generator: Any) -> Any:
    return generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
