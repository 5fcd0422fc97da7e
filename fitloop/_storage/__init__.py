"""Files: msgpack containers, weights, and the metric log.

Owns bytes on disk: the layout of a file, its checksums, atomic replacement and locks. Must not
know trainers, runs or event loops.

- `durable`: a file is replaced as a whole or not at all; locks of directories.
- `layout`, `layout_writing`: the bytes of a container file.
- `tensors`, `staging`: tensors in a container, and the copies of them that are written.
- `encoding`: nested values as msgpack trees.
- `weight_files`, `weight_store`: weights as `.msgpack`, `.safetensors` and `.pt`; weights kept in
  memory or on disk.
- `log_records`, `metric_log`, `log_follower`: the metric log, its writer and its readers.
"""
