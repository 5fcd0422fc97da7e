"""From a loader to batches on the device.

Owns the reading of loaders: in the step thread, ahead of it, or on the event loop. Must not know
the training loop, events or files.

- `inspection`: answers questions about a loader: length, kind, workers.
- `carried_state`: random generators, and other state, in the objects of users.
- `loaders`: opens a pass over a loader.
- `sharing`: shares the batches of a loader out to several processes.
- `sources`: reads batches inline or in a thread ahead of the steps.
- `process_source`: reads loaders in a process of their own, and `loader_process` is that process.
- `process_messages`: the messages between both sides, and the form of a batch in them.
- `shared_slots`: memory for the values of batches, which both sides share.
- `async_source`: reads an async iterable on the event loop.
- `prefetch_tuner`: measures whether reading ahead is faster.
- `resumption`: goes to the k-th batch of a pass.
- `pushback`: loaders that can be read only once.
- `batch_sizes`: the number of samples in a batch.
- `structure`: tensors in the structure of batches, copies, and comparisons of states.
- `device`, `cuda_stream`: copies to the device; a CUDA stream for a run.
"""
