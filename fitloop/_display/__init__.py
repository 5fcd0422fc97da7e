"""Output for people: progress, printed epochs, and the continue question.

Reads events. Must not know models, loaders, snapshots or torch.

- `console`: answers questions about the terminal.
- `live_area`: redraws lines at the bottom of the terminal.
- `status`: progress of a run as lines of text.
- `jupyter`, `notebook_view`: the kernel, and the page of a run in a notebook.
- `progress`: printed epochs, and one live view of all runs.
- `prompt`: the question on the terminal.
"""
