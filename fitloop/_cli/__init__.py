"""The command line, `fitloop`: one module for each command.

- `common`: shared by the commands.
- `inspect`, `export`, `watch`, `plot`, `bench`: the commands.
"""
