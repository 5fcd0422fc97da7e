"""The screen of a real program in a pseudo-terminal, and a person's answers."""

from __future__ import annotations

import re
import signal
import sys

import pytest
from support.programs import run_program
from support.pseudo_terminal import PRELUDE, Terminal, environment, run_in_terminal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs a pty"),
]

METRICS = r"loss: \d+\.\d{4} \| accuracy: [01]\.\d{4}"
QUESTION = r"continue loop \(\[y\]/n\):"
BAR = "[━╸─]"


def epoch(k: int, n: int, label: str = "") -> str:
    """Return the pattern of an epoch's lines."""
    head = f"{label}[{k}/{n}] - "
    indent = " " * len(head)
    return (
        rf"{re.escape(head)}train :: {METRICS}\n{indent}valid :: {METRICS}\n"
        rf"{indent}epoch time: [^\n]+\n"
    )


def ending(label: str = "") -> str:
    return (
        rf"{label}-----\n{label}total time: [^\n]+\n"
        rf"{label}best score: [01]\.\d{{4}} \(accuracy, epoch \d\)\n"
    )


def is_clean(terminal: Terminal) -> bool:
    """Return whether nothing of the live lines is left, and the cursor begins a new line."""
    return not re.search(BAR, terminal.text) and terminal.screen.cursor.x == 0


# -- progress --------------------------------------------------------------------------------------


def test_fit_when_on_a_terminal_then_bars_move_and_leave_only_the_lines() -> None:
    program = """
asyncio.run(trainer(batches=200, hold=slowly()).fit(2))
print("after")
"""
    with run_in_terminal(program) as terminal:
        first = terminal.until(
            rf"epoch +1/2 +{BAR}+  \d[^\n]* s, \d[^\n]* s left\ntrain +\d+/200 +{BAR}+ .*\d+/s"
        )
        done = re.search(r"train +(\d+)/200", first)
        assert done is not None
        begun = int(done[1])
        terminal.until(lambda: _batch(terminal) > begun or "[1/2]" in terminal.text)
        terminal.until(rf"{epoch(1, 2)}epoch +2/2 +{BAR}+.*\ntrain +\d+/200")
        terminal.until("after")
        assert re.fullmatch(epoch(1, 2) + epoch(2, 2) + ending() + "after", terminal.text)
        assert terminal.end() == 0
        assert is_clean(terminal)


def _batch(terminal: Terminal) -> int:
    actual = re.search(r"train +(\d+)/", terminal.text)
    return int(actual[1]) if actual else -1


def test_fit_when_the_loader_has_no_length_then_batches_are_counted() -> None:
    program = """
def endless():
    while True:
        yield torch.randn(8, 4), torch.randint(0, 3, (8,))

t = trainer(hold=slowly())
asyncio.run(t.fit(1, train_dl=endless, steps=None, callbacks=[
    lambda event: t.stop() if event.kind == "batch_progress" and event.batch > 300 else None]))
"""
    with run_in_terminal(program) as terminal:
        terminal.until(r"train +\d\d+ +.*\d+/s")
        terminal.until(r"\(stopped\)")
        assert terminal.end() == 0
        assert is_clean(terminal)


def test_print_and_logging_when_bars_are_shown_then_every_line_is_whole_and_above() -> None:
    program = """
logging.basicConfig(level="INFO", format="%(message)s")

def chatter(kind):
    shown.wait()
    for number in range(40):
        if kind == "log":
            logging.info("log %d ends", number)
        elif kind == "parts":
            sys.stdout.write(f"parts {number}"); sys.stdout.flush(); sys.stdout.write(" ends\\n")
        else:
            print("print", number, "ends")
        pause.wait(0.01)
    finished.release()

def hold(state):
    # Without bars, Python itself would mix lines of several threads.
    shown.set()
    pause.wait(0.003)
    if state.is_train and state.batch_num == 100:
        for _ in range(3):
            finished.acquire()

pause, shown, finished = threading.Event(), threading.Event(), threading.Semaphore(0)

async def main():
    talking = [asyncio.to_thread(chatter, kind) for kind in ("log", "parts", "print")]
    await asyncio.gather(trainer(batches=100, hold=hold).fit(1), *talking)

asyncio.run(main())
"""
    with run_in_terminal(program) as terminal:
        terminal.until(rf"print \d+ ends\n(.*\n)*epoch +1/1 +{BAR}")
        assert terminal.end() == 0
        lines = terminal.transcript.split("\n")
        for kind in ("log", "print"):
            said = [line for line in lines if line.startswith(kind)]
            assert said == [f"{kind} {number} ends" for number in range(40)]
        assert "parts 39 ends" in terminal.transcript
        assert is_clean(terminal)


