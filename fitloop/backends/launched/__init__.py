"""Trainings on other machines: a worker that a `Launcher` starts anywhere connects back over TCP.

- `launcher`: the protocols of a `Launcher` and of a `LaunchedWorker`.
- `backend`: `LauncherBackend`, which trains on workers of any launcher.
- `listener`: waits for the connection of a worker that knows the key.
- `worker_connection`: the worker and its connection, as the `Transport` of a client.
- `worker`: the main function of a worker, ``fitloop worker``.
- `claim`: a file says which worker may write to the directory of a job.
- `command`, `slurm`, `ray_cluster`: launchers that run a command, use Slurm, or use Ray.

The conversation with a worker is that of `fitloop.backends.remote`.
"""
