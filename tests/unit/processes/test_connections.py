"""Connections in processes that are forked while threads close them."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest

from fitloop._processes.child import close_in_children

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")


def is_open_in_fork(descriptor: int) -> bool:
    process = os.fork()
    if process == 0:
        try:
            os.fstat(descriptor)
        except OSError:
            os._exit(1)
        os._exit(0)
    _process, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) == 0


def test_connection_when_a_process_is_forked_then_is_closed_there() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        close_in_children(ours)
        assert not is_open_in_fork(ours.fileno())
        assert is_open_in_fork(theirs.fileno())


def test_connection_when_a_thread_is_in_the_middle_of_closing_it_then_no_other_file_is_closed() -> (
    None
):
    ours, theirs = multiprocessing.Pipe()
    close_in_children(ours)
    number = ours.fileno()
    os.close(number)  # as close() does, before it forgets the number
    reader, writer = os.pipe()
    assert number in (reader, writer)
    try:
        assert is_open_in_fork(number)
        assert isinstance(ours, Connection)
        assert ours.fileno() == number  # in this process all is as before
    finally:
        vars(ours)["_handle"] = None
        theirs.close()
        os.close(reader)
        os.close(writer)
