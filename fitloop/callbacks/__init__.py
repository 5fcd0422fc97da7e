"""Callbacks: objects that react to the events of a training.

Owns the type `Callback`, and the callbacks that fitloop provides, each in a module of its own. Must
not know how a run is made, or which thread it uses.

- `callback`: `Callback`, with an example.
- `plotting`: `live_plot`, plots of the metrics that are redrawn while training goes on.
"""

from typing import TYPE_CHECKING, Any

from fitloop.callbacks.callback import Callback

if TYPE_CHECKING:
    from fitloop.callbacks.plotting import live_plot

__all__ = ["Callback", "live_plot"]


def __getattr__(name: str) -> Any:
    """Import `live_plot` when it is used: most trainings draw nothing."""
    if name != "live_plot":
        raise AttributeError(f"module 'fitloop.callbacks' has no attribute {name!r}")
    from fitloop.callbacks.plotting import live_plot

    return live_plot
