"""Plots of metrics with matplotlib.

Owns the selection of values, their style and the drawing. Knows arrays; must not know runs, events
or files.

- `selection`: the values of a plot, from recorded metrics.
- `style`: colors, line styles and labels.
- `downsampling`: extreme values and running mean of a long series.
- `draw`: the plots.
"""
