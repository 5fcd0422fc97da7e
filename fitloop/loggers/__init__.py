"""Loggers: callbacks that write the metrics of trainings into files and to tracking services.

Owns the conversion of events into rows, the queue and thread of a logger, and the calls of each
service. Must not know how a run is made. The library of a service is imported when it is used.

- `logger`: `Logger`, the base class: rows, queue, thread, failures. Has an example.
- `line_file`: a file to which several processes append lines.
- `file_logger`: the base of `json_lines` and `csv`: lines in a file.
- `tensorboard`, `mlflow`, `wandb`: services.
"""

from fitloop.loggers.csv import CSV
from fitloop.loggers.json_lines import JSONLines
from fitloop.loggers.logger import LoggedRun, Logger, Row, RowKey
from fitloop.loggers.mlflow import MLflow
from fitloop.loggers.tensorboard import TensorBoard
from fitloop.loggers.wandb import WandB

__all__ = [
    "CSV",
    "JSONLines",
    "LoggedRun",
    "Logger",
    "MLflow",
    "Row",
    "RowKey",
    "TensorBoard",
    "WandB",
]
