"""`Runner`: many trainings in one program.

- `runner`: the queue of waiting jobs, and the jobs that run.
- `jobs`: a submitted training and its outcome.
- `execution`: executes one job, and writes its outcome to a file.
- `arguments`: the arguments of a job's function, by name and as plain values.
- `records`: the jobs of a sweep as their files tell; imports no torch.
- `results`: jobs as tables; imports no torch.

Does not know where a training runs: that is the business of `fitloop.backends`.
"""
