"""The terminal and the notebook: progress, printed epochs, and the continue question.

Owns everything that a person sees while training runs. Must not know models, loaders or
snapshots: it reads events.

- `console`: answers questions about the terminal.
- `live_area`: the lines at the bottom of a terminal that are redrawn.
- `forked_lines`: prints of forked processes above those lines.
- `status`: the state of a run as text.
- `progress`: printed epochs, and one live view of all runs.
- `jupyter`, `notebook_view`: the same in a Jupyter notebook.
- `prompt`: the question on the terminal.
"""
