"""Drawing of metrics with matplotlib.

Owns the choice of values, their style and the drawing. Knows arrays; must not know runs, events
or files.

- `selection`: which values of a history a plot has.
- `style`: colours, line styles and labels.
- `downsampling`: outline and running mean of long series.
- `draw`: the plots.
"""
