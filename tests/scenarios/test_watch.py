"""``fitloop watch``: the screen of a person who follows runs of other processes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.event_loops import HANG_TIMEOUT
from support.made_up_runs import (
    BATCHES,
    IN_FIT,
    FakeRun,
    epoch_ended,
    epoch_events,
    epoch_started,
    fake_run,
    phase_ended,
    phase_started,
    progress,
    run_ended,
)
from support.programs import Program, started
from support.pseudo_terminal import PRELUDE, Terminal, environment

from fitloop import Phase, PromptAnswered, PromptAsked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs a pty"),
]

WATCH = ["-Werror::ResourceWarning", "-m", "fitloop", "watch"]
BAR = "[━╸─]"
METRICS = r"loss: \d+\.\d{4} \| accuracy: [01]\.\d{4}"
ASKED = PromptAsked(**IN_FIT, epoch=1, epoch_in_run=1, epochs=3, question="go on?")


@contextmanager
def watching(
    *arguments: object, size: tuple[int, int] = (100, 30), **env: str
) -> Iterator[Terminal]:
    terminal = Terminal([*WATCH, *map(str, arguments)], environment(env), size)
    try:
        yield terminal
    finally:
        terminal.close()


@contextmanager
def training(directory: Path, program: str) -> Iterator[Program]:
    """Run a program of another process that has `PRELUDE` and ``path``."""
    start = f"{PRELUDE}\nfrom fitloop import Checkpoint\npath = {str(directory)!r}\n"
    # Nothing of it is awaited but its end, so that a line it waits for is all that holds it.
    with (
        open(os.devnull, "w") as output,
        started(
            ["-c", start + program], environment=environment(), stdout=output.fileno()
        ) as process,
    ):
        yield process


def lines(number: int, epochs: int = 3, label: str = "", metrics: str = METRICS) -> str:
    """Return the pattern of the lines of an epoch without validation."""
    head = f"{label}[{number}/{epochs}] - "
    return rf"{re.escape(head)}train :: {metrics}\n{' ' * len(head)}epoch time: [^\n]+\n"


def is_clean(terminal: Terminal) -> bool:
    return not re.search(BAR, terminal.text) and terminal.screen.cursor.x == 0


# -- training processes ----------------------------------------------------------------------------


def test_watch_when_begun_before_the_runs_then_shows_all_of_them_and_ends(tmp_path: Path) -> None:
    program = """
def hold(state):
    if state.is_train and state.epoch_num == 1 and state.batch_num == 100:
        sys.stdin.readline()

async def main():
    t = trainer(batches=200, hold=hold, save_path=path, save_to_disk=True)
    await t.fit(2, verbose=False)
    sys.stdin.readline()  # a run that ends between two looks at its files is not shown
    await t.fit(1, verbose=False)
    sys.stdin.readline()
    await t.test([(torch.randn(8, 4), torch.zeros(8).long())], verbose=False)

asyncio.run(main())
"""
    run = tmp_path / "a"
    with watching(run) as terminal:
        terminal.until("waiting for a run in")
        with training(run, program) as process:
            for shown in (
                rf"epoch +1/2 +{BAR}+  \d+ s.*\ntrain +\d+/200 +{BAR}",
                r"\[1/2\](?s:.*)\(best so far\)(?s:.*)best score: [\d.]+ \(accuracy, epoch ",
                r"\[1/1\] - train(?s:.*)best score",
            ):
                terminal.until(shown)
                process.stdin.write("\n")
                process.stdin.flush()
            assert terminal.end() == 0
        seen = terminal.transcript
        assert len(re.findall("total time", seen)) == 2
        assert re.search(r"\[1/1\] - train(?s:.*)best score.*\ntest  :: loss: .*$", seen)
        assert is_clean(terminal)


def test_watch_when_the_process_is_killed_then_says_so_and_follows_the_one_that_goes_on(
    tmp_path: Path,
) -> None:
    program = """
batches = {batches}
t = trainer(batches=10, hold=slowly(), save_path=path)
calls = [lambda event: event.kind == "epoch_started" and event.epoch == {last} and sys.stdin.read()]
asyncio.run(t.fit(3, checkpoint=Checkpoint(), resume=True, verbose=False, callbacks=calls))
"""
    with watching(tmp_path, "--forever") as terminal:
        with training(tmp_path, program.format(batches=10, last=2)) as process:
            terminal.until(r"\[1/3\](?s:.*)epoch +\d/3")
            terminal.until(lambda: any(tmp_path.glob("snapshots/snapshot-*.msgpack")))
            process.send_signal(signal.SIGKILL)
            terminal.until(r"fit is no longer running after 1 of 3 epochs: its process died or")
            terminal.until(lambda: is_clean(terminal))
        with training(tmp_path, program.format(batches=10, last=0)):
            terminal.until(
                r"fit goes on after 1 of 3 epochs\n\[2/3\](?s:.*)\[3/3\](?s:.*)best score"
            )
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.transcript


def test_watch_when_a_no_takes_the_run_back_then_shows_it(tmp_path: Path) -> None:
    program = """
async def answer(event):
    while t.epoch_num < event.epoch + 1:
        await asyncio.sleep(0.01)
    return False

t = trainer(batches=50, hold=slowly(), save_path=path, save_to_disk=True)
asyncio.run(t.fit(9, continue_loop=2, continue_while_asking=True, on_continue=answer,
                  verbose=False))
