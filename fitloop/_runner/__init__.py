"""`Runner`: many trainings in one program.

- `runner`: the queue of waiting jobs, and the jobs that run.
- `jobs`: a submitted training and its outcome.
- `execution`: executes one job.
- `outcomes`: the outcomes of a sweep in files.

Does not know where a training runs: that is the business of `fitloop.backends`.
"""
