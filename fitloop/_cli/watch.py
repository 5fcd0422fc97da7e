"""``fitloop watch``: the runs of other processes, on this terminal, while they go on.

Owns which directories are followed and what is told of a run that began, ended or died before it
was looked at. How a run looks is `_progress`'s and `_status`'s, as in the process that trains.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fitloop._cli.common import Commands, add_command, labels, run_directories, say
from fitloop._display.progress import PROGRESS_VIEW, EpochPrinter
from fitloop._display.status import RunStatus
from fitloop._errors import CheckpointError, ConfigurationError
from fitloop._events import EpochEnded, EpochStarted, Event, RunEnded, RunStarted
from fitloop._format import format_duration
from fitloop._storage.durable import is_locked
from fitloop._storage.log_follower import LogFollower, TimedEvent
from fitloop._types import StopReason

POLL_SECONDS = 0.2
"""Between two looks at the files, as ``tail -f`` does: no notice of a change reaches another
process on every system and file system, and a look is one ``stat`` of a file."""
SEARCH_SECONDS = 1.0
"""between two looks for new directories"""
SILENT_SECONDS = 3.0
"""with nothing new, after which it is asked whether a run is still there"""
LINGER_SECONDS = 1.0
"""after the end of a run, for one that the same script begins then"""

Clock = Callable[[], float]


class WatchedRun:
    """The runs of one directory, one after the other, as they are told of here."""

    def __init__(self, directory: Path, label: str, *, named: bool, every: int) -> None:
        self._directory = directory
        self._label = label
        self._named = named
        self._every = every
        self._follower = LogFollower(directory)
        self._status: RunStatus | None = None
        self._lines: EpochPrinter | None = None
        self._heard = 0.0
        self._asked = 0.0

    def look(self, since: float) -> None:
        """Tell what is new; of a run from before ``since`` only where it is."""
        told = self._follower.poll()
        if told and isinstance(told[0].event, RunStarted) and told[0].at < since:
            self._catch_up(told)
        else:
            for each in told:
                self._tell(*each)
        if told:
            self._heard = min(told[-1].at, time.time())
        elif self._status is not None and self._is_silent() and self._is_dead():
            self._tell_death()

    def is_over(self, now: float) -> bool:
        """Whether there is no run, and has not been for a while."""
        return self._status is None and now - self._heard >= LINGER_SECONDS

    def close(self) -> None:
        """Take what is shown off the terminal."""
        self._follower.close()
        if self._status is not None:
            PROGRESS_VIEW.hide(self._status, wait=True)
            PROGRESS_VIEW.remove(self._status)
        self._status = self._lines = None

    # -- a run that is watched from its beginning --------------------------------------------------

    def _tell(self, event: Event, at: float) -> None:
        if isinstance(event, RunStarted):
            self._begin(event, at)
            return
        if self._status is None or self._lines is None:
            return  # it was told to be dead
        self._status.observe(event, _here(at))
        if not isinstance(event, RunEnded):
            self._lines.observe(event)
            return
        PROGRESS_VIEW.hide(self._status, wait=True)
        if event.error is not None or event.stop_reason == StopReason.CANCELLED:
            say(self._line(_ending(event, self._status)))  # which the process has no line for
        else:
            self._lines.observe(event)
        self._leave()

    def _begin(self, event: RunStarted, at: float, *, draw: bool = True) -> RunStatus:
        self._leave()  # one whose end was never told: the next one took its place
        self._status = PROGRESS_VIEW.add(self._label, named=self._named)
        self._lines = EpochPrinter(self._status, every=self._every)
        for observer in (self._status, self._lines):
            observer.observe(event)
        self._status.began = _here(at)
        self._status.epochs_done = before = (
            0 if self._follower.run is None else (self._follower.run.epochs_done)
        )
        if draw:
            if before:
                say(self._line(f"{event.call} goes on after {before} of {event.epochs} epochs"))
            PROGRESS_VIEW.show(self._status)
        return self._status

    def _leave(self) -> None:
        if self._status is not None:
            PROGRESS_VIEW.hide(self._status, wait=True)
            PROGRESS_VIEW.remove(self._status)
        self._status = self._lines = None

    # -- one that began before ---------------------------------------------------------------------

    def _catch_up(self, told: Sequence[TimedEvent]) -> None:
        """Take note of all that was, and print where it is: one line, and the last epoch's."""
        first, *rest = told
        assert isinstance(first.event, RunStarted)
        status = self._begin(first.event, first.at, draw=False)
        assert self._lines is not None
        begun: list[Event] = []
        epoch: list[Event] = []
        for event, at in rest:
            status.observe(event, _here(at))
            if isinstance(event, EpochStarted):
                self._lines.observe(event)  # for its number; prints nothing
                begun = [event]
            elif isinstance(event, EpochEnded):
                epoch = [*begun, event]
        last = told[-1]
        if isinstance(last.event, RunEnded):
            metrics = f", {status.metrics}" if status.call == "test" and status.metrics else ""
            say(self._line(_ending(last.event, status) + metrics))
            self._leave()
            return
        if self._is_dead():
            self._tell_death()
            return
        if self._status is None:  # it has just ended
            return
        done = f"{status.epochs_done} of {status.epochs} epochs done"
        of = done if status.call == "fit" else "going on"
        say(self._line(f"{status.call}, {of}, began {format_duration(time.time() - first.at)} ago"))
        if epoch and self._every:
            lines = EpochPrinter(status)
            for event in (first.event, *epoch):
                lines.observe(event)
        PROGRESS_VIEW.show(status)

    # -- one that ends without a word --------------------------------------------------------------

    def _is_silent(self) -> bool:
        now = time.time()
        return now - max(self._heard, self._asked) >= SILENT_SECONDS

    def _is_dead(self) -> bool:
        """Return whether the run is not there any more, though its log does not say so.

        A run has the lock of its directory from before its log begins until after it ends, and
        the lock goes with its process. Where locks cannot be told from here, nothing is dead.
        """
        self._asked = time.time()
        if is_locked(self._directory) is not False:
            return False
        told = self._follower.poll()  # what it wrote before it let the lock go
        for each in told:
            self._tell(*each)
        return self._status is not None and not told

    def _tell_death(self) -> None:
        status = self._status
        assert status is not None
        PROGRESS_VIEW.hide(status, wait=True)
        done = f" after {status.epochs_done} of {status.epochs} epochs" * (status.call == "fit")
        why = "its process died or could not write"
        say(self._line(f"{status.call} is no longer running{done}: {why}"))
        self._leave()
        self._follower.close()

    def _line(self, text: str) -> str:
        return f"{self._label}: {text}" if self._named or PROGRESS_VIEW.has_several else text


