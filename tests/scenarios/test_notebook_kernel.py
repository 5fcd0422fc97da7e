"""The display of a run in a real Jupyter kernel, read from its messages."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from support.jupyter_kernel import Kernel, start_kernel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jupyter() -> Iterator[Kernel]:
    with start_kernel() as running:
        yield running


def epochs_in(html: str) -> int:
    return html.count("<tr>") - 1


def test_fit_when_awaited_in_a_cell_then_one_display_fills_and_stays(jupyter: Kernel) -> None:
    cell = jupyter.run("await trainer().fit(6)")
    assert (cell.status, cell.printed) == ("ok", {"stdout": "", "stderr": ""})
    assert len(cell.shows) == 1
    assert "<progress" in cell.shows[0]
    assert {name for name, _html in cell.updates} == set(cell.pages)
    (page,) = cell.pages.values()
    assert "<progress" not in page["text/html"]
    assert epochs_in(page["text/html"]) == 6
    head = r"Sequential: 6 epochs in .* m?s, best accuracy 0\.\d{4} in epoch \d \*\n"
    assert re.match(head, page["text/plain"])
    # The value of the cell does not show the table once more.
    assert list(cell.result) == ["text/plain"]
    assert re.fullmatch(r"<FitResult completed: 6 epochs, best .*>", cell.result["text/plain"])
    assert jupyter.run("ours()").result["text/plain"] == "[]"


def test_fit_when_two_are_gathered_then_each_has_a_display_with_its_name(jupyter: Kernel) -> None:
    cell = jupyter.run(
        "a, b = trainer(name='one'), trainer(name='<two>')\n"
        "results = await asyncio.gather(a.fit(3), b.fit(4))"
    )
    assert len(cell.shows) == 2
    texts = sorted(page["text/plain"] for page in cell.pages.values())
    assert [text.split(" in ")[0] for text in texts] == ["<two>: 4 epochs", "one: 3 epochs"]
    pages = "".join(page["text/html"] for page in cell.pages.values())
    assert "<strong>&lt;two&gt;</strong>: 4 epochs" in pages
    assert "<two>" not in pages


def test_fit_when_an_earlier_cell_made_its_task_then_is_shown_there(jupyter: Kernel) -> None:
    earlier = jupyter.run("task = asyncio.create_task(trainer(name='late').fit(3))")
    later = jupyter.run("print('here'); result = await task")
    assert len(earlier.shows) == 1
    assert [page["text/plain"][:14] for page in earlier.pages.values()] == ["late: 3 epochs"]
    assert (later.shows, later.updates, later.printed["stdout"]) == ([], [], "here\n")


def test_kernel_when_interrupted_then_fit_ends_whole_and_can_go_on(jupyter: Kernel) -> None:
    cell = jupyter.run("fitted = trainer()\nawait fitted.fit(10**7)", interrupt=True)
    assert (cell.status, cell.error) == ("error", "CancelledError")
    assert cell.traceback == "CancelledError: the run was interrupted; it ended after a whole batch"
    (page,) = cell.pages.values()
    assert re.match(r"Sequential: cancelled (in|after) epoch \d+ of 10000000, ", page["text/plain"])
    assert "<progress" not in page["text/html"]
    state = jupyter.run(
        "assert ours() == []\n"
        "before = fitted.epoch_num\n"
        "assert 0 < before < 10**7\n"
        "assert len(fitted.M.valid['loss'][0]) == before\n"
        "assert not fitted.running and fitted.model.training\n"
        "result = await fitted.fit(epochs=2)\n"
        "assert (result.epochs, fitted.epoch_num) == (2, before + 2)"
    )
    assert (state.status, state.traceback) == ("ok", "")
    assert [epochs_in(page["text/html"]) for page in state.pages.values()] == [2]


def test_kernel_when_interrupted_without_a_display_then_the_run_ends_too(jupyter: Kernel) -> None:
    cell = jupyter.run(
        "beside = asyncio.create_task(trainer(name='beside').fit(10**7))\n"
        "await trainer().run_sanity_check(10**7)",
        interrupt=True,
    )
    assert (cell.status, cell.error) == ("error", "CancelledError")
    after = jupyter.run(
        "beside.cancel()\nawait asyncio.gather(beside, return_exceptions=True)\nprint(ours())"
    )
    assert after.printed["stdout"] == "[]\n"


def test_continue_loop_when_in_a_notebook_then_warns_once_and_names_what_to_do(
    jupyter: Kernel,
) -> None:
    cell = jupyter.run("result = await trainer().fit(4, continue_loop=1)\nresult.stop_reason")
    assert cell.result["text/plain"] == "'completed'"
    assert cell.printed["stderr"].count("RuntimeWarning") == 1
    assert "Give on_continue= an async function" in cell.printed["stderr"]


def test_on_continue_when_in_a_notebook_then_is_asked(jupyter: Kernel) -> None:
    cell = jupyter.run(
        "async def ask(question):\n"
        "    return question.epoch_in_run < 2\n"
        "result = await trainer().fit(4, continue_loop=1, on_continue=ask)\n"
        "result"
    )
    assert cell.result["text/plain"].startswith("<FitResult prompt: 2 epochs, best ")
    assert cell.printed["stderr"] == ""


@pytest.mark.parametrize(
    ("given", "lines"),
    [("progress=False", 8), ("verbose=False", 0), ("print_every=0", 0)],
)
def test_fit_when_no_display_is_wanted_then_there_is_none(
    given: str, lines: int, jupyter: Kernel
) -> None:
    cell = jupyter.run(f"result = await trainer().fit(2, {given})")
    assert (cell.status, cell.shows) == ("ok", [])
    assert cell.printed["stdout"].count("\n") == lines + (lines > 0)


def test_fit_when_the_output_is_redirected_then_its_lines_go_there(jupyter: Kernel) -> None:
    cell = jupyter.run(
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    result = await trainer().fit(1)\n"
        "out.getvalue()[:5]"
    )
    assert cell.shows == []
    assert cell.result["text/plain"] == "'[1/1]'"


def test_test_when_awaited_in_a_cell_then_shows_one_row(jupyter: Kernel) -> None:
    cell = jupyter.run("metrics = await trainer().test()")
    (page,) = cell.pages.values()
    head, names, row = page["text/plain"].splitlines()
    assert (head, names.split()) == ("Sequential", ["test", "loss", "test", "accuracy", "time"])
    assert re.fullmatch(r" *\d\.\d{4} +\d\.\d{4} +\d+ ms", row)


@pytest.mark.parametrize(
    "code",
    [
        "FitLoop(model, seed=1, max_epochs=2)",
        "FitLoop(model, accumulate=0)",
        "trainer().plot()",
        "trainer().plot('unknown')",
        "async with Runner() as runner:\n    runner.submit(trainer, epochs=-1)",
    ],
)
def test_call_when_refused_then_the_traceback_has_no_code_of_fitloop(
    jupyter: Kernel, code: str
) -> None:
    cell = jupyter.run(f"from fitloop import FitLoop, Runner\nmodel = trainer().model\n{code}")
    assert cell.status == "error"
    assert "fitloop/" not in cell.traceback
    assert "Traceback" in cell.traceback
    assert "TrainerBase" not in cell.traceback


def test_fit_when_a_stage_raises_then_the_display_says_so(jupyter: Kernel) -> None:
    cell = jupyter.run(
        "def bad(state):\n    raise ValueError('<oh>')\nawait trainer(valid_step=bad).fit(3)"
    )
    assert (cell.status, cell.error) == ("error", "ValueError")
    assert "fitloop/" not in cell.traceback
    assert re.search(r"-> 2 +raise ValueError\('<oh>'\)", cell.traceback)
    assert "in trainer 'Sequential': valid, epoch 1" in cell.traceback
    (page,) = cell.pages.values()
    assert "failed with ValueError: &lt;oh&gt;" in page["text/html"]


def test_history_when_shown_then_is_a_table_of_what_was_recorded(jupyter: Kernel) -> None:
    cell = jupyter.run("fitted = trainer()\nawait fitted.fit(2, verbose=False)\nfitted.M")
    assert cell.result["text/plain"].startswith("<History train runs: 1, epochs: 2")
    assert cell.result["text/html"].count("<tr>") == 9
