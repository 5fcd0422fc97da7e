"""The training loop: epochs, phases, batches and stage functions.

Owns the order of calls and the types that describe a run. Must not know terminals, files
or figures, and reaches the event loop only through a `LoopPortal`.

- `config`: the checked arguments of a trainer.
- `compilation`: compiled models.
- `wrapping`: the model that exchanges gradients with other ranks.
- `sharding`: the model whose parameters are split over the ranks.
- `parallel`: the exchanges of a run with the other ranks.
- `precision`: mixed precision.
- `modes`: train and eval modes.
- `stages`: the nine stage functions and their defaults.
- `class_losses`: the losses that take class scores.
- `loss_checks`: whether the first outputs of a model suit the loss.
- `metric_objects`: the objects of ``metrics=``.
- `loop_state`: `LoopState`, the argument of every stage function, and its writer.
- `optimization`: the order of one optimizer step, and the batches of its gradients.
- `gradients`: clips gradients, and checks whether they are finite.
- `step_log`: emits metrics and learning rates of every so many optimizer steps.
- `plan`: the plan of a run, and the dependencies of the engine.
- `loop`: the loop.
- `event_bus`: passes events to observers and event streams.
- `backlog`: past events for a late reader.
- `profiler`: measures where the time of a run goes.
"""