def _here(at: float) -> float:
    """Return a time of another process by this one's monotonic clock; none is yet to come."""
    return time.monotonic() - max(0.0, time.time() - at)


def _ending(event: RunEnded, status: RunStatus) -> str:
    text = f"{event.call} {event.stop_reason}"
    if event.call == "fit":
        text += f" after {event.epochs} of {status.epochs} epochs"
    text += f" in {format_duration(event.seconds)}"
    if event.best_score is not None and event.call == "fit":
        text += f", best score {event.best_score:.4f} in epoch {event.best_epoch}"
    return text if event.error is None else f"{text}: {event.error}"


class Watch:
    """Follows the runs in some directories, and in those right in them."""

    def __init__(
        self, paths: Sequence[Path], *, every: int, forever: bool, clock: Clock = time.time
    ) -> None:
        self._paths = paths
        self._names = labels(paths)
        self._every = every
        self._forever = forever
        self._clock = clock
        self._began = clock()
        self._runs: dict[str, WatchedRun] = {}
        """by the real path of the directory"""
        self._found: set[Path] = set()
        self._waits_for: set[Path] = set()
        self._unreadable: set[str] = set()
        self._searched = 0.0

    def run(self) -> int:
        """Return when all runs have ended and every directory had one; leaves nothing behind.

        Returns the exit status: 1 if there was a log that cannot be read.
        """
        try:
            while True:
                self._search()
                self._look()
                now = self._clock()
                over = all(run.is_over(now) for run in self._runs.values())
                if over and not self._waits_for and not self._forever:
                    return 1 if self._unreadable else 0
                time.sleep(POLL_SECONDS)
        finally:
            for run in self._runs.values():
                run.close()

    def _look(self) -> None:
        for directory, run in list(self._runs.items()):
            try:
                run.look(self._began)
            except CheckpointError as error:  # the others go on
                run.close()
                del self._runs[directory]
                self._unreadable.add(directory)
                print(f"fitloop: {error}", file=sys.stderr, flush=True)  # noqa: T201

    def _search(self) -> None:
        """Find the runs that there are by now."""
        now = time.monotonic()
        if self._searched and now - self._searched < SEARCH_SECONDS and not self._waits_for:
            return
        self._searched = now
        found = {path: run_directories(path) for path in self._paths}
        several = sum(map(len, found.values())) > 1 or len(self._paths) > 1
        for path, name in zip(self._paths, self._names, strict=True):
            for directory in found[path]:
                self._add(directory, name, path, named=several or directory != path)
            if found[path]:
                self._found.add(path)
                self._waits_for.discard(path)
            elif path not in self._waits_for | self._found:
                self._waits_for.add(path)
                there = "" if path.is_dir() else ", a directory that is not there yet"
                say(f"waiting for a run in {path}{there}")

    def _add(self, directory: Path, name: str, path: Path, *, named: bool) -> None:
        real = os.path.realpath(directory)  # it may be given twice, in two ways
        if real in self._runs or real in self._unreadable:
            return
        label = name
        if directory != path:
            own = labels([directory])[0]
            label = own if len(self._paths) == 1 else f"{name}/{own}"
        self._runs[real] = WatchedRun(directory, label, named=named, every=self._every)