def test_fit_when_twenty_trainers_run_then_each_has_a_line_or_is_counted() -> None:
    program = """
async def main():
    fits = [trainer(f"run {k:02d}", batches=150, hold=slowly()).fit(2, print_every=2)
            for k in range(20)]
    await asyncio.gather(*fits)
    print("after")

asyncio.run(main())
"""
    with run_in_terminal(program, size=(90, 12)) as terminal:
        seen = terminal.until(
            r"run 00  [12]/2  train +\d+/150[^\n]*\n(run \d\d [^\n]*\n)+\.\.\. and 10 more"
        )
        assert len(re.findall(r"^run \d\d  ", seen, re.M)) == 10
        assert all(len(line) < 90 for line in seen.split("\n"))
        terminal.until("after")
        assert terminal.end() == 0
        assert is_clean(terminal)
        assert len(re.findall(r"2 epochs in .*, best accuracy", terminal.transcript)) == 20


def test_resize_when_bars_are_shown_then_they_fit_again_and_leave_nothing() -> None:
    program = """
async def main():
    t = trainer(batches=100_000, hold=slowly())
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, t.stop)
    await t.fit(1)
    print("after")

asyncio.run(main())
"""
    with run_in_terminal(program, size=(100, 24)) as terminal:
        terminal.until(rf"train +\d+/100000 +{BAR}")
        terminal.resize(60, 10)
        terminal.until(lambda: _fits(terminal, 60))
        terminal.resize(120, 30)
        terminal.until(lambda: _fits(terminal, 120))
        terminal.resize(18, 4)
        terminal.until(lambda: _fits(terminal, 18))
        terminal.resize(100, 24)
        terminal.signal(signal.SIGUSR1)
        terminal.until("after")
        assert terminal.end() == 0
        assert is_clean(terminal)


def _fits(terminal: Terminal, columns: int) -> bool:
    """Return whether the lines have been drawn for this width."""
    lines = [line for line in terminal.text.split("\n") if re.match("epoch|train", line)]
    bar = re.search(rf"{BAR}+", "".join(lines))
    width = 0 if bar is None else len(bar[0])
    expected = {60: 8 <= width < 40, 120: width == 40, 18: width == 0}[columns]
    return len(lines) == 2 and all(len(line) < columns for line in lines) and expected


def test_fit_when_a_step_raises_then_the_terminal_is_left_clean() -> None:
    program = """
def fail(state):
    if state.batch_num == 100:
        raise ZeroDivisionError("mine")
    slowly()(state)

try:
    asyncio.run(trainer(batches=200, hold=fail).fit(2))
except ZeroDivisionError as error:
    print("caught", error)
"""
    with run_in_terminal(program) as terminal:
        terminal.until(rf"train +\d+/200 +{BAR}")
        terminal.until("caught mine")
        assert terminal.end() == 0
        assert terminal.text == "caught mine"
        assert is_clean(terminal)


def test_fit_when_its_time_is_up_then_the_terminal_is_left_clean() -> None:
    program = """
async def main():
    try:
        async with asyncio.timeout(None) as limit:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, lambda: limit.reschedule(loop.time()))
            await trainer(batches=100_000, hold=slowly()).fit(2)
    except TimeoutError:
        print("time is up")

asyncio.run(main())
"""
    with run_in_terminal(program) as terminal:
        terminal.until(rf"train +\d+/100000 +{BAR}")
        terminal.signal(signal.SIGUSR1)
        terminal.until("time is up")
        assert terminal.end() == 0
        assert is_clean(terminal)


