"""Output for people: progress, printed epochs, and the continue question.

Reads events. Must not know models, loaders, snapshots or torch.

- `console`: answers questions about the terminal.
- `live_area`: redraws lines at the bottom of the terminal.
- `status`, `status_lines`: progress of a run, and of all runs as lines of text.
- `printed`: the printed lines of epochs and of the end of a run; one line for a cancelled `Runner`.
- `progress_lines`: plain lines now and then, where nothing can be drawn.
- `jupyter`, `notebook_view`: the kernel, and the page of a run in a notebook.
- `progress`: one live view of all runs, and all output of one run.
- `prompt`: the question on the terminal.
"""
