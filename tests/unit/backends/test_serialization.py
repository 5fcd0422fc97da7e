"""Jobs and errors as bytes."""

from __future__ import annotations

import gc
import io
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fitloop import ConfigurationError, RemoteError
from fitloop._processes.errors import SerializedError, deserialize_error, serialize_error
from fitloop._processes.pickling import write_pickle
from fitloop.backends.remote.serialization import (
    check_serializable,
    deserialize_job,
    serialize_job,
)


class NeedsTwoError(Exception):
    """An exception that plain pickle cannot rebuild."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class UnpicklableError(Exception):
    """An exception that no pickle can carry."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Named(ExceptionGroup[Exception]):
    """A group with an attribute."""

    place = ""


def sent(error: BaseException) -> Exception:
    """Return an error as it arrives in another process."""
    serialized: SerializedError = pickle.loads(pickle.dumps(serialize_error(error)))
    return deserialize_error(serialized)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_error_when_it_has_causes_then_all_come_with_it() -> None:
    inner = UnpicklableError("inner")
    inner.add_note("a note of the inner one")
    inner.__context__ = KeyError("first")
    error = raised(NeedsTwoError(1, 2), inner)
    error.add_note("a note")
    actual = sent(error)
    assert isinstance(actual, NeedsTwoError)
    assert str(actual) == "1 and 2"
    assert actual.__notes__[0] == "a note"
    assert actual.__suppress_context__
    cause = actual.__cause__
    assert isinstance(cause, RemoteError)
    assert str(cause) == "UnpicklableError: inner\na note of the inner one"
    assert isinstance(cause.__context__, KeyError)
    assert not cause.__suppress_context__


def test_group_when_members_cannot_be_pickled_then_the_others_come_as_they_are() -> None:
    error = Named(
        "several",
        [NeedsTwoError(1, 2), UnpicklableError("x"), ExceptionGroup("two", [OSError(2, "n")])],
    )
    error.place = "here"
    error.exceptions[0].add_note("of a member")
    error.exceptions[1].__cause__ = error.exceptions[0]
    actual = sent(error)
    assert isinstance(actual, Named)
    assert (actual.message, actual.place) == ("several", "here")
    one, two, group = actual.exceptions
    assert isinstance(one, NeedsTwoError)
    assert one.__notes__ == ["of a member"]
    assert isinstance(two, RemoteError)
    assert two.__cause__ is one
    assert isinstance(group, ExceptionGroup)
    assert isinstance(group.exceptions[0], FileNotFoundError)


def test_group_when_it_has_an_exit_then_that_ends_no_other_process() -> None:
    actual = sent(BaseExceptionGroup("several", [SystemExit(3), ValueError("v")]))
    assert isinstance(actual, ExceptionGroup)
    one, two = actual.exceptions
    assert isinstance(one, RemoteError)
    assert str(one) == "SystemExit: 3"
    assert isinstance(two, ValueError)


def test_error_when_its_causes_are_a_circle_or_endless_then_is_sent() -> None:
    error, other = ValueError("one"), ValueError("other")
    error.__cause__, other.__cause__ = other, error
    actual = sent(error)
    assert actual.__cause__ is not None
    assert actual.__cause__.__cause__ is actual
    for number in range(1000):
        other = ValueError(str(number))
        other.__context__ = error
        error = other
    assert str(sent(error)) == "999"


@pytest.mark.parametrize("in_band", [True, False])
def test_job_when_it_has_large_values_then_they_are_not_copied_and_arrive_writable(
    in_band: bool,
) -> None:
    tensor, array = torch.arange(6.0).reshape(2, 3), np.arange(4)
    data = TensorDataset(torch.ones(3, 2, dtype=torch.bfloat16), torch.tensor([1, 2, 3]))
    odd = [torch.arange(6).reshape(2, 3).t(), torch.empty(0), torch.eye(2).to_sparse()]
    leaf = torch.ones(2, requires_grad=True)
    job = serialize_job("x", (tensor, array, data, odd, leaf, tensor))
    views = [memoryview(value) for value in job.values if not isinstance(value, bytes)]
    pointers = {np.frombuffer(view, dtype=np.uint8).ctypes.data for view in views}
    assert {tensor.data_ptr(), array.ctypes.data} <= pointers
    received: Any = pickle.loads(pickle.dumps(job, protocol=5)) if in_band else job
    first, second, third, fourth, fifth, again = deserialize_job(received)
    assert torch.equal(first, tensor)
    assert again is first
    assert np.array_equal(second, array)
    assert all(map(torch.equal, third.tensors, data.tensors))
    assert torch.equal(fourth[0], odd[0])
    assert torch.equal(fourth[2].to_dense(), torch.eye(2))
    assert fifth.requires_grad
    first[0, 0] = second[0] = 7


def test_check_when_values_are_large_then_does_not_read_them() -> None:
    class Long(list[int]):
        def __reduce__(self) -> Any:
            pieces = ("x" * 1000 for _ in range(10**9))
            return list, (), None, pieces

    check_serializable("x", (Long(), threading.Lock()))
    with pytest.raises(ConfigurationError, match="cannot be pickled"):
        check_serializable("x", (torch.ones(10**6), np.ones(10**6), threading.Lock()))


def test_buffers_when_collected_in_a_circle_then_python_goes_on() -> None:
    """It crashes on buffers of memoryviews, which an error's traceback may hold."""
    for _ in range(3):
        values: list[Any] = []
        write_pickle([torch.ones(3), np.ones(3)], io.BytesIO(), values.append)
        values.append(values)
        del values
        gc.collect()