def test_ctrl_c_when_in_the_middle_of_an_epoch_then_ends_with_a_clean_terminal() -> None:
    program = """
try:
    asyncio.run(trainer(batches=100_000, hold=slowly()).fit(2))
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    with run_in_terminal(program) as terminal:
        terminal.until(rf"train +\d+/100000 +{BAR}")
        terminal.type("\x03")
        terminal.until("interrupted 1")
        assert terminal.end() == 0
        assert is_clean(terminal)
        assert re.match(
            r"cancelled in epoch 1 of 2, .* after the start\ninterrupted", terminal.text
        )


CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ("progress=False", {}),
        ("", {"TERM": "dumb"}),
        ("", {"CI": "true"}),
    ],
    ids=["progress off", "dumb", "ci"],
)
def test_fit_when_there_is_to_be_no_drawing_then_only_plain_lines_are_written(
    arguments: str, env: dict[str, str]
) -> None:
    program = f"asyncio.run(trainer(batches=60, hold=slowly()).fit(2, {arguments}))"
    with run_in_terminal(program, env=env) as terminal:
        assert terminal.end() == 0
        assert re.fullmatch(epoch(1, 2) + epoch(2, 2) + ending(), terminal.text + "\n")
        assert not re.search(CONTROL, terminal.raw)


def test_fit_when_verbose_is_off_then_nothing_is_written() -> None:
    program = "asyncio.run(trainer(batches=60, hold=slowly()).fit(2, verbose=False))"
    with run_in_terminal(program) as terminal:
        assert terminal.end() == 0
        assert terminal.raw == ""


@pytest.mark.parametrize(("value", "colors"), [(None, True), ("1", False)], ids=["color", "no"])
def test_no_color_when_set_then_bars_are_drawn_without_colors(
    value: str | None, colors: bool
) -> None:
    program = "asyncio.run(trainer(batches=120, hold=slowly()).fit(1))"
    with run_in_terminal(program, env={} if value is None else {"NO_COLOR": value}) as terminal:
        terminal.until(rf"train +\d+/120 +{BAR}")
        assert terminal.end() == 0
        assert bool(re.search(r"\x1b\[[0-9;]*m", terminal.raw)) is colors


def test_output_when_piped_then_only_plain_lines_are_written() -> None:
    program = "asyncio.run(trainer(batches=60, hold=slowly()).fit(2, continue_loop=1))"
    ran = run_program(["-c", PRELUDE + program], environment=environment(), check=True)
    assert re.fullmatch(epoch(1, 2) + epoch(2, 2) + ending(), ran.stdout)
    assert not re.search(CONTROL, ran.stdout + ran.stderr)
    assert len(re.findall("continue_loop asks on a terminal", ran.stderr)) == 1


# -- the question ----------------------------------------------------------------------------------

ASKS = """
async def main():
    result = await trainer().fit(4, continue_loop=2)
    print(result.stop_reason, result.epochs)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("keys", "shows", "reason"),
    [
        ("y\r", "y", "completed 4"),
        ("YES\r", "YES", "completed 4"),
        ("\r", "", "completed 4"),
        ("n\r", "n", "prompt 2"),
        ("no\r", "no", "prompt 2"),
        ("\x04", "n", "prompt 2"),
        ("yx\x7f\r", "y", "completed 4"),
    ],
    ids=["y", "YES", "Enter", "n", "no", "Ctrl-D", "corrected"],
)
def test_question_when_answered_then_run_does_so(keys: str, shows: str, reason: str) -> None:
    with run_in_terminal(ASKS) as terminal:
        terminal.until(rf"{epoch(1, 4)}{epoch(2, 4)}{QUESTION}\n.*\n.*waits for the answer")
        terminal.wait_until_keys_are_read()
        terminal.type(keys)
        terminal.until(reason)
        assert terminal.end() == 0
        assert re.search(rf"^{QUESTION} ?{shows}$", terminal.transcript, re.M)
        assert is_clean(terminal)


