"""One training in several processes, its ranks.

Owns everything on which processes agree. Must not know models, loaders or files.

- `world`: the processes, connected for the time of a block, and their messages; whether a launcher
  such as ``torchrun`` has started this process with others.
- `votes`: stops, cancellations and snapshots, on which all ranks agree at a batch boundary, and the
  flags of a run, which change then.
- `shards`: tensors that are split over the ranks.
"""
