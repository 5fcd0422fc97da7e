"""`Callback`: the type of an object that reacts to the events of a training."""

from __future__ import annotations

from typing import Protocol

from fitloop._events import AnyEvent
from fitloop._public import public


@public
class Callback(Protocol):
    """A function or object that is called with every event of a run, such as a logger.

    For example, a callback that writes the metrics of each epoch as a line of JSON::

        import json

        from fitloop import AnyEvent

        class EpochLogger:
            def __init__(self, path: str) -> None:
                self.path = path

            def __call__(self, event: AnyEvent) -> None:
                if event.kind == "epoch_ended" and event.call == "fit":
                    with open(self.path, "a") as file:
                        print(json.dumps(event.as_dict()), file=file)

    ``FitLoop(..., callbacks=[EpochLogger("epochs.jsonl")])`` calls it in all runs of a trainer,
    ``fit(callbacks=[...])`` in one run, ``Runner(callbacks=[...])`` in all runs of its jobs. A
    callback that is given to several trainers may be called from several threads at once.

    A callback of a trainer is also called by ``test``, whose `EpochEnded` has no
    ``event.metrics["valid"]``: look at ``event.call`` first. ``event`` may also be annotated as
    `Event`, the base of all.

    There are two kinds, which differ in where they run:

    - A plain callable is called on the thread that trains, between two batches, and training waits
      until it returns. Callbacks are called in the order of the list, after the trainer itself has
      recorded the event: ``trainer.M`` and ``trainer.best_score`` are up to date. If it returns an
      awaitable, as a lambda around an ``async def`` does, the event loop awaits that, and training
      waits for it too.
    - An ``async def`` callable is awaited on the event loop of ``fit``, with one event after the
      other in their order. Training never waits for a slow one: events wait in a queue, where a
      newer `BatchProgress` replaces an older one. ``fit`` returns when the queue is empty.

    To end the run, call ``trainer.stop()``. The run ends at the next batch boundary; a plain
    callback that stops it at the end of an epoch prevents the next epoch.

    An exception from a callback ends the run as failed, and ``fit`` raises the same exception
    object with notes that name the callback, the event and the trainer.

    A method ``before_snapshot()`` of a callback is called before a snapshot of the run is written,
    on another thread, and the snapshot waits for it. A callback that passes events on elsewhere can
    return from it when all events so far are safe, so that none is missing if the training is
    killed and resumed. An exception is one of the writing, see `Checkpoint`.

    A cancellation does not interrupt a plain callback, and every plain callback gets the `RunEnded`
    of the cancelled run. A plain callback that hangs holds up the end of its run without a limit,
    like a step, since it may be using the model: give what it waits for a time limit, or make it
    ``async def``. An ``async def`` callback is cancelled in its present ``await``; later events do
    not reach it.
    """

    def __call__(self, event: AnyEvent, /) -> object:
        """Handle ``event``; the result is ignored, unless it is an awaitable: that is awaited."""
