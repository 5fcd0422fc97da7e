"""Callbacks: code that reacts to the events of a training."""

from fitloop.callbacks.live_plot import live_plot

__all__ = ["live_plot"]
