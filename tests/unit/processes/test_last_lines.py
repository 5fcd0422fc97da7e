"""What is reported of the log of a process that died."""

from __future__ import annotations

from io import BytesIO

from fitloop._processes.child import last_lines


def test_the_report_of_a_crash_has_no_list_of_extension_modules() -> None:
    log = b"before\nFatal Python error: Aborted\n\nExtension modules: a.b, c.d (total: 2)\n"
    assert last_lines(BytesIO(log)) == ["Fatal Python error: Aborted", ""]
