"""The numbers that a training yields.

Owns the values of batches, the history of epochs, and the result of a run. Must not know devices,
files or terminals. The plot methods of the history call `_plotting`.

- `batch_values`: collects the values that batch steps return, without waiting for the device.
- `means`: means of these values over samples, as batches are added.
- `merging`: puts the values of several processes together.
- `history`: the metrics of all runs, as arrays.
- `results`: `FitResult`, and the recorder of one run.
"""
