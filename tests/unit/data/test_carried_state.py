"""The search for random generators and other state in the objects of users."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from fitloop._data.carried_state import carried_states, holders_of, set_carried_states
from fitloop._rng.generators import check_tree, generator_state, is_generator, set_generator_state

GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "python": lambda: random.Random(1),
    "numpy": lambda: np.random.default_rng(1),
    "numpy, MT19937": lambda: np.random.Generator(np.random.MT19937(1)),
    "bit generator": lambda: np.random.Philox(1),
    "RandomState": lambda: np.random.RandomState(1),
}
SHARED = np.random.default_rng(2)


def draw(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1), generator.random()]
    if isinstance(generator, np.random.RandomState):
        return [generator.normal(), generator.random()]
    if isinstance(generator, np.random.Generator):
        return generator.normal(size=3).tolist()
    return generator.random_raw(3).tolist()


class Noise:
    def __init__(self, generator: Any) -> None:
        self.generator = generator


class Noisy(Dataset[Any]):
    def __init__(self, transform: Any = None) -> None:
        self.transforms = [transform]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return index + SHARED.random()


class Counting(Noisy):
    reads = 0

    def state_dict(self) -> dict[str, int]:
        return {"reads": self.reads}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reads = state["reads"]


class Wrapper:
    __slots__ = ("__dict__", "loader")

    def __init__(self, loader: Any) -> None:
        self.inner = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


def collate_with(generator: Any) -> Callable[[Any], Any]:
    def collate(samples: Any) -> Any:
        draw(generator)
        return default_collate(samples)

    return collate


def collate_partly(generator: Any, samples: Any) -> Any:
    return default_collate(samples) + draw(generator)[0]


PLACES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "dataset": ("dataset.transforms.0.generator", lambda g: DataLoader(Noisy(Noise(g)))),
    "subset": (
        "dataset.dataset.transforms.0.generator",
        lambda g: DataLoader(Subset(Noisy(Noise(g)), [1, 2])),
    ),
    "collate_fn": (
        "collate_fn.generator",
        lambda g: DataLoader([1, 2], collate_fn=collate_with(g)),  # type: ignore[arg-type]
    ),
    "partial": (
        "collate_fn.1",
        lambda g: DataLoader(
            [1, 2],  # type: ignore[arg-type]
            collate_fn=functools.partial(collate_partly, g),
        ),
    ),
    "method": (
        "collate_fn.self.generator",
        lambda g: DataLoader([1, 2], collate_fn=Noise(g).__eq__),  # type: ignore[arg-type]
    ),
    "wrapper": (
        "inner.collate_fn.generator",
        lambda g: Wrapper(DataLoader([1, 2], collate_fn=collate_with(g))),  # type: ignore[arg-type]
    ),
    "iterator": ("generator", lambda g: PushbackIteratorOf(g)),
    "function": ("loader.collate_fn.generator", lambda g: function_of(g)),
}


class PushbackIteratorOf:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> PushbackIteratorOf:
        return self

    def __next__(self) -> Any:
        return draw(self.generator)


def function_of(generator: Any) -> Callable[[], Any]:
    loader: Any = DataLoader([1, 2], collate_fn=collate_with(generator))  # type: ignore[arg-type]
    return lambda: loader


@pytest.mark.parametrize("kind", GENERATORS)
def test_generator_when_its_state_is_restored_then_draws_the_same(kind: str) -> None:
    generator, other = GENERATORS[kind](), GENERATORS[kind]()
    draw(generator)
    state = check_tree(generator_state(generator))
    expected = draw(generator)
    set_generator_state(other, state)
    assert is_generator(generator)
    assert draw(other) == expected


@pytest.mark.parametrize(
    "value",
    [
        torch.default_generator,
        random.random.__self__,  # type: ignore[attr-defined]
        np.random.mtrand._rand,
        random.SystemRandom(),
        random,
        np.random,
    ],
    ids=["torch", "python", "numpy", "system", "module", "module of numpy"],
)
def test_is_generator_when_it_is_global_or_has_no_state_then_false(value: object) -> None:
    assert not is_generator(value)


@pytest.mark.parametrize(
    "state",
    [
        {"python": [3, np.zeros(5, np.uint32), None]},
        {"numpy": {"bit_generator": "MT19937", "state": {"key": np.zeros(624), "pos": 10**6}}},
        {"numpy": {"bit_generator": "default_rng"}},
        {"other": 1},
        {"numpy": 1, "python": 2},
        torch.zeros(7),
    ],
    ids=["python", "place", "no bit generator", "unknown", "two", "tensor"],
)
def test_check_tree_when_it_is_forged_then_raises(state: Any) -> None:
    with pytest.raises(Exception, match=r".*"):
        check_tree(state)


@pytest.mark.parametrize("place", PLACES)
def test_holders_of_when_a_generator_is_inside_then_has_it(place: str) -> None:
    path, make = PLACES[place]
    generator = GENERATORS["torch"]()
    assert holders_of(make(generator))[path] is generator


def test_holders_of_when_a_method_uses_a_global_generator_then_has_it() -> None:
    assert holders_of(DataLoader(Noisy())) == {"global SHARED": SHARED}


def test_holders_of_when_objects_refer_to_each_other_then_ends() -> None:
    first, second = Noise(None), Noise(None)
    first.generator, second.generator = second, [first, {"a": second}]
    assert holders_of(Wrapper(first)) == {}


def test_carried_states_when_a_dataset_has_a_state_dict_then_it_is_used() -> None:
    read, fresh = Counting(), Counting()
    read.reads = 5
    states = carried_states(DataLoader(read))
    set_carried_states(DataLoader(fresh), states)
    assert fresh.reads == 5