# -- the command -------------------------------------------------------------------------------

_ABOUT = """\
Follow runs of other processes as they go: how far they are, and a line for every epoch.

A run can be followed if it keeps a log: one with snapshots (fit(checkpoint=...)) or with
save_to_disk=True. Give its save_path, now or before the run begins; or a directory with many,
to follow them all, those that come later too. Nothing is asked of the process that trains: it
reads the files only, so it may be on any machine that sees them.

Ends when all runs have ended. Ctrl-C stops watching; the runs go on. When the output is no
terminal, it is plain lines."""

_EXAMPLES = """\
  fitloop watch runs/a                 one run; one that has not begun is waited for
  fitloop watch runs                   all runs in runs/, side by side
  fitloop watch runs/a runs/b --every 10
  fitloop watch runs --forever | tee log.txt"""


def add_watch(commands: Commands) -> None:
    """Add the command ``watch``."""
    does = "follow runs live from another terminal"
    parser = add_command(commands, "watch", does, _ABOUT, _EXAMPLES, _watch)
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="RUN_DIR", help="a save_path, or many in one"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="print the first epoch and every N-th; 0 for none (default 1)",
    )
    parser.add_argument(
        "--forever", action="store_true", help="wait for more when all runs have ended"
    )


def _watch(given: argparse.Namespace) -> int:
    if given.every < 0:
        raise ConfigurationError(f"--every is {given.every}; expected 0 or more epochs")
    for path in given.directories:
        if path.exists() and not path.is_dir():
            raise ConfigurationError(
                f"{path} is a file; expected a directory: the save_path of a run, or one with "
                "such directories in it"
            )
    paths = list(dict.fromkeys(given.directories))
    return Watch(paths, every=given.every, forever=given.forever).run()
