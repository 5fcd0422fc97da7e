"""`Runner`: many trainings in one program.

- `jobs`: a submitted training and its outcome.
- `outcomes`: the outcomes of a sweep in files.
- `execution`: carries out one job.
- `runner`: the queue.
"""
