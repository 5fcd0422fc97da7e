"""The public interface of backends, and the example of one in its documentation."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
from support.models import trainer

import fitloop
from fitloop import Backend, ConfigurationError, Runner, backends


def example() -> type[Backend]:
    """Return the backend in the docstring of `Backend`."""
    text = str(Backend.__doc__).partition("::\n")[2].partition("async with")[0]
    names: dict[str, Any] = {name: getattr(backends, name) for name in backends.__all__}
    exec(textwrap.dedent(text), names)
    backend: type[Backend] = names["MixedBackend"]
    return backend


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_backend_when_written_as_documented_then_a_runner_uses_it() -> None:
    async with Runner(2, backend=example()(), keep_trainers=True) as runner:
        runner.submit(trainer, name="short", epochs=2, verbose=False)
        runner.submit(lambda: trainer(device=1 / 0), name="fails")
        with pytest.raises(ConfigurationError, match="a live FitLoop"):  # worker processes cannot
            runner.submit(trainer(), name="long", epochs=11)
        short, failed = await runner.results()
    assert short.result is not None
    assert short.result.epochs == 2
    assert short.trainer is not None  # it was trained in this process
    assert isinstance(failed.error, ZeroDivisionError)


def test_package_when_listed_then_its_names_are_documented() -> None:
    for name in backends.__all__:
        assert getattr(backends, name).__doc__
    assert {"Backend", "JobSpec", "ProcessBackend"} <= set(fitloop.__all__)
