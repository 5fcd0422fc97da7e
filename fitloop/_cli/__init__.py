"""The command line, `fitloop`: one module for each command.

A command is a module with `ABOUT`, `EXAMPLES`, `add_arguments(parser)` and `run(options)`, which
returns the exit status, and a line in `main.COMMANDS`. Only the module of the command that runs is
imported: `watch`, `plot`, `inspect`, `results` and ``--help`` must not import torch.

- `main`: the table of commands, and the exit status of each kind of failure.
- `common`: shared by the commands.
- `files`: the files of fitloop, also those of loggers, as `inspect` describes them.
- `inspect`, `results`, `export`, `watch`, `plot`, `bench`: the commands.
"""
