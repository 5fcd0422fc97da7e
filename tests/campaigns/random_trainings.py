"""Train at random, and compare each training bit for bit with a loop written by hand.

    python tests/campaigns/random_trainings.py [--count 2000] [--first 0]

Each training is made from one number: model, loss, optimizers, schedulers, averages, loaders, stage
functions plain and async, an early stop, and the places where loaders are read and random numbers
are drawn. It runs alone, beside others, interrupted and resumed with new objects, or while a person
is asked who then says no. A training that differs is printed with its number; ``--first NUMBER
--count 1`` repeats it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import anyio

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=2000, help="of trainings")
    parser.add_argument("--first", type=int, default=0, help="number of the first training")
    options = parser.parse_args()

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from support.random_trainings import Recipe, compare

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    wrong = 0
    began = time.perf_counter()
    for number in range(options.first, options.first + options.count):
        try:
            differences = anyio.run(compare, number)
        except Exception as error:
            differences = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
            if isinstance(error, ExceptionGroup):
                differences += [repr(member) for member in error.exceptions]
        if differences:
            wrong += 1
            print(Recipe.of(number), *differences, sep="\n    ", flush=True)
    seconds = time.perf_counter() - began
    print(f"trainings={options.count} first={options.first} wrong={wrong} seconds={seconds:.0f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
