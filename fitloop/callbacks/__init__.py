"""Callbacks: objects that react to the events of a training.

Owns the type `Callback`, and the callbacks that fitloop provides, each in a module of its own. Must
not know how a run is made, or which thread it uses.

- `callback`: `Callback`, with an example.
- `plotting`: `live_plot`, plots of the metrics that are redrawn while training goes on.
"""

from fitloop.callbacks.callback import Callback
from fitloop.callbacks.plotting import live_plot

__all__ = ["Callback", "live_plot"]