"""
    with watching(tmp_path) as terminal, training(tmp_path, program):
        terminal.until(r"\[3/9\](?s:.*)went back to epoch 2\n(?s:.*)total time")
        assert terminal.end() == 0
        assert is_clean(terminal)
        assert len(re.findall(r"\[1/9\]", terminal.transcript)) == 1


# -- runs without snapshots ------------------------------------------------------------------------


def test_watch_when_begun_in_the_middle_then_tells_where_it_is_and_numbers_what_comes(
    tmp_path: Path,
) -> None:
    with fake_run(tmp_path) as run:
        run.observe(*epoch_events(1), *epoch_events(2), epoch_started(3), phase_started(3))
        with watching(tmp_path) as terminal:
            terminal.until(
                rf"fit, 2 of 3 epochs done, began [^\n]* ago\n{lines(2)}epoch +3/3 +{BAR}+[^\n]*\n"
                rf"train +0/{BATCHES}"
            )
            run.observe(phase_ended(3), epoch_ended(3), run_ended())
            terminal.until(rf"epoch time[^\n]*\n{lines(3)}-+\ntotal time: 07 s 500 ms\nbest score")
            assert terminal.end() == 0
            assert "[1/3]" not in terminal.transcript
            assert is_clean(terminal)


def test_watch_when_runs_appear_and_end_in_all_ways_then_each_is_told_by_its_name(
    tmp_path: Path,
) -> None:
    with watching(tmp_path) as terminal:
        terminal.until("waiting for a run in")
        with fake_run(tmp_path / "a") as first, fake_run(tmp_path / "b", 1, "test") as second:
            first.observe(epoch_started(1), phase_started(1))
            terminal.until(rf"a +1/3 +train +0/200 +{BAR}")
            second.observe(epoch_started(1, 1), phase_started(1, Phase.TEST))
            terminal.until(rf"a +1/3 +train +0/200 +{BAR}[^\n]*\nb +1/1 +test +0/200 +{BAR}")
            second.observe(
                phase_ended(1, Phase.TEST), epoch_ended(1, 1, Phase.TEST), run_ended(1, "test")
            )
            terminal.until(rf"b test  :: {METRICS}\n")
            with fake_run(tmp_path / "c") as third:
                third.observe(epoch_started(1), run_ended(0, stop_reason="cancelled"))
                terminal.until(r"accuracy: 0.5000\nc: fit cancelled after 0 of 3 epochs")
            error = "ValueError: mine"
            first.observe(*epoch_events(1)[2:], run_ended(1, stop_reason="failed", error=error))
        terminal.until(rf"{lines(1, label='a ')}a: fit failed after 1 of 3 epochs[^\n]*: {error}")
        assert terminal.end() == 0
        assert is_clean(terminal)


def test_watch_when_batches_pass_or_a_run_asks_then_shows_it(tmp_path: Path) -> None:
    now = [1_000_000.0]
    run = FakeRun(tmp_path, clock=lambda: now[0])
    with fake_run(tmp_path), watching(tmp_path) as terminal:
        run.begin()
        run.observe(epoch_started(1), phase_started(1))
        for batch in (50, 100, 150):
            now[0] += 1
            run.observe(progress(1, batch))
            terminal.until(rf"train +{batch}/200 +{BAR}")
        run.observe(*epoch_events(1)[2:], ASKED)
        terminal.until("waits for the answer")
        run.observe(PromptAnswered(**IN_FIT, epoch=1, go_on=True), *epoch_events(2)[:2])
        terminal.until(lambda: "waits" not in terminal.text)
        run.observe(run_ended(1, stop_reason="cancelled"))
        assert terminal.end() == 0


def test_watch_when_the_terminal_is_narrow_then_no_line_of_the_bars_is_wider(
    tmp_path: Path,
) -> None:
    with fake_run(tmp_path / "a") as run, fake_run(tmp_path / "b"):
        run.observe(*epoch_events(1, batches=(20,)), *epoch_events(2)[:2])
        with watching(tmp_path, "--every", 0, size=(30, 10)) as terminal:
            terminal.until(r"(?m:^a +2/3)[^\n]*\n(?m:^b +0/3)")
            terminal.type("\x03")
            assert terminal.end() == 130
            assert is_clean(terminal)


def test_ctrl_c_when_pressed_then_ends_with_130_and_a_clean_terminal(tmp_path: Path) -> None:
    with fake_run(tmp_path) as run:
        run.observe(epoch_started(1), phase_started(1))
        with watching(tmp_path) as terminal:
            terminal.until(rf"train +0/200 +{BAR}")
            terminal.type("\x03")
            assert terminal.end() == 130
            assert is_clean(terminal)
            assert "Traceback" not in terminal.transcript


def test_watch_when_one_log_cannot_be_read_then_the_others_go_on_and_the_status_is_1(
    tmp_path: Path,
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.msgpack").write_text("hello")
    with fake_run(tmp_path / "good") as run:
        run.observe(*epoch_events(1))
        with watching(tmp_path, size=(200, 30)) as terminal:
            terminal.until(r"fitloop: \S*bad/metrics.msgpack cannot be read(?s:.*)good +1/3")
            run.observe(run_ended(1, stop_reason="stopped"))
            assert terminal.end() == 1
            assert is_clean(terminal)


def test_watch_when_piped_then_every_line_comes_at_once_and_is_plain(tmp_path: Path) -> None:
    command = [*WATCH, str(tmp_path / "a"), "--every", "2"]
    with started(command, environment=environment()) as process:
        assert "waiting for a run" in process.stdout.readline()
        with fake_run(tmp_path / "a") as run:
            run.observe(*epoch_events(1), *epoch_events(2), *epoch_events(3), run_ended())
        said = process.stdout.read()
        assert process.wait(HANG_TIMEOUT) == 0
    ending = r"-----\ntotal time: [^\n]+\nbest score: 0.5000 \(epoch 1\)\n"
    assert re.fullmatch(lines(1) + lines(2) + ending, said)
