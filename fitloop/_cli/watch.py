"""``fitloop watch``: shows runs of other processes on this terminal while they train.

Owns the list of watched directories, and the lines about runs that started, ended or died before
the command looked at them. `fitloop._display` shows a run as it does in the process that trains.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fitloop._arguments import expect
from fitloop._cli.common import print_line, run_directories, short_names
from fitloop._display.printed import EpochPrinter
from fitloop._display.progress import PROGRESS_VIEW
from fitloop._display.status import RunStatus, best_of
from fitloop._errors import CheckpointError, ConfigurationError
from fitloop._events import BestImproved, EpochEnded, EpochStarted, Event, RunEnded, RunStarted
from fitloop._format import format_duration
from fitloop._storage.durable import is_locked
from fitloop._storage.log_follower import LogFollower, TimedEvent
from fitloop._types import StopReason

POLL_SECONDS = 0.2
"""time between two reads of the logs, as in ``tail -f``: no notice of a change reaches another
process on every system and file system, and a read without news is one ``stat`` of a file"""
SEARCH_SECONDS = 1.0
"""time between two searches for new directories"""
SILENT_SECONDS = 3.0
"""time without new events after which the command checks whether the process is still alive"""
LINGER_SECONDS = 1.0
"""time to wait after the end of a run, since the same script may start another one"""

ABOUT = """\
Follow runs of other processes as they train: their progress, and a line for every epoch.

A run can be followed if it keeps a log: one with snapshots (fit(checkpoint=...)) or with
save_to_disk=True. Give its save_path, before or after the run starts; or a directory with many
runs, to follow them all and those that start later. The command only reads files and asks nothing
of the process that trains, so it may run on any machine that sees the files.

Ends when all runs have ended. Ctrl-C stops watching; the runs go on. If the output is not a
terminal, it is plain lines."""

EXAMPLES = """\
  fitloop watch runs/a                 one run; waits for it if it has not started
  fitloop watch runs                   all runs in runs/, side by side
  fitloop watch runs/a runs/b --every 10
  fitloop watch runs --forever | tee log.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="the save_path of a run, or a directory with several",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="print the first epoch and every N-th; 0 for none (default 1)",
    )
    parser.add_argument(
        "--forever", action="store_true", help="wait for more runs when all have ended"
    )


def run(options: argparse.Namespace) -> int:
    """Watch until all runs have ended; return the exit status."""
    expect(options.every >= 0, "--every", options.every, "0 or more epochs")
    for path in options.directories:
        if path.exists() and not path.is_dir():
            raise ConfigurationError(
                f"{path} is a file; expected a directory: the save_path of a run, or one with "
                "such directories in it"
            )
    paths = list(dict.fromkeys(options.directories))
    return Watcher(paths, every=options.every, forever=options.forever).run()


class Watcher:
    """Watches the runs in some directories, and in their direct subdirectories."""

    def __init__(self, paths: Sequence[Path], *, every: int, forever: bool) -> None:
        self._paths = dict(zip(paths, short_names(paths), strict=True))
        """each given path with its short name"""
        self._every = every
        self._forever = forever
        self._start_time = time.time()
        self._runs: dict[str, WatchedDirectory] = {}
        """by the real path of the directory, since it may be given twice, in two ways"""
        self._has_run: dict[Path, bool] = {}
        """each given path that was looked at: whether it has had a run"""
        self._unreadable: set[str] = set()
        self._searched_at = -SEARCH_SECONDS

    def run(self) -> int:
        """Return when all runs have ended and every path had one, with the terminal as before.

        Returns the exit status: 1 if there was a log that cannot be read.
        """
        try:
            while True:
                self._search()
                self._poll()
                now = time.time()
                over = all(directory.is_over(now) for directory in self._runs.values())
                if over and all(self._has_run.values()) and not self._forever:
                    return 1 if self._unreadable else 0
                time.sleep(POLL_SECONDS)
        finally:
            for directory in self._runs.values():
                directory.close()

    def _poll(self) -> None:
        for real_path, directory in list(self._runs.items()):
            try:
                directory.poll(self._start_time)
            except CheckpointError as error:  # the other runs go on
                directory.close()
                del self._runs[real_path]
                self._unreadable.add(real_path)
                print(f"fitloop: {error}", file=sys.stderr, flush=True)  # noqa: T201

    def _search(self) -> None:
        """Find new directories with a log."""
        now = time.monotonic()
        if all(self._has_run.values()) and now - self._searched_at < SEARCH_SECONDS:
            return
        self._searched_at = now
        directories = {path: run_directories(path) for path in self._paths}
        several = sum(map(len, directories.values())) > 1 or len(self._paths) > 1
        for path, name in self._paths.items():
            for directory in directories[path]:
                self._add(directory, name, path, named=several or directory != path)
            if directories[path]:
                self._has_run[path] = True
            elif path not in self._has_run:
                self._has_run[path] = False
                missing = "" if path.is_dir() else ", a directory that is not there yet"
                print_line(f"waiting for a run in {path}{missing}")

    def _add(self, directory: Path, name: str, path: Path, *, named: bool) -> None:
        real_path = os.path.realpath(directory)
        if real_path in self._runs or real_path in self._unreadable:
            return
        label = name
        if directory != path:
            inner = short_names([directory])[0]
            label = inner if len(self._paths) == 1 else f"{name}/{inner}"
        self._runs[real_path] = WatchedDirectory(directory, label, named=named, every=self._every)


class WatchedDirectory:
    """Shows the runs of one directory, one after the other.

    Args:
        directory: the ``save_path`` of the trainer.
        label: the name of its runs on the screen.
        named: whether each line begins with the label.
        every: epochs between two that are printed; 0 for none.
    """

    def __init__(self, directory: Path, label: str, *, named: bool, every: int) -> None:
        self._directory = directory
        self._label = label
        self._named = named
        self._every = every
        self._follower = LogFollower(directory)
        self._status: RunStatus | None = None
        """of the current run; None between runs"""
        self._printer: EpochPrinter | None = None
        self._last_event_at = 0.0
        self._checked_at = 0.0

    def poll(self, start_time: float) -> None:
        """Show new events; sum up those of a run that started before ``start_time``."""
        events = self._follower.poll()
        if events and isinstance(events[0].event, RunStarted) and events[0].at < start_time:
            self._catch_up(events)
        else:
            for timed in events:
                self._show(*timed)
        if events:
            self._last_event_at = min(events[-1].at, time.time())
        elif self._status is not None and self._is_silent() and self._is_dead():
            self._report_death()

    def is_over(self, now: float) -> bool:
        """Whether there is no run, and there has been none for a while."""
        return self._status is None and now - self._last_event_at >= LINGER_SECONDS

    def close(self) -> None:
        """Remove the run from the screen and close its log."""
        self._follower.close()
        self._end_run()

    # -- a run that starts while it is watched ---------------------------------------------------

    def _show(self, event: Event, at: float) -> None:
        if isinstance(event, RunStarted):
            self._start_run(event, at)
            return
        if self._status is None or self._printer is None:
            return  # it was reported as dead
        self._status.observe(event, _monotonic(at))
        if not isinstance(event, RunEnded):
            self._printer.observe(event)
            return
        PROGRESS_VIEW.hide(self._status, wait=True)
        if event.error is not None or event.stop_reason == StopReason.CANCELLED:
            self._print(_summary(event, self._status))  # the printer has no line for these
        else:
            self._printer.observe(event)
        self._end_run()

    def _start_run(self, event: RunStarted, at: float, *, visible: bool = True) -> RunStatus:
        self._end_run()  # a run whose end is not in the log, since the next one replaced it
        self._status = status = PROGRESS_VIEW.add(self._label, named=self._named)
        self._printer = EpochPrinter(status, PROGRESS_VIEW.printing, every=self._every, color=True)
        status.observe(event, _monotonic(at))
        self._printer.observe(event)
        resumed = self._follower.run
        status.epochs_done = 0 if resumed is None else resumed.epochs_done
        if visible:
            if status.epochs_done:
                done = f"{status.epochs_done} of {event.epochs} epochs"
                self._print(f"{event.call} goes on after {done}")
            PROGRESS_VIEW.show(status)
        return status

    def _end_run(self) -> None:
        if self._status is not None:
            PROGRESS_VIEW.hide(self._status, wait=True)
            PROGRESS_VIEW.remove(self._status)
        self._status = self._printer = None

    # -- a run that started before ---------------------------------------------------------------

    def _catch_up(self, events: Sequence[TimedEvent]) -> None:
        """Read all past events, and print where the run is: one line, and its last epoch."""
        first, *later = events
        assert isinstance(first.event, RunStarted)
        status = self._start_run(first.event, first.at, visible=False)
        assert self._printer is not None
        epoch_started: list[Event] = []
        last_epoch: list[Event] = []
        for event, at in later:
            status.observe(event, _monotonic(at))
            if isinstance(event, EpochStarted):
                self._printer.observe(event)  # keeps its number; prints nothing
                epoch_started = [event]
            elif isinstance(event, BestImproved):
                epoch_started.append(event)
            elif isinstance(event, EpochEnded):
                last_epoch = [*epoch_started, event]
        last = events[-1]
        if isinstance(last.event, RunEnded):
            metrics = f", {status.ended_text}" if status.ended_text else ""
            self._print(_summary(last.event, status) + metrics * (status.call == "test"))
            self._end_run()
            return
        if self._is_dead():
            self._report_death()
            return
        if self._status is None:  # it ended during the check
            return
        done = f"{status.epochs_done} of {status.epochs} epochs done"
        progress = done if status.call == "fit" else "going on"
        self._print(
            f"{status.call}, {progress}, began {format_duration(time.time() - first.at)} ago"
        )
        if last_epoch and self._every:
            printer = EpochPrinter(status, PROGRESS_VIEW.printing, color=True)
            for event in (first.event, *last_epoch):
                printer.observe(event)
        PROGRESS_VIEW.show(status)

    # -- a run whose process died ------------------------------------------------------------------

    def _is_silent(self) -> bool:
        return time.time() - max(self._last_event_at, self._checked_at) >= SILENT_SECONDS

    def _is_dead(self) -> bool:
        """Return whether the process of the run has gone without writing an end to the log.

        A run holds the lock of its directory from before its log begins until after it ends, and
        the lock goes with its process. If locks cannot be tested from here, no run is dead.
        """
        self._checked_at = time.time()
        if is_locked(self._directory) is not False:
            return False
        events = self._follower.poll()  # written before the lock was released
        for timed in events:
            self._show(*timed)
        return self._status is not None and not events

    def _report_death(self) -> None:
        status = self._status
        assert status is not None
        PROGRESS_VIEW.hide(status, wait=True)
        done = f" after {status.epochs_done} of {status.epochs} epochs" * (status.call == "fit")
        why = "its process died or could not write"
        self._print(f"{status.call} is no longer running{done}: {why}")
        self.close()

    def _print(self, text: str) -> None:
        named = self._named or PROGRESS_VIEW.has_several
        print_line(f"{self._label}: {text}" if named else text)


def _monotonic(at: float) -> float:
    """Return a wall time of another process on this process's monotonic clock, never in future."""
    return time.monotonic() - max(0.0, time.time() - at)


def _summary(event: RunEnded, status: RunStatus) -> str:
    text = f"{event.call} {event.stop_reason}"
    if event.call == "fit":
        text += f" after {event.epochs} of {status.epochs} epochs"
    text += f" in {format_duration(event.seconds)}"
    best = best_of(event)
    if best is not None and event.call == "fit":
        text += f", {status.best_text(*best)}"
    return text if event.error is None else f"{text}: {event.error}"
