"""Processes of fitloop: workers of a `Runner`, and the readers of loaders.

Owns how a process is started and ended, and how values and errors come from one to the other. Must
not know what a process does.

- `child`: a process and the pipe to it.
- `fork_server`: a process with torch imported, and the processes that it forks.
- `signals`: signals that the parent answers, and the end of a process with its parent.
- `connection`: messages over a pipe.
- `pickling`: pickles with large values apart, and code by value.
- `errors`: exceptions on their way from one process to another.
"""
