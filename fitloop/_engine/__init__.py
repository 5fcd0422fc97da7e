"""The training loop: epochs, phases, batches and stage functions, in their order.

Owns the order of calls and the types that describe a run. Must not know terminals, files,
figures or event loops; everything else observes its events.

- `config`: the checked arguments of a trainer.
- `stages`: the nine stage functions and their defaults.
- `loop_state`: `LoopState`, the argument of every stage function.
- `plan`: the plan of a run, and what the engine works with.
- `loop`: the loop.
- `event_bus`: passes events to observers and event streams.
- `profiler`: measures where the time of a run goes.
"""
