"""Files: msgpack containers, weights, and the metric log.

Owns bytes on disk: the layout of a file, its checksums, atomic replacement and locks. Must not
know trainers or event loops.

- `durable`: files that are replaced as a whole or not at all; locks of directories.
- `layout`: the bytes of a container file, read and written.
- `tensors`: tensors in a container, and the buffers that a snapshot is copied into.
- `encoding`: nested values as msgpack trees.
- `weight_files`: weights as `.msgpack`, `.safetensors` and `.pt`.
- `weight_store`: weights under a name, in memory or on disk.
- `transfer`: a part of the weights of a file, perhaps under other names, loaded into a model.
- `log_records`: the records of the metric log, as bytes and back.
- `job_files`: the names of the files of a job of a `Runner`.
- `metric_log`: the metric log: its writer, and `read_metrics`.
- `log_follower`: the events of a run in another process, read from its log.
"""
