"""Threads and event loops.

Owns the start, supervision, cancellation and end of threads. Must not know models, loaders or
files; only `time_slices` reads events.

- `control`: flags to stop or cancel a run, and the one condition on which a run waits.
- `supervisor`: runs work in a thread and awaits it through any number of cancellations.
- `event_loops`: differences between asyncio, uvloop and trio.
- `signals`: a block whose runs end when the program gets a signal.
- `coroutines`: executes each step of a coroutine by a function.
- `task_state`: context variables and modes of torch that threads and tasks of a run take over.
- `background_writer`: a thread that carries out writes in order.
- `torch_threads`: the number of intra-op threads of torch.
- `time_slices`: time slices for small models that train in the same process.
- `in_use`: which trainers and models are in use by a run.
"""