def test_question_when_answered_with_something_else_then_it_is_explained() -> None:
    with run_in_terminal(ASKS) as terminal:
        terminal.until(QUESTION)
        terminal.type("maybe")
        terminal.until(rf"{QUESTION} maybe")
        terminal.type("\r")
        terminal.until(rf"{QUESTION} maybe\n'maybe' is neither y nor n: .*\n{QUESTION}\n")
        terminal.type("n\r")
        terminal.until("prompt 2")
        assert terminal.end() == 0


@pytest.mark.parametrize("run", ["asyncio.run", "uvloop.run"])
def test_ctrl_c_when_at_the_question_then_interrupts_the_program(run: str) -> None:
    program = f"""
import uvloop
try:
    {run}(trainer().fit(4, continue_loop=2))
except KeyboardInterrupt:
    print("interrupted", threading.active_count())
"""
    with run_in_terminal(program) as terminal:
        terminal.until(QUESTION)
        terminal.type("\x03")
        terminal.until("interrupted 1")
        assert terminal.end() == 0
        assert is_clean(terminal)
        # The terminal is one that echoes and takes lines again.
        assert "\x1b[?2004h" not in terminal.raw.rpartition("\x1b[?2004l")[2]


@pytest.mark.parametrize(("default", "reason"), [(True, "completed 4"), (False, "prompt 2")])
def test_question_when_nobody_answers_in_time_then_the_default_is_taken(
    default: bool, reason: str
) -> None:
    program = f"""
async def main():
    result = await trainer().fit(4, continue_loop=2, continue_timeout=2, continue_default={default})
    print(result.stop_reason, result.epochs)

asyncio.run(main())
"""
    with run_in_terminal(program) as terminal:
        terminal.until(rf"\((yes|no) in [0-2] s\) {QUESTION}")
        terminal.until(reason)
        assert terminal.end() == 0
        word = "y" if default else "n"
        assert re.search(rf"{QUESTION} {word} \(no answer within 2 s\)", terminal.transcript)
        assert is_clean(terminal)


def test_question_when_two_ask_at_once_then_one_comes_after_the_other_while_a_third_trains() -> (
    None
):
    program = """
async def main():
    third = trainer("third", batches=100_000, hold=slowly())
    training = asyncio.create_task(third.fit(1))
    a, b = trainer("a"), trainer("b")
    results = await asyncio.gather(a.fit(2, continue_loop=1), b.fit(2, continue_loop=1))
    third.stop()
    await training
    print([result.stop_reason for result in results])

asyncio.run(main())
"""
    with run_in_terminal(program) as terminal:
        seen = terminal.until(
            rf"^[ab] {QUESTION}\n(?s:.*)third +1/1 +train +\d+/100000".replace("^", "(?m:^)")
        )
        first = re.search(rf"^([ab]) {QUESTION}", seen, re.M)
        assert first is not None
        assert len(re.findall(QUESTION, seen)) == 1
        done = re.search(r"third +1/1 +train +(\d+)/", seen)
        assert done is not None
        begun = int(done[1])
        terminal.until(
            lambda: int((re.search(r"third .*?(\d+)/1000", terminal.text) or [0, -1])[1]) > begun
        )
        terminal.type("n\r")
        other = "b" if first[1] == "a" else "a"
        terminal.until(rf"{first[1]} {QUESTION} n\n(?s:.*){other} {QUESTION}")
        terminal.type("y\r")
        terminal.until(r"\['(prompt', 'completed|completed', 'prompt)'\]")
        assert terminal.end() == 0
        assert is_clean(terminal)


def test_question_when_the_terminal_is_dumb_then_is_a_plain_line() -> None:
    with run_in_terminal(ASKS, env={"TERM": "dumb"}) as terminal:
        terminal.until(QUESTION)
        terminal.type("what\r")
        terminal.until(rf"'what' is neither(?s:.*){QUESTION}")
        terminal.type("n\r")
        terminal.until("prompt 2")
        assert terminal.end() == 0
        assert not re.search(CONTROL, terminal.raw)


def test_question_when_under_trio_then_is_refused_before_the_training_begins() -> None:
    program = """
import trio
from fitloop import ConfigurationError
try:
    trio.run(lambda: trainer().fit(4, continue_loop=2))
except ConfigurationError as error:
    print(error)
"""
    with run_in_terminal(program) as terminal:
        terminal.until("give on_continue=")
        assert terminal.end() == 0
        assert "[1/4]" not in terminal.transcript


