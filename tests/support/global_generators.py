"""The global random generators in tests: using, comparing and putting them back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from support.models import seed_process

USES: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(3).tolist(),
    "torch normal": lambda: torch.randn(1).item(),  # torch keeps the other of a pair
    "random": lambda: random.random(),  # looked up at each call, as it may be patched
    "random gauss": lambda: random.gauss(0, 1),  # so does Python
    "numpy": lambda: np.random.rand(2).tolist(),
    "numpy normal": lambda: float(np.random.randn()),  # and numpy
    "numpy integer": lambda: int(np.random.randint(1000)),
    "numpy shuffle": lambda: np.random.permutation(5).tolist(),
    "nothing": lambda: None,
}
BIT_GENERATORS = [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937]


@contextmanager
def restored_generators() -> Iterator[None]:
    """Put the global generators back after a block, with numpy's bit generator."""
    numpy: Any = np.random
    bits = numpy.get_bit_generator()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        numpy.set_bit_generator(bits)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def install_bits(kind: type, seed: int = 3) -> None:
    numpy: Any = np.random
    numpy.set_bit_generator(kind(seed))


def use(names: list[str]) -> list[object]:
    return [USES[name]() for name in names]


def numbers_of(seed: int, names: list[str]) -> list[object]:
    """Return the numbers that the named uses give after seeding the global generators."""
    with restored_generators():
        seed_process(seed)
        return use(names)


def global_states() -> tuple[object, ...]:
    numpy = repr(np.random.get_state(legacy=False))
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy
