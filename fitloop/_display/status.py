"""The progress of one run, as events tell it. Times are in seconds of `time.monotonic`."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

from fitloop._events import (
    BatchProgress,
    BestImproved,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
    PromptAnswered,
    PromptAsked,
    RunEnded,
    RunStarted,
    SnapshotWritten,
    WentBack,
)
from fitloop._format import (
    best_words,
    epoch_words,
    format_duration,
    format_metrics,
    format_number,
    format_rates,
    format_time_left,
    printable,
)

RATE_SECONDS = 3.0
"""time window of the batch rate"""


class RunStatus:
    """Progress of one run: an observer. Other threads may read it at any time.

    Args:
        label: name of the run on the screen.
        named: whether to show the label even if no other run is visible.
    """

    def __init__(self, label: str, *, named: bool = False) -> None:
        self.label = label
        self.named = named
        self.call = ""
        self.epochs = 0
        self.epochs_done = 0
        self.epoch_in_run = 0
        self.first_epoch = 1
        """number of the first epoch of the run over all fits of the trainer"""
        self.phase = ""
        self.batches: tuple[int, int | None] = (0, None)
        """completed batches of the phase, and their total; None if unknown"""
        self.last_phase: tuple[str, Mapping[str, float]] = ("", {})
        """the phase that ended last, and its metrics"""
        self.running: Mapping[str, float] = {}
        """means over the batches of the phase so far"""
        self.learning_rates: Mapping[str, float] = {}
        self.criteria = ""
        """name of the metric that compares epochs, once it is known"""
        self.best: tuple[int, float] | None = None
        """epoch over all fits, and score, of the best validation of this run"""
        self.snapshot: tuple[int, int] | None = None
        """epoch over all fits, and batch, of the last snapshot of the run; batch 0 is the end of
        the epoch"""
        self.is_asking = False
        """the run waits for the answer to a question"""
        self.start_time = self._epoch_start = self._phase_start = time.monotonic()
        self._epoch_seconds: float | None = None
        """duration of the last epoch"""
        self._recent: deque[tuple[float, int]] = deque()
        """(seconds since the phase started, batches done) in the last `RATE_SECONDS`"""
        self.display_metrics: Sequence[str] | None = None
        """names of the metrics to show; None for all"""

    def observe(self, event: Event, now: float | None = None) -> None:
        """Update the status from an event that happened at ``now``."""
        now = time.monotonic() if now is None else now
        match event:
            case RunStarted():
                self.call, self.epochs, self.start_time = event.call, event.epochs, now
                self.first_epoch = event.first_epoch
            case EpochStarted():
                self.epochs, self.epoch_in_run = event.epochs, event.epoch_in_run
                self.first_epoch = event.epoch - event.epoch_in_run + 1
                self.epochs_done, self._epoch_start = event.epoch_in_run - 1, now
                self.is_asking = False
            case PhaseStarted():
                self.phase, self.batches = str(event.phase), (0, event.batches)
                self._phase_start, self.running = now, {}
                self._recent = deque([(0.0, 0)])
            case BatchProgress():
                self._observe_progress(event)
            case PhaseEnded():
                self.batches, self.running = (event.batches, self.batches[1]), {}
                self.last_phase = str(event.phase), event.metrics
            case BestImproved():
                self.criteria, self.best = event.criteria, (event.epoch, event.score)
            case WentBack() if self.best is not None and self.best[0] > event.epoch:
                self.best = None
            case EpochEnded():
                self.epochs_done, self._epoch_seconds = event.epoch_in_run, event.seconds
                self.learning_rates = event.learning_rates or self.learning_rates
            case SnapshotWritten():
                self.snapshot = event.epoch, event.batch
            case PromptAsked() | PromptAnswered():
                self.is_asking = isinstance(event, PromptAsked)

    def _observe_progress(self, event: BatchProgress) -> None:
        self.phase, self.batches = str(event.phase), (event.batch, event.batches)
        self.running = event.metrics or self.running
        self.learning_rates = event.learning_rates or self.learning_rates
        recent = self._recent
        recent.append((event.seconds, event.batch))
        while len(recent) > 2 and event.seconds - recent[0][0] > RATE_SECONDS:
            recent.popleft()

    # -- numbers -----------------------------------------------------------------------------------

    @property
    def rate(self) -> float | None:
        """Recent batches per second; None if there were too few."""
        recent = self._recent  # `observe` may replace it, but never empties it
        if len(recent) < 2:
            return None
        (start, first), (end, last) = recent[0], recent[-1]
        return (last - first) / (end - start) if end > start else None

    @property
    def fraction(self) -> float | None:
        """Completed part of the phase, 0 to 1; None if its length is unknown."""
        done, total = self.batches
        return min(1.0, done / total) if total else None

    def seconds_left(self, now: float) -> float | None:
        """Return an estimate of the remaining time, from the last epoch or the current phase.

        None if there is no estimate yet. In the first epoch, validation is not included.
        """
        epochs_left = max(0, self.epochs - self.epoch_in_run)
        if self.epochs_done >= self.epoch_in_run:  # between two epochs
            return None if self._epoch_seconds is None else epochs_left * self._epoch_seconds
        in_epoch = now - self._epoch_start
        if self._epoch_seconds is not None:
            return max(0.0, self._epoch_seconds - in_epoch) + epochs_left * self._epoch_seconds
        in_phase, fraction = now - self._phase_start, self.fraction
        if not fraction:
            return None
        phase = in_phase / fraction
        return phase - in_phase + epochs_left * (phase + self._phase_start - self._epoch_start)

    # -- words -------------------------------------------------------------------------------------

    @property
    def epoch_count(self) -> str:
        """The present epoch of the run, or the last one, and their total, such as ``3/10``."""
        present = max(self.epoch_in_run, self.epochs_done)  # a resumed one has not started another
        return f"{present:>{len(str(self.epochs))}}/{self.epochs}"

    @property
    def batch_count(self) -> str:
        """Completed batches of the phase, and their total if it is known, such as ``12/40``."""
        done, total = self.batches
        return f"{done}" if total is None else f"{done}/{total}"

    @property
    def ended_text(self) -> str:
        """The metrics of the phase that ended last: ``valid loss: 0.3796 | accuracy: 0.8583``."""
        phase, metrics = self.last_phase
        return f"{phase} {format_metrics(metrics, self.display_metrics)}" if phase else ""

    def metric_texts(self) -> dict[str, str]:
        """Return metrics by name: ``loss 0.5280``, with the loss first.

        They are the running means of the phase, or the metrics of the phase that ended last, as
        ``valid loss 0.3796``, until there are any.
        """
        phase, metrics = ("", self.running) if self.running else self.last_phase
        names = self.display_metrics
        chosen = metrics if names is None else [name for name in names if name in metrics]
        head = f"{phase} " if phase else ""
        return {
            name: f"{head}{name} {format_number(metrics[name])}"
            for name in sorted(chosen, key=lambda name: name != "loss" and names is None)
        }

    @property
    def rate_text(self) -> str:
        """Batches per second, such as ``202/s``; empty if not known."""
        rate = self.rate
        if rate is None:
            return ""
        return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"

    @property
    def learning_rate_text(self) -> str:
        """The learning rates, such as ``lr 0.001``; empty if not known."""
        return f"lr {format_rates(self.learning_rates)}" if self.learning_rates else ""

    def time_left_text(self, now: float) -> str:
        """Return the remaining time, such as ``2 min left``; empty if there is no estimate."""
        seconds = self.seconds_left(now)
        return "" if seconds is None else f"{format_time_left(seconds)} left"

    def times_text(self, now: float) -> str:
        """Return the elapsed and the remaining time, such as ``45 s, 2 min left``."""
        elapsed = format_duration(max(1, int(now - self.start_time)))
        left = self.time_left_text(now)
        return f"{elapsed}, {left}" if left else elapsed

    def best_text(self, epoch: int, score: float) -> str:
        """Return the best score and its epoch: ``best accuracy 0.8713 in epoch 3``."""
        return best_words(self.criteria, score, epoch, self.first_epoch)

    def cancelled_text(self, event: RunEnded, *, short: bool = False) -> str:
        """Return where a cancelled run ended, which weights the model has, and how to go on.

        The ``short`` text, for one of several runs, leaves out how to go on.
        """
        where = "before the first epoch"
        if self.epoch_in_run:
            is_between = self.epochs_done >= self.epoch_in_run
            where = f"{'after' if is_between else 'in'} epoch {self.epoch_in_run} of {self.epochs}"
        after = "" if short else f", {format_duration(event.seconds)} after the start"
        parts = [f"cancelled {where}{after}"]
        best = best_of(event)
        if event.restored_epoch is not None and best is not None:
            name = f"{printable(self.criteria) or 'score'} {format_number(best[1])}"
            words = f"of {epoch_words(event.restored_epoch, self.first_epoch)} ({name})"
            parts.append(
                f"best weights {words}" if short else f"the model has the best weights, {words}"
            )
        if self.snapshot is not None and not short:
            # A run that is cancelled while it waits for its loader takes no last snapshot.
            epoch, batch = self.snapshot
            place = f"epoch {epoch - self.first_epoch + 1}"
            place = f"after {place}" if batch == 0 else f"in {place} after batch {batch}"
            parts.append(f"fit(..., resume=True) goes on {place}")
        return "; ".join(parts)


def best_of(event: RunEnded) -> tuple[int, float] | None:
    """Return the best epoch and its score at the end of a run; None if there is no best score."""
    score, epoch = event.best_score, event.best_epoch
    return None if score is None or epoch is None or math.isnan(score) else (epoch, score)