def test_question_when_the_trainer_trains_on_then_a_no_takes_it_back() -> None:
    program = """
async def main():
    t = trainer(batches=50, hold=slowly())
    result = await t.fit(100, continue_loop=2, continue_while_asking=True)
    print(result.stop_reason, result.epochs, t.epoch_num, len(t.M.train["loss"][0]))

asyncio.run(main())
"""
    with run_in_terminal(program, size=(100, 40)) as terminal:
        terminal.until(rf"\[4/100\](?s:.*){QUESTION}\n.*epoch|\[4/100\](?s:.*){QUESTION}")
        terminal.type("n\r")
        terminal.until("went back to epoch 2")
        terminal.until("prompt 2 2 2")
        assert terminal.end() == 0
        assert is_clean(terminal)


def test_question_when_a_key_is_no_character_then_it_is_asked_again() -> None:
    with run_in_terminal(ASKS, env={"PYTHONIOENCODING": "ascii"}) as terminal:
        terminal.until(QUESTION)
        terminal.type("é\r")
        terminal.until(rf"is neither y nor n: .*\n{QUESTION}")
        terminal.type("n\r")
        terminal.until("prompt 2")
        assert terminal.end() == 0


def test_ctrl_c_when_the_loop_is_in_another_thread_then_interrupts_the_main_thread() -> None:
    program = """
loop = asyncio.new_event_loop()
task = loop.create_task(trainer().fit(4, continue_loop=2))

def run():
    try:
        loop.run_until_complete(task)
    except asyncio.CancelledError:
        print("cancelled")
    over.set()

over = threading.Event()
threading.Thread(target=run).start()
try:
    over.wait()
except KeyboardInterrupt:
    print("interrupted")
    loop.call_soon_threadsafe(task.cancel)
    over.wait()
"""
    with run_in_terminal(program) as terminal:
        terminal.until(QUESTION)
        terminal.type("\x03")
        terminal.until("interrupted")
        terminal.until("cancelled")
        assert terminal.end() == 0
        assert is_clean(terminal)


@pytest.mark.skipif(sys.platform != "linux", reason="starts worker processes by forking")
def test_print_when_in_a_worker_process_then_is_whole() -> None:
    program = """
class Talking(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        print("item", index, "of worker", torch.utils.data.get_worker_info().id, flush=True)
        return torch.randn(4), 1

loader = torch.utils.data.DataLoader(Talking(), batch_size=4, num_workers=2)
asyncio.run(trainer(hold=slowly(0.05)).fit(1, train_dl=loader))
"""
    with run_in_terminal(program, size=(100, 60)) as terminal:
        terminal.until("best score")
        assert terminal.end() == 0
        for index in range(16):
            line = rf"item {index} of worker {index // 4 % 2}"
            assert re.search(line, terminal.transcript), terminal.transcript


@pytest.mark.skipif(sys.platform != "linux", reason="starts worker processes by forking")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_print_when_two_worker_processes_write_parts_of_lines_then_each_line_is_whole(
    unbuffered: str,
) -> None:
    program = """
import multiprocessing

fork = multiprocessing.get_context("fork")
begun, between = fork.Event(), fork.Event()

def slow():
    print("a line ", end="", flush=True)
    begun.set()
    between.wait()
    print("in parts", flush=True)
    print("one without an end", end="")

def quick():
    begun.wait()
    print("one between", flush=True)
    between.set()

def hold(state):
    if state.is_train and state.batch_num == 2:
        workers = [fork.Process(target=target) for target in (slow, quick)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print("the next one")

asyncio.run(trainer(hold=hold).fit(1))
"""
    with run_in_terminal(program, size=(100, 60), env={"PYTHONUNBUFFERED": unbuffered}) as terminal:
        terminal.until("best score")
        assert terminal.end() == 0
        for line in ("a line in parts", "one between", "one without an end", "the next one"):
            assert f"{line}\n" in terminal.transcript, terminal.transcript
