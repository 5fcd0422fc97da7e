"""One training in several processes, its ranks.

Owns all that processes agree on. Must not know models, loaders or files.

- `launcher`: whether a launcher such as ``torchrun`` has started this process with others.
"""
